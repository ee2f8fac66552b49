"""Fills a recipe in. Templates are Jinja's, with the filters `sh` (a shell's word) and `json`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from jinja2 import StrictUndefined
from jinja2.sandbox import SandboxedEnvironment

from gemma_mtp.errors import OptionError
from gemma_mtp.recipes.given import Given
from gemma_mtp.recipes.read import Recipe, Statement, Step, TextFile, Version
from gemma_mtp.units import counted, shown_bytes

#: what the forms of checkpoints are called
FORMS = {"hub": "a name on the hub", "directory": "a directory", "gguf": "a GGUF file"}
#: what makes another form of one
MAKES = {
    "hub": "gemma-mtp pull makes of a name", "directory": "gemma-mtp export makes of a directory",
    "gguf": "gemma-mtp export --to safetensors makes of a file",
}  # fmt: skip
Part = TypeVar("Part", Statement, Step, TextFile)


@dataclass(frozen=True)
class Filled:
    """A recipe for one pair on one machine. `memory`: what the planner says; `steps` have their commands in order, and
    stand behind `files`, which are to be written first."""

    runtime: str
    title: str
    tried: str
    seen: str
    date: str
    draft_tokens: int
    draft_tokens_from: str
    device: str
    memory: list[str]
    versions: tuple[Version, ...]
    files: list[TextFile]
    steps: list[Step]
    lost: list[str]
    notes: list[str]
    unknown: list[str]

    def to_dict(self) -> dict[str, Any]:
        content = asdict(self)
        for part in (*content["files"], *content["steps"]):
            del part["when"]
        return content


def fill(recipe: Recipe, given: Given) -> Filled:
    """Returns the recipe with the values in it. Raises OptionError for a device or a form that it is not for."""
    if given.device not in recipe.devices:
        raise OptionError(
            f"{recipe.title} runs a pair on {' or '.join(recipe.devices)}, not on {given.device};"
            f" for another machine give --device {recipe.devices[0]}."
        )
    if given.form not in recipe.reads:
        raise OptionError(
            f"{recipe.title} is not given a pair as {FORMS[given.form]}; give it as"
            f" {' or '.join(FORMS[form] for form in recipe.reads)}, which {MAKES[given.form]}."
        )
    if given.quantised and given.form == "directory" and any("gemma-mtp export" in step.run for step in recipe.steps):
        raise OptionError(
            f"{recipe.title} needs an export, and this pair is quantised already; give the pair that it was made of."
        )
    values, environment = given.values(), _environment()

    def holds(part: Part) -> bool:
        return bool(environment.compile_expression(part.when)(**values))

    def text(template: str) -> str:
        return environment.from_string(template).render(values).strip("\n")

    def said(parts: Iterable[Statement]) -> list[str]:
        return [text(part.say) for part in parts if holds(part)]

    return Filled(
        recipe.runtime, recipe.title, recipe.tried, recipe.seen, recipe.date, given.k, given.k_source, given.device,
        memory_lines(given), recipe.versions,
        files=[TextFile(text(f.name), f.language, text(f.text)) for f in recipe.files if holds(f)],
        steps=[Step(text(s.say), text(s.run)) for s in recipe.steps if holds(s)],
        lost=said(recipe.lost), notes=said(recipe.notes), unknown=said(recipe.unknown),
    )  # fmt: skip


def memory_lines(given: Given) -> list[str]:
    """What the planner says of the pair on the machine: it counts gemma-mtp's own layout, not the runtime's buffers."""
    sequences = counted(given.sequences, "sequence")
    planned = shown_bytes(given.total)
    lines = [f"{planned} planned for {sequences} of {given.context} tokens, in gemma-mtp's own layout"]
    if given.memory is None:
        return [*lines, "the machine's memory is not known; give --memory to have the context checked against it"]
    memory = shown_bytes(given.memory)
    if not given.fits:
        return [*lines, f"this does not fit into {memory}, whatever the context"]
    if given.context < given.wanted_context:
        lines.append(f"{given.wanted_context} tokens do not fit into {memory}: the context is shorter")
    return lines


def _environment() -> SandboxedEnvironment:
    environment = SandboxedEnvironment(
        undefined=StrictUndefined, autoescape=False, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["sh"] = lambda value: shlex.quote(str(value))
    environment.filters["json"] = json.dumps
    return environment
