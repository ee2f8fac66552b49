"""The `gemma-mtp` command: parse, call, print."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from gemma_mtp import __version__
from gemma_mtp.cli import environment  # noqa: F401 (before what imports torch)
from gemma_mtp.cli.acceptance import acceptance
from gemma_mtp.cli.bench_serve import bench_serve
from gemma_mtp.cli.console import print_anything
from gemma_mtp.cli.doctor import doctor
from gemma_mtp.cli.export import export
from gemma_mtp.cli.generate import generate
from gemma_mtp.cli.identity import identity
from gemma_mtp.cli.inspect import inspect
from gemma_mtp.cli.option_groups import grouped
from gemma_mtp.cli.plan import plan
from gemma_mtp.cli.pull import pull
from gemma_mtp.cli.quantize import quantize
from gemma_mtp.cli.recipe import recipe
from gemma_mtp.cli.score import score
from gemma_mtp.cli.serve import serve
from gemma_mtp.cli.train import train
from gemma_mtp.errors import GemmaMtpError
from gemma_mtp.interrupts import INTERRUPTED, interruptible


class Command(TyperCommand):
    """A command whose flags are as plain as they can be (`_plain_flags`)."""

    def get_params(self, ctx: Any) -> Any:
        return _plain_flags(super().get_params(ctx))


class Commands(TyperGroup):
    """The same for the options before a command's name."""

    def get_params(self, ctx: Any) -> Any:
        return _plain_flags(super().get_params(ctx))


def _plain_flags(params: Any) -> Any:
    """Help shows no type for flags, which take no value. Typer's own, such as --help, are False by default.

    They are None otherwise, and to convert None to a bool takes pydantic, which takes 0.1 seconds to import.
    """
    for param in params:
        if getattr(param, "is_flag", False):
            param.metavar = "" if param.metavar is None else param.metavar
            if param.default is None and not param.expose_value:
                param.default = False
    return params


app = typer.Typer(
    name="gemma-mtp",
    cls=Commands,
    help="Decode Gemma 4 models faster with Multi-Token-Prediction drafters, and with exactly the same output.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


for command in (
    grouped(generate), grouped(score), inspect, grouped(plan), pull, grouped(doctor), grouped(train), quantize, export,
    grouped(recipe), grouped(acceptance), grouped(serve), grouped(bench_serve),
    grouped(identity),
):  # fmt: skip
    app.command(cls=Command)(command)


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def common(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what is loaded and skipped.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", callback=_version)] = False,
) -> None:
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s", stream=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 1 (a comparison failed), 2 (bad input), 3 (what was trained is
    worse), 4 (the limit cut an output that a grammar was to make whole), 130 (interrupted)."""
    print_anything()
    with interruptible() as interrupted:
        try:
            code = _run(list(sys.argv[1:] if argv is None else argv))
            sys.stdout.flush()
        except GemmaMtpError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            return INTERRUPTED
        except BrokenPipeError:  # the reader of our output left, which is its right
            _discard_output()
            return 0
        except OSError as error:
            print(f"error: {error.filename or 'the output'}: {error.strerror or error}.", file=sys.stderr)
            if error.filename is None:
                _discard_output()
            return 2
        except Exception:
            if interrupted():  # while a library was imported that turned it into an error of its own
                return INTERRUPTED
            raise
    return code


def _run(arguments: list[str]) -> int:
    try:
        app(arguments, prog_name="gemma-mtp")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    return 0


def _discard_output() -> None:
    """What is still to be written to standard output, which takes no more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
