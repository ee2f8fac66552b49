"""Options in groups: a class whose fields are options, and commands that take such classes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, field, fields
from inspect import Parameter
from typing import Annotated, Any, TypeVar, dataclass_transform, get_type_hints

import typer

Group = TypeVar("Group")
#: in place of a default
REQUIRED: Any = MISSING


@dataclass_transform(frozen_default=True, kw_only_default=True)
def group(panel: str) -> Callable[[type[Group]], type[Group]]:
    """Makes a frozen dataclass of options, given by name, whose help stands in this panel."""

    def made(cls: type[Group]) -> type[Group]:
        cls.panel = panel  # type: ignore[attr-defined]
        return dataclass(frozen=True, kw_only=True)(cls)

    return made


def option(default: Any, help: str, *names: str, **more: Any) -> Any:
    """A field's option, `--` and the field's name unless `names` has a long one. `more` is what typer.Option takes."""

    def read(name: str, panel: str) -> Any:
        all_names = names if any(given.startswith("--") for given in names) else (name, *names)
        return typer.Option(*all_names, help=help, rich_help_panel=panel, **more)

    return field(default=default, metadata={"read": read})


def argument(default: Any, help: str) -> Any:
    """A field's positional argument."""
    return field(default=default, metadata={"read": lambda name, panel: typer.Argument(help=help)})


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Returns a command of groups as typer reads it, with one parameter for each option.

    Raises ValueError where two options have the same name.
    """
    groups = {name: kind for name, kind in get_type_hints(command).items() if name != "return"}

    @functools.wraps(command)
    def called(**values: Any) -> None:
        command(**{name: kind(**{f.name: values[f.name] for f in fields(kind)}) for name, kind in groups.items()})

    options = [parameter for kind in groups.values() for parameter in _parameters(kind)]
    called.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    called.__annotations__ = {option.name: option.annotation for option in options}
    return called


def _parameters(group: Any) -> Iterator[Parameter]:
    kinds = get_type_hints(group)
    for f in fields(group):
        read = f.metadata["read"](f"--{f.name.replace('_', '-')}", group.panel)
        default = Parameter.empty if f.default is MISSING else f.default
        yield Parameter(f.name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kinds[f.name], read])
