"""Options in groups: the signature that typer reads, the values that a command gets, and the help."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from gemma_mtp.cli import application
from gemma_mtp.cli.option_groups import REQUIRED, argument, group, grouped, option


@group("Place")
class Place:
    files: list[Path] | None = argument(None, "Where to look.")
    out: Path = option(REQUIRED, "Where to write.", "-o")
    max_depth: int = option(3, "How deep.")


@group("Place")
class DeepPlace(Place):
    max_depth: int = option(9, "How deep, here.")
    hidden: bool = option(True, "Whether hidden files count.", "--hidden/--no-hidden")


@group("Words")
class Words:
    words: list[str] | None = option(None, "May be repeated.", "--word", metavar="WORD")
    tags: list[int] | None = option(None, "These too.", "--tag")
    secret: str = option("", "Kept back.", envvar="GROUPS_SECRET")


def command(place: DeepPlace, words: Words) -> None:
    """Look for words."""
    got.append((place, words))


got: list[tuple[DeepPlace, Words]] = []


@pytest.fixture
def run() -> Callable[..., Any]:
    """Runs the command by typer, in a terminal of a hundred columns."""
    got.clear()
    made = typer.Typer()
    made.command()(grouped(command))
    terminal = {"TERMINAL_WIDTH": "100", "COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    return lambda *arguments, **env: CliRunner().invoke(made, arguments, env={**terminal, **env})


def test_each_group_gets_its_values(run: Callable[..., Any]) -> None:
    ran = run("a", "b", "-o", "c", "--max-depth", "1", "--no-hidden", "--word", "x", "--word", "y", GROUPS_SECRET="z")
    assert ran.exit_code == 0, ran.output
    place = DeepPlace(files=[Path("a"), Path("b")], out=Path("c"), max_depth=1, hidden=False)
    assert got == [(place, Words(words=["x", "y"], secret="z"))]
    with pytest.raises(FrozenInstanceError):
        place.max_depth = 2  # type: ignore[misc]


def test_a_field_keeps_its_default_and_a_group_may_change_that_of_its_base(run: Callable[..., Any]) -> None:
    assert run("--out", "c").exit_code == 0
    assert got == [(DeepPlace(out=Path("c")), Words())]
    assert (got[0][0].max_depth, Place(out=Path("c")).max_depth) == (9, 3)


def test_what_is_required_unknown_or_of_a_wrong_kind_is_refused_by_name(run: Callable[..., Any]) -> None:
    for arguments, name in (([], "--out"), (["-o", "c", "--max-depth", "x"], "--max-depth"), (["--words"], "--words")):
        ran = run(*arguments)
        assert (ran.exit_code, got) == (2, []) and name in ran.output


def test_the_help_has_a_panel_for_each_group(run: Callable[..., Any]) -> None:
    text = run("--help").output
    place, words = text.index("─ Place "), text.index("─ Words ")
    assert "Look for words." in text and "Where to look." in text[:place]
    assert text.index("─ Arguments ") < place < words
    order = ["--out", "-o", "How deep, here.", "[default: 9]", "--hidden", "--no-hidden"]
    assert [text.index(part, place) for part in order] == sorted(text.index(part, place) for part in order)
    assert all(place < text.index(part) < words for part in order)
    assert "WORD" in text[words:] and "[env var: GROUPS_SECRET]" in text[words:] and "How deep.  " not in text
    assert "<int>" in next(line for line in text.splitlines() if "--tag" in line), "what one value is, not the list"


def test_the_signature_has_the_groups_options_in_their_order() -> None:
    shown = inspect.signature(grouped(command)).parameters
    assert list(shown) == ["files", "out", "max_depth", "hidden", "words", "tags", "secret"]
    assert shown["out"].default is inspect.Parameter.empty
    assert (grouped(command).__name__, grouped(command).__doc__) == ("command", "Look for words.")


def test_two_options_of_one_name_are_an_error() -> None:
    def twice(place: Place, deep: DeepPlace) -> None: ...

    with pytest.raises(ValueError, match="files"):
        grouped(twice)


def test_no_command_has_many_parameters() -> None:
    commands = [
        registered.callback for registered in application().registered_commands if registered.callback is not None
    ]
    assert len(commands) >= 11
    for registered in commands:
        written = inspect.signature(inspect.unwrap(registered))
        assert len(written.parameters) <= 7, f"{registered.__name__}: options belong in groups"
