"""`gemma-mtp inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemma_mtp.cli import options
from gemma_mtp.cli.console import console, print_table
from gemma_mtp.locate import Role, locate

if TYPE_CHECKING:
    from rich.table import Table

    from gemma_mtp.measure.memory import CheckpointReport


def inspect(
    directory: Annotated[Path, typer.Argument(help="A target's or drafter's checkpoint directory or GGUF file.")],
    drafter: Annotated[Path | None, typer.Argument(help="A drafter's, to check whether the two fit together.")] = None,
    adapter: Annotated[Path | None, typer.Option(help=options.ADAPTER)] = None,
    strict: options.Strict = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print what a checkpoint is: geometry, parameters, bytes, KV bytes a token. Given two, say whether they fit
    together.

    Reads configurations and file headers, and of weights a head that should be tied. Exits with 1 where the pair does
    not fit.
    """
    from gemma_mtp import checkpoint
    from gemma_mtp.config.pairing import pair_verdict
    from gemma_mtp.measure.memory import inspect_checkpoint

    roles: dict[Role, Path | None] = {"target": directory, "drafter": drafter}
    paths = [locate(path, role) for role, path in roles.items() if path is not None]
    target = checkpoint.open_source(paths[0], adapter=adapter)
    reports = [inspect_checkpoint(target), *map(inspect_checkpoint, paths[1:])]
    for path, report in zip(paths, reports, strict=True):
        checkpoint.report(path, report.notes, strict)
    verdict = None
    if drafter is not None:
        verdict = pair_verdict(checkpoint.read_target_config(target), checkpoint.read_drafter_config(drafter))
    if as_json:
        content = {"checkpoints": [report.to_dict() for report in reports]}
        pair = {} if drafter is None else {"pair": {"fits": verdict is None, "reason": verdict}}
        print(json.dumps({**content, **pair}))
    else:
        out = console()
        for path, report in zip(paths, reports, strict=True):
            print_table(out, _table(str(path), report))
        if drafter is not None:
            fit = "pair: fits" if verdict is None else f"pair: does not fit; {verdict}"
            out.print(fit, soft_wrap=True)
    if verdict is not None:
        raise typer.Exit(1)


def _table(title: str, report: CheckpointReport) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    for name, value in report.to_dict().items():
        table.add_row(name.replace("_", " "), _shown(value))
    return table


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        names = {name: name.replace("_", " ") if name.islower() else name for name in value}  # a type is Q4_0
        return ", ".join(f"{names[name]} {_shown(part)}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return ("\n" if any(isinstance(part, str) for part in value) else " ").join(_shown(part) for part in value)
    return str(value)
