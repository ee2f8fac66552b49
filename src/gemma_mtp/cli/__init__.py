"""The `gemma-mtp` command: parse, call, print."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from gemma_mtp import __version__
from gemma_mtp.cli import environment  # noqa: F401 (before what imports torch)
from gemma_mtp.cli.console import LogLines, discard, forget_no_size, open_streams, print_anything, readers_may_leave
from gemma_mtp.errors import GemmaMtpError
from gemma_mtp.interrupts import INTERRUPTED, interruptible

#: the commands: functions of modules that have their names
COMMANDS = (
    "generate", "chat", "score", "inspect", "plan", "pull", "doctor", "train", "quantize", "export", "recipe",
    "acceptance", "serve", "bench-serve", "identity",
)  # fmt: skip


class _Plain:
    """Flags are as plain as they can be (`_plain_flags`), and readers of the help may leave."""

    def get_params(self, ctx: Any) -> Any:
        return _plain_flags(super().get_params(ctx))  # type: ignore[misc]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        try:
            super().format_help(ctx, formatter)  # type: ignore[misc]
        except SystemExit:  # by Typer's own console, where nobody reads, and for nothing else
            raise typer.Exit from None


class Command(_Plain, TyperCommand):
    """One of the commands."""


class Commands(_Plain, TyperGroup):
    """All of them, with the options before their names. Readers of what they print may leave."""

    def invoke(self, ctx: Any) -> Any:
        with readers_may_leave():
            return super().invoke(ctx)


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


def application(commands: Iterable[str] = COMMANDS) -> typer.Typer:
    """Returns the program with these commands, of which it imports the options."""
    app = typer.Typer(
        name="gemma-mtp",
        cls=Commands,
        help="Decode Gemma 4 models faster with Multi-Token-Prediction drafters, and with exactly the same output.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(common)
    for name in commands:
        module = name.replace("-", "_")
        command = getattr(importlib.import_module(f"{__name__}.{module}"), module)
        app.command(cls=Command, help=_paragraphs(command))(command)
    return app


def _paragraphs(command: Callable[..., None]) -> str:
    """What a command's docstring says, a line a paragraph: the terminal breaks lines, not the source."""
    return "\n\n".join(" ".join(text.split()) for text in (command.__doc__ or "").split("\n\n"))


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


def common(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what is loaded and skipped.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", callback=_version)] = False,
) -> None:
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s", handlers=[LogLines()])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 1 (a comparison failed), 2 (bad input), 3 (what was trained is
    worse), 4 (the limit cut an output that a grammar was to make whole), 130 (Ctrl-C), 143 (SIGTERM), 129 (SIGHUP)."""
    open_streams()
    forget_no_size()
    print_anything()
    with interruptible() as interrupted:
        try:
            code = _run(list(sys.argv[1:] if argv is None else argv))
            sys.stdout.flush()
        except GemmaMtpError as error:
            return _refuse(str(error))
        except KeyboardInterrupt:
            return _ended_by(interrupted())
        except BrokenPipeError:  # what was printed last, which nobody read
            discard(sys.stdout)
            return 0
        except OSError as error:
            if error.filename is None:
                discard(sys.stdout)
            return _refuse(f"{error.filename or 'the output'}: {error.strerror or error}.")
        except Exception:
            if interrupted():  # while a library was imported that turned it into an error of its own
                return _ended_by(interrupted())
            raise
    return _ended_by(interrupted()) if code == INTERRUPTED else code  # which Typer makes of every KeyboardInterrupt


def _ended_by(number: int | None) -> int:
    """The exit code of a command that a signal ended."""
    return INTERRUPTED if number is None else 128 + number


def _run(arguments: list[str]) -> int:
    named = next((word for word in arguments if not word.startswith("-")), None)
    app = application([named] if named in COMMANDS else COMMANDS)  # the options of all take 0.05 seconds
    try:
        app(arguments, prog_name="gemma-mtp")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    return 0


def _refuse(text: str) -> int:
    """Says what was wrong, where standard error takes it. Returns the exit code."""
    try:
        print(f"error: {text}", file=sys.stderr)
    except OSError:
        discard(sys.stderr)
    return 2
