"""Reads recipes. A runtime's file says what was tried, what to type, what is lost, and what nobody knows."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from importlib import resources
from typing import Any, Literal

from gemma_mtp.errors import OptionError

#: what stands behind a recipe: it ran, the other's own parser or classes took it, or its documentation says so
Tried = Literal["run", "schema", "documentation"]


@dataclass(frozen=True)
class Version:
    """A version of the runtime: whether the pair works with it (yes, no, partly or unknown), and what was seen."""

    version: str
    works: str
    said: str


@dataclass(frozen=True)
class Statement:
    """A sentence; `when` is an expression over the given values, without which it always holds."""

    say: str
    when: str = "true"


@dataclass(frozen=True)
class Step:
    """A command, a template of a shell's line, and why it is needed."""

    say: str
    run: str
    when: str = "true"


@dataclass(frozen=True)
class TextFile:
    """A file to write: a template, and the language of it."""

    name: str
    language: str
    text: str
    when: str = "true"


@dataclass(frozen=True)
class Recipe:
    """A runtime's whole file. `reads`: forms of checkpoints (directory, hub, gguf) that it takes, after the steps."""

    runtime: str
    title: str
    tried: Tried
    seen: str
    date: str
    reads: tuple[str, ...]
    devices: tuple[str, ...]
    versions: tuple[Version, ...]
    steps: tuple[Step, ...]
    files: tuple[TextFile, ...] = ()
    lost: tuple[Statement, ...] = ()
    notes: tuple[Statement, ...] = ()
    unknown: tuple[Statement, ...] = ()


PARTS = {"versions": Version, "steps": Step, "files": TextFile, "lost": Statement, "notes": Statement,
         "unknown": Statement}  # fmt: skip


def runtimes() -> list[str]:
    """Returns the names of the runtimes that there are recipes for."""
    return sorted(file.name.removesuffix(".toml") for file in _directory().iterdir() if file.name.endswith(".toml"))


def read_recipe(runtime: str) -> Recipe:
    """Returns a runtime's recipe. Raises OptionError for a name that there is none for."""
    if runtime not in runtimes():
        raise OptionError(f"there is no recipe for {runtime!r}; give one of {', '.join(runtimes())}.")
    raw = tomllib.loads((_directory() / f"{runtime}.toml").read_text(encoding="utf-8"))
    read = {name: _parts(name, value) for name, value in raw.items()}
    return Recipe(runtime=runtime, **read)


def _parts(name: str, value: Any) -> Any:
    if name in PARTS:
        kind = PARTS[name]
        known = {f.name for f in fields(kind)}
        assert all(part.keys() <= known for part in value), name
        return tuple(kind(**part) for part in value)
    return tuple(value) if isinstance(value, list) else value


def _directory() -> Any:
    return resources.files("gemma_mtp.recipes") / "runtimes"
