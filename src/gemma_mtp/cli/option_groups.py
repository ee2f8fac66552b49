"""Options in groups: a class whose fields are options, and commands that take such classes."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from inspect import Parameter
from typing import Annotated, Any, TypeVar, dataclass_transform, get_args, get_origin, get_type_hints

import typer
from typer.models import OptionInfo

from gemma_mtp.errors import OptionError

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


#: raises an error for a value that is given, of an option of this name, and that can not be
Check = Callable[[str, Any], object]


def option(
    default: Any, help: str, *names: str, needs: str | None = None, check: Check | None = None, **more: Any
) -> Any:
    """A field's option, `--` and the field's name unless `names` has a long one. `more` is what typer.Option takes.

    `needs` is the option without which this one has no effect, such as "--json". The help says so, and the command
    refuses it where only this one is given, and what `check` raises an error for.
    """
    text = help if needs is None else f"With {needs}: {help[0].lower()}{help[1:]}"

    def read(name: str, panel: str) -> Any:
        all_names = names if any(given.startswith("--") for given in names) else (name, *names)
        return typer.Option(*all_names, help=text, rich_help_panel=panel, **more)

    return field(default=default, metadata={"read": read, "names": names, "needs": needs, "check": check})


def at_least(least: int) -> Check:
    """Refuses smaller numbers."""

    def check(name: str, value: float) -> None:
        if not value >= least:
            raise OptionError(f"{name} is {value:g}, but must be {least} or more.")

    return check


def above(bound: int) -> Check:
    """Refuses numbers that are not greater."""

    def check(name: str, value: float) -> None:
        if not value > bound:
            raise OptionError(f"{name} is {value:g}, but must be more than {bound}.")

    return check


def argument(default: Any, help: str) -> Any:
    """A field's positional argument."""
    return field(default=default, metadata={"read": lambda name, panel: typer.Argument(help=help)})


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Returns a command of groups as typer reads it, with one parameter for each option.

    It raises OptionError for an option that is given without the one it needs, and what an option's check raises.
    Raises ValueError where two options have the same name.
    """
    groups = {name: kind for name, kind in get_type_hints(command).items() if name != "return"}
    all_fields = [f for kind in groups.values() for f in fields(kind)]

    @functools.wraps(command)
    def called(**values: Any) -> None:
        _check_needs(all_fields, values)
        for f in all_fields:
            if values[f.name] is not None and (check := f.metadata.get("check")) is not None:
                check(long_name(f), values[f.name])
        command(**{name: kind(**{f.name: values[f.name] for f in fields(kind)}) for name, kind in groups.items()})

    options = [parameter for kind in groups.values() for parameter in _parameters(kind)]
    called.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    called.__annotations__ = {option.name: option.annotation for option in options}
    return called


def then(module: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a command of a function that says what is wrong with its groups. What is right goes to the function of the
    same name in `gemma_mtp.cli.{module}`, which is imported no sooner: that takes seconds."""

    def made(check: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(check)
        def command(**groups: Any) -> None:
            check(**groups)
            getattr(importlib.import_module(f"gemma_mtp.cli.{module}"), check.__name__)(**groups)

        return command

    return made


def _parameters(group: Any) -> Iterator[Parameter]:
    kinds = get_type_hints(group)
    for f in fields(group):
        read = f.metadata["read"](_dashed(f), group.panel)
        if isinstance(read, OptionInfo) and read.metavar is None:
            read.metavar = _metavar_of_list(kinds[f.name])
        default = Parameter.empty if f.default is MISSING else f.default
        yield Parameter(f.name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kinds[f.name], read])


def _metavar_of_list(kind: Any) -> str | None:
    """What one value is, of an option that may be repeated; None for others, of which typer says it."""
    lists = [each for each in (kind, *get_args(kind)) if get_origin(each) is list]
    return f"<{get_args(lists[0])[0].__name__.lower()}>" if lists else None


def _check_needs(all_fields: Sequence[Field[Any]], values: Mapping[str, Any]) -> None:
    given = {long_name(f) for f in all_fields if values[f.name] != f.default}
    for f in all_fields:
        needs = f.metadata.get("needs")
        if needs is not None and long_name(f) in given and needs not in given:
            raise OptionError(f"{long_name(f)} has no effect without {needs}; give both, or leave it out.")


def long_name(option: Field[Any]) -> str:
    """What an option is called on the command line, such as --max-tokens."""
    return next((name for name in option.metadata.get("names", ()) if name.startswith("--")), _dashed(option))


def _dashed(option: Field[Any]) -> str:
    return f"--{option.name.replace('_', '-')}"
