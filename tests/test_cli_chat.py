"""`generate --chat` with a model that thinks."""

import json
from typing import Any

import pytest
from table_models import table_pair

from gemma_mtp.cli import generate_run, main
from gemma_mtp.cli import options as cli_options
from gemma_mtp.decoding.params import SamplingParams
from gemma_mtp.engine.pair import Pair
from gemma_mtp.errors import SamplingError


@pytest.fixture(scope="module")
def pair() -> Pair:
    return table_pair()


def run(pair: Pair, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(cli_options.PairOptions, "load", lambda options: pair)
    return main(["generate", *arguments])


def test_thoughts_are_apart_from_the_text(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(pair, monkeypatch, "THINK", "--chat", "--thinking", "--stop", "STOP") == 0
    out, err = capsys.readouterr()
    assert out == "The answer \n" and "Two and two STOP is four\n" in err
    assert run(pair, monkeypatch, "THINK", "--chat", "--thinking", "-q") == 0
    assert capsys.readouterr() == ("The answer STOP is 4\n", "")
    assert run(pair, monkeypatch, "THINK", "--chat", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["text"], found["thought"]) == ("The answer STOP is 4", "Two and two STOP is four")


def test_thoughts_are_dimmed_on_a_terminal(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    def coloured(stderr: bool = False) -> Console:
        return Console(stderr=stderr, force_terminal=True, color_system="standard", markup=False)

    monkeypatch.setattr(generate_run, "console", coloured)
    assert run(pair, monkeypatch, "THINK", "--chat", "--thinking", "-q") == 0
    out = capsys.readouterr().out
    assert "\x1b[2;3mTwo " in out and out.endswith("The answer STOP is 4\n")


def test_a_grammar_is_of_what_follows_the_thought(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(pair, monkeypatch, "THINK", "--chat", "--thinking", "--regex", "[0-9]{4}", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["text"].isdigit() and len(found["text"]) == 4 and found["thought"] == "Two and two STOP is four"


def test_what_can_not_think_is_refused(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(pair, monkeypatch, "THINK", "--thinking") == 2
    assert "--chat" in capsys.readouterr().err
    plain: Any = table_pair(template="{% for m in messages %}{{ m['content'] }}{% endfor %}")
    assert run(plain, monkeypatch, "THINK", "--chat", "--thinking") == 2
    assert "switch" in capsys.readouterr().err
    with pytest.raises(SamplingError, match="apart"):
        pair.turn("THINK", SamplingParams())
