"""`gemma-mtp bench-serve` against a server on a socket: what it sends, prints, writes and draws, and bad input."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_server import served
from models import agreeing_pair, letters, save_pair
from rich.console import Console
from test_cli import refused

from gemma_mtp.cli import bench_serve_report, main
from gemma_mtp.datasets import read_examples
from gemma_mtp.engine.pair import bundled_directory
from gemma_mtp.measure import load_plot, load_server
from gemma_mtp.measure.load import ClosedLoop, OpenLoop
from gemma_mtp.measure.load_runs import ratios

BRIEF = ["--requests", "4", "--warmup", "1", "-n", "5"]
QUANTILE = {"value", "low", "high"}
DISTRIBUTION = {"count", "mean", "longest", "quantiles"}
LATENCIES = {"time_to_first_token", "time_per_output_token", "chunk_gap", "end_to_end", "send_delay"}
SUMMARY = {
    "requests", "completed", "refused", "failed", "errors", "mean_retry_after", "seconds", "requests_per_second",
    "output_tokens_per_second", "prompt_tokens", "cached_tokens", "output_tokens", "accepted_drafts", "rejected_drafts",
    "acceptance", *LATENCIES,
}  # fmt: skip


def measured(tmp_path: Path, *arguments: str, code: int = 0) -> dict[str, Any]:
    assert main(["bench-serve", *BRIEF, "--json", str(tmp_path / "out.json"), *arguments]) == code
    assert [path.name for path in tmp_path.glob("*.partial")] == []
    text = (tmp_path / "out.json").read_text(encoding="utf-8")
    read: dict[str, Any] = json.loads(text, parse_constant=pytest.fail)
    return read


def test_json_has_every_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with served() as (url, bodies):
        read = measured(tmp_path, "--url", url, "--rate", "200,400", "--compare-drafting", "-k", "3", "--repeats", "2")
    assert (read["url"], read["model"], read["extent"]) == (url, "tiny", {"requests": 4, "seconds": None, "warmup": 1})
    labels = [f"{rate}/s, {side}" for rate in (200, 400) for side in ("no drafts", "drafts 3")]
    assert [level["label"] for level in read["levels"]] == labels
    assert read["levels"][0]["shape"] == {"kind": "OpenLoop", "rate": 200.0, "equal_gaps": False}
    for level in read["levels"]:
        assert level.keys() == {"label", "shape", "side", "repeats", *SUMMARY}
        assert len(level["repeats"]) == 2
        for summary in (level, *level["repeats"]):
            assert summary.keys() >= SUMMARY
            for name in LATENCIES:
                assert summary[name].keys() == DISTRIBUTION
                assert all(quantile.keys() == QUANTILE for quantile in summary[name]["quantiles"].values())
        assert (level["requests"], level["completed"], level["failed"], level["refused"]) == (8, 8, 0, 0)
        assert (level["output_tokens"], level["prompt_tokens"], level["cached_tokens"]) == (40, 72, 24)
        assert level["acceptance"] == pytest.approx(2 / 3)
    assert [compared["label"] for compared in read["compared"]] == ["200/s", "400/s"]
    assert all(ratio.keys() == {"median", "least", "greatest"} for ratio in read["compared"][0]["ratios"].values())
    assert len(bodies) == 2 * 2 * 2 * 5
    assert [body["draft_tokens"] for body in bodies[:20:5]] == [0, 3, 3, 0]
    out = capsys.readouterr().out
    for text in (*labels, "time to first token", "from due to sent", "drafting on to off", "67%", "p99"):
        assert text in out


def test_bodies_say_what_was_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"text": "abc"}\n{"prompt": "hello"}\n', encoding="utf-8")
    options = ["--api-key", "secret", "--model", "other", "-t", "0.5", "--top-p", "0.9", "--top-k", "7", "--seed", "2"]
    with served() as (url, bodies):
        read = measured(tmp_path, str(prompts), "--url", url, "--clients", "2", "--shared-prefix-tokens", "4", *options)
        assert read["levels"][0]["shape"] == {"kind": "ClosedLoop", "clients": 2}
        assert "records" not in read["levels"][0]
        assert main(["bench-serve", "--url", url, *BRIEF, "--stop-at-eos", "--same-prompts", "-k", "0"]) == 0
    sent, plain = bodies[:5], bodies[5:]
    assert len(plain) == 5
    assert {body["authorization"] for body in sent} == {"Bearer secret"} and plain[0]["authorization"] is None
    assert sorted(body["seed"] for body in sent) == [2, 3, 4, 5, 6]
    for body in sent:
        said = body["prompt"] if "prompt" in body else body["messages"][0]["content"]
        assert said.startswith("abc\n# ") and said.endswith(("abc", "hello"))
        asked = {name: body[name] for name in ("model", "max_tokens", "temperature", "top_p", "top_k", "ignore_eos")}
        assert asked == {"model": "other", "max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "top_k": 7,
                         "ignore_eos": True}  # fmt: skip
    assert {body["path"] for body in sent} == {"/v1/completions", "/v1/chat/completions"}
    assert all("ignore_eos" not in body and body["draft_tokens"] == 0 for body in plain)
    held_out = {example.content for example in read_examples(bundled_directory() / "heldout_prompts.jsonl")}
    assert {body["prompt"] for body in plain} < held_out
    assert "each client sends when its last request is done" in capsys.readouterr().out


def test_records_are_written_where_asked_for(tmp_path: Path) -> None:
    with served() as (url, _):
        (level,) = measured(tmp_path, "--url", url, "--records", "--rate", "100", "--fixed-intervals")["levels"]
    ((*records,),) = level["records"]
    assert [record["number"] for record in records] == [1, 2, 3, 4]
    assert [record["intended"] for record in records] == pytest.approx([0.01, 0.02, 0.03, 0.04])
    for record in records:
        assert record["intended"] <= record["sent"] <= record["chunks"][0] <= record["chunks"][1] <= record["done"]
        assert (record["output_tokens"], record["accepted_drafts"], record["error"]) == (5, 2, None)


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    with served() as (url, _):
        for name in ("a.png", "a.svg"):
            arguments = ["--url", url, *BRIEF, "--rate", "200,400", "--compare-drafting"]
            assert main(["bench-serve", *arguments, "--plot", str(tmp_path / name)]) == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG") and (tmp_path / "a.png").stat().st_size > 20_000
    drawn = (tmp_path / "a.svg").read_text(encoding="utf-8")
    for text in ("Time to first token", "Time per output token", "Throughput", "no drafts", "drafts auto, p50"):
        assert text in drawn
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "a.svg"]


def test_levels_without_a_completed_request_are_drawn_too(tmp_path: Path) -> None:
    from test_load_stats import level, record

    load_plot.plot_load([level([record(error="timeout")])], tmp_path / "a.png")
    assert (tmp_path / "a.png").exists()


def test_too_many_failures_exit_with_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with served(status=500) as (url, _):
        arguments = ["--url", url, "--model", "tiny"]
        read = measured(tmp_path, *arguments, code=1)
        assert (read["levels"][0]["failed"], read["levels"][0]["errors"]) == (4, {"http 500": 4})
        assert "http 500: 4" in capsys.readouterr().out
        measured(tmp_path, *arguments, "--max-failed", "1", code=0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiny")
    save_pair(root, *agreeing_pair(3))
    letters(root / "target")
    return root


@pytest.mark.skipif(importlib.util.find_spec("gemma_mtp.server") is None, reason="needs `gemma-mtp serve`")
def test_a_server_of_our_own_is_started_and_measured(tiny: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"text": "ABCDEF"}\n', encoding="utf-8")
    options = ["--same-prompts", "--clients", "2", "--compare-drafting", "-k", "3"]
    serve = f"--target {tiny / 'target'} --drafter {tiny / 'drafter'} --max-running 1"
    read = measured(tmp_path, str(prompts), "--serve-options", serve, *options, "-n", "12")
    plain, drafted = read["levels"]
    for level in (plain, drafted):
        assert (level["completed"], level["output_tokens"], level["prompt_tokens"]) == (4, 48, 24)
    assert plain["acceptance"] is None and drafted["acceptance"] > 0


def test_a_server_that_can_not_start_is_bad_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command: list[str] = []
    real = load_server.OwnServer

    def failing(given: list[str]) -> load_server.OwnServer:
        command.extend(given)
        return real([sys.executable, "-c", "import sys; sys.exit('no such target')"])

    monkeypatch.setattr(load_server, "OwnServer", failing)
    said = refused(capsys, ["bench-serve", "--serve-options", "--target 'a b' --threads 1"])
    assert "the server ended with code 1 and said: no such target" in said
    assert command[1:] == ["-m", "gemma_mtp", "serve", "--port", "0", "--target", "a b", "--threads", "1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/absent.jsonl"], "/absent.jsonl can not be read"),
        (["--url", "localhost:8000"], "--url is 'localhost:8000', but must be a server's address"),
        (["--url", "http://127.0.0.1:9"], "http://127.0.0.1:9/v1/models can not be reached"),
        (["--url", "http://127.0.0.1:9", "--serve-options", "--threads 1"], "--serve-options are for a server that is"),
        (["--serve-options", "'"], "can not be split into words"),
        (["--rate", "1", "--clients", "1"], "--rate and --clients are loads of two kinds"),
        (["--rate", "1,fast"], "--rate is '1,fast', but must be numbers above 0"),
        (["--rate", "0"], "--rate is '0'"),
        (["--rate", "inf"], "--rate is 'inf'"),
        (["--rate", "nan"], "--rate is 'nan'"),
        (["--clients", "1.5"], "--clients is '1.5'"),
        (["--clients", ""], "--clients is ''"),
        (["--fixed-intervals"], "--fixed-intervals has no effect without --rate"),
        (["--requests", "0"], "--requests is 0, but must be more than 0"),
        (["--duration", "nan"], "--duration is nan"),
        (["--warmup", "-1"], "--warmup is -1, but must be 0 or more"),
        (["--repeats", "0"], "--repeats is 0"),
        (["--limit", "0"], "--limit is 0"),
        (["--rate", "1", "--max-in-flight", "0"], "--max-in-flight is 0"),
        (["--timeout", "0"], "--timeout is 0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--shared-prefix-tokens", "-1"], "--shared-prefix-tokens is -1"),
        (["--output-tokens", "8-4"], "--output-tokens is '8-4'"),
        (["--output-tokens", "0"], "--output-tokens is '0'"),
        (["--output-tokens", "1-2-3"], "--output-tokens is '1-2-3'"),
        (["-k", "many"], "--draft-tokens is 'many'"),
        (["-k", "0", "--compare-drafting"], "--draft-tokens is 0, which --compare-drafting compares with"),
        (["--max-failed", "1.5"], "--max-failed is 1.5"),
        (["--plot", "a.jpeg"], "--plot is a.jpeg, but must end in .png, .svg or .pdf"),
        (["--json", "{here}"], "which is a directory"),
    ],
)
def test_bad_input(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(capsys, ["bench-serve", *(a.replace("{here}", str(tmp_path)) for a in arguments)])


@pytest.mark.parametrize("missing", ["httpx", "httpx_aiohttp"])
def test_it_needs_a_client(missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else object())
    message = f"needs {missing}, which is not installed; run: pip install 'gemma-mtp[bench-serve]'"
    assert message in refused(capsys, ["bench-serve"])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0.0, "0.00ms"), (0.0012345, "1.23ms"), (0.0123, "12.3ms"), (0.99951, "1.00s"), (0.9994, "999ms"),
     (0.09999, "100ms"), (12.34, "12.3s"), (123.4, "123s")],
)  # fmt: skip
def test_durations_have_three_digits(seconds: float | None, text: str) -> None:
    assert bench_serve_report._duration(seconds) == text


@pytest.mark.parametrize("shape", [OpenLoop(0.25), ClosedLoop(128)])
@pytest.mark.parametrize("repeats", [1, 3])
def test_tables_fit_80_columns(shape: OpenLoop | ClosedLoop, repeats: int) -> None:
    """No row is broken, no number cut, and a single repetition has no spread."""
    from test_load_stats import level, record

    records = [record(i, i / 100, 1.0 + i / 1000, accepted_drafts=3, rejected_drafts=1, output_tokens=12345,
                      prompt_tokens=54321, cached_tokens=54321) for i in range(400)]  # fmt: skip
    failed = [record(error=kind) for kind in ("timeout", "connection lost", "http 500", "an answer without an end")]
    names = ("no drafts", "drafts auto")
    sides = [level(*[[*records, *failed]] * repeats, shape=shape, side=side) for side in names]
    console = Console(width=80, file=io.StringIO(), force_terminal=False)
    bench_serve_report.print_report(console, sides, [(shape.label, ratios(*sides))])
    assert isinstance(console.file, io.StringIO)
    out = console.file.getvalue()
    lines = out.splitlines()
    assert "…" not in out and "75%" in out and max(map(len, lines)) <= 80
    assert out.count("1.00x (1.00 to 1.00)") == (5 if repeats > 1 else 0) and out.count("1.00x") == 5
    latencies = 5 if isinstance(shape, OpenLoop) else 4
    for side in sides:  # throughput, failures, latencies, and intervals of those whose values are independent
        rows = [line for line in lines if side.label in line]
        assert len(rows) == 2 + latencies + latencies - 1
    for title in ("time to first token", "95% confidence", "timeout: ", "http 500: "):
        assert title in out
