"""Options in groups: a class whose fields are options, and commands that take such classes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
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
    """A field's option, named after the field unless it has other names. `more` is what typer.Option takes."""
    return _field(
        default, lambda name, panel: typer.Option(*(names or [name]), help=help, rich_help_panel=panel, **more)
    )


def argument(default: Any, help: str) -> Any:
    """A field's positional argument."""
    return _field(default, lambda _name, _panel: typer.Argument(help=help))


def _field(default: Any, read: Callable[[str, str], Any]) -> Any:
    return field(default=default, metadata={"read": read})


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Returns the command as typer reads it, with one parameter for each option of its groups.

    Raises ValueError where two of them have the same name.
    """
    kinds = get_type_hints(command, include_extras=True)
    given = inspect.signature(command).parameters.values()
    groups = {parameter.name: kinds[parameter.name] for parameter in given if is_dataclass(kinds[parameter.name])}
    options: list[Parameter] = []
    for parameter in given:
        if parameter.name in groups:
            options += _parameters(groups[parameter.name])
        else:
            options.append(parameter.replace(annotation=kinds[parameter.name], kind=Parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def called(**values: Any) -> None:
        made = {name: kind(**{f.name: values.pop(f.name) for f in fields(kind)}) for name, kind in groups.items()}
        command(**values, **made)

    called.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    called.__annotations__ = {option.name: option.annotation for option in options}
    return called


def _parameters(group: Any) -> Iterator[Parameter]:
    kinds = get_type_hints(group, include_extras=True)
    for f in fields(group):
        read = f.metadata["read"](f"--{f.name.replace('_', '-')}", group.panel)
        default = Parameter.empty if f.default is MISSING else f.default
        yield Parameter(f.name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kinds[f.name], read])
