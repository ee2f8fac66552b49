"""`gemma-mtp score`: the scores that the pair itself gives, whole and of a continuation."""

import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from models import letters

from gemma_mtp.cli import main
from gemma_mtp.decoding.params import SamplingParams
from gemma_mtp.engine.pair import Pair
from gemma_mtp.engine.result import PromptLogprob

TEXT, MORE = "import os", "\nprint(os.name)\n"


def direct(pair: Pair, text: str) -> list[PromptLogprob]:
    found = pair.generate(text, SamplingParams(max_tokens=0, prompt_logprobs=2)).prompt_logprobs
    assert found is not None
    return found


def scored(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["score", *arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_whole_text(pair: Pair, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    expected, found = direct(pair, TEXT + MORE), scored(capsys, TEXT + MORE)
    assert [token["logprob"] for token in found["tokens"]] == [entry.logprob for entry in expected]
    assert [token["rank"] for token in found["tokens"]] == [entry.rank for entry in expected]
    assert "".join(token["text"] for token in found["tokens"]) == TEXT + MORE
    mean = math.fsum(entry.logprob for entry in expected) / len(expected)
    assert found["perplexity"] == math.exp(-mean) and found["count"] == len(expected)
    (tmp_path / "text").write_text(TEXT + MORE)
    assert scored(capsys, "--file", str(tmp_path / "text")) == found


def test_no_drafter_is_looked_for(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing says that decoding is plain: there is none."""
    target = shutil.copytree(saved / "target", tmp_path / "target")
    letters(target)
    assert main(["score", "ABCA", "--target", str(target)]) == 0
    assert capsys.readouterr().err == ""


def test_a_continuation(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    expected = direct(pair, TEXT + MORE)[len(pair.encode(TEXT)) - 1 :]
    found = scored(capsys, TEXT, "--continuation", MORE, "--top", "2")
    assert [token["logprob"] for token in found["tokens"]] == [entry.logprob for entry in expected]
    assert "".join(token["text"] for token in found["tokens"]) == MORE
    tops = [[(top["id"], top["logprob"]) for top in token["top"]] for token in found["tokens"]]
    assert tops == [list(entry.top) for entry in expected]
    assert found["greedy"] == all(entry.rank == 1 for entry in expected)


def test_a_table(pair: Pair, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(TEXT))
    assert main(["score"]) == 0
    *rows, last = capsys.readouterr().out.strip().splitlines()
    expected = direct(pair, TEXT)
    assert [row.split()[:2] for row in rows[1:]] == [[f"{entry.logprob:.4f}", str(entry.rank)] for entry in expected]
    assert last.startswith(f"{len(expected)} tokens, log-probability {math.fsum(e.logprob for e in expected):.4f}")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["x", "--file", "y"], "given twice"), (["x", "--top", "2"], "without --json"),
        (["x", "--top", "99", "--json"], "--top is 99"), ([""], "nothing to score"),
        (["imp", "--continuation", "ort os"], "of both"), (["x" * 9000], "takes at most"),
    ],
)  # fmt: skip
def test_what_is_refused(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", *arguments]) == 2
    assert words in capsys.readouterr().err
