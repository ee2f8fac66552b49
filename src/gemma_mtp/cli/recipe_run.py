"""What `gemma-mtp recipe` does: fill a recipe in, and print it."""

from __future__ import annotations

import json
import platform

from rich.console import Console

from gemma_mtp.cli import options
from gemma_mtp.cli.console import console
from gemma_mtp.cli.plan_run import memory_of
from gemma_mtp.cli.recipe import RecipeDrafts, RecipeLoad, RecipeMachine, RecipeOptions
from gemma_mtp.errors import DataError
from gemma_mtp.json_files import read_json
from gemma_mtp.recipes.fill import Filled, fill
from gemma_mtp.recipes.given import Drafts, asked_drafts, given, reported_drafts
from gemma_mtp.recipes.read import Recipe, read_recipe

TRIED = {
    "run": "run",
    "schema": "checked against the runtime's own parser, not run",
    "documentation": "written from its documentation, not run",
}


def recipe(
    models: RecipeOptions, drafts: RecipeDrafts, used: RecipeLoad, machine: RecipeMachine, output: options.JsonOutput
) -> None:
    """Fill the recipe in, and print it."""
    read = read_recipe(models.runtime)
    device, memory = _machine(machine)
    values = given(models.target, models.drafter, _drafts(drafts), device, used.context, used.sequences, memory)
    filled = fill(read, values)
    if output.as_json:
        print(json.dumps(filled.to_dict()))
    else:
        print_recipe(console(), read, filled)


def _drafts(drafts: RecipeDrafts) -> Drafts | None:
    if drafts.draft_tokens is not None:
        return asked_drafts(drafts.draft_tokens)
    if drafts.report is None:
        return None
    if not drafts.report.is_file():
        raise DataError(f"there is no file {drafts.report}; give what gemma-mtp acceptance --json printed.")
    return reported_drafts(read_json(drafts.report), drafts.report)


def _machine(machine: RecipeMachine) -> tuple[str, int | None]:
    """The device, and the bytes of memory that are known of it."""
    if machine.device != "auto":
        return machine.device, memory_of(machine.memory, machine.device)[0]
    gpu = memory_of(None, "cuda")[0]
    apple = platform.system() == "Darwin" and platform.machine() == "arm64"
    device = "cuda" if gpu is not None else "metal" if apple else "cpu"
    return device, memory_of(machine.memory, device)[0]


def print_recipe(out: Console, recipe: Recipe, filled: Filled) -> None:
    """What stands behind it, the files, the commands, and what to know. Commands are never broken or cut."""
    _say(out, f"{filled.title} on {filled.device}: {TRIED[filled.tried]} ({filled.seen}, {filled.date})")
    _say(out, f"drafts a round: {filled.draft_tokens}, {filled.draft_tokens_from}")
    _list(out, "memory", filled.memory)
    _list(out, "versions", [f"{one.version}: {one.works}; {one.said}" for one in recipe.versions])
    for file in filled.files:
        _say(out, f"\nwrite {file.name}:", bold=True)
        _say(out, file.text)
    for step in filled.steps:
        _say(out, f"\n# {step.say}", bold=True)
        _say(out, step.run)
    _list(out, "\nlost", filled.lost)
    _list(out, "to know", filled.notes)
    _list(out, "not known", filled.unknown)


def _list(out: Console, title: str, lines: list[str]) -> None:
    if lines:
        _say(out, f"{title}:", bold=True)
    for line in lines:
        _say(out, f"  - {line}")


def _say(out: Console, text: str, bold: bool = False) -> None:
    out.print(text, style="bold" if bold else None, highlight=False, soft_wrap=True)
