"""`gemma-mtp acceptance`: its JSON, tables and picture, and one sentence for every kind of bad input."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from models import agreeing_pair, letters, random_drafter, save_pair
from rich.console import Console
from test_cli import refused

from gemma_mtp.checkpoint import save_drafter
from gemma_mtp.cli import acceptance_report, main
from gemma_mtp.cli.options import spread
from gemma_mtp.cpu_clock import CpuClock
from gemma_mtp.datasets import read_examples
from gemma_mtp.decoding.params import ChoiceKind, SamplingParams
from gemma_mtp.decoding.round_costs import RoundCosts
from gemma_mtp.engine.pair import Pair, bundled_directory, load_pair
from gemma_mtp.errors import DataError
from gemma_mtp.measure import plot, speedup
from gemma_mtp.measure.acceptance import GREEDY, Acceptance, AcceptanceReport, PromptAcceptance, measure_acceptance
from gemma_mtp.measure.acceptance import prompts_of as to_prompts

TEMPLATE = "{% if enable_thinking %}HM{% endif %}{% for m in messages %}{{ m['content'] }}{% endfor %}"
BRIEF = ["-n", "16", "-k", "3"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair with a tokenizer of letters and a chat template with a switch for thinking, and a drafter that knows
    nothing, `stranger`."""
    root = tmp_path_factory.mktemp("tiny")
    save_pair(root, *agreeing_pair(3))
    stranger = random_drafter(seed=9)
    save_drafter(stranger, stranger.config, root / "stranger")
    letters(root / "target")
    (root / "target" / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    settings = {"temperature": 1.5, "top_k": 7, "top_p": 0.8, "suppress_tokens": [9], "eos_token_id": [5]}
    (root / "target" / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    entries = [{"prompt": "ABCD"[i % 4] * 3 + "EF", "task": ("odd", "even")[i % 2]} for i in range(6)]
    (root / "chat.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries), encoding="utf-8")
    (root / "text.txt").write_text("ABC\nDEF\n", encoding="utf-8")
    return root


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without other work, whatever runs beside the tests."""
    monkeypatch.setattr(CpuClock, "share_elsewhere", lambda self: 0.0)


def steady(seconds: dict[int, float], busy: float = 0.0) -> speedup.SteadyCosts:
    costs = RoundCosts(seconds)
    return speedup.SteadyCosts(costs, (costs,), busy)


def models(root: Path) -> list[str]:
    return ["--target", str(root / "target"), "--drafter", str(root / "drafter")]


def content(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["acceptance", "--json", *arguments]) == 0
    read: dict[str, Any] = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    return read


def test_json_of_the_bundled_pair_is_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    read = content(capsys, "--limit", "2", "-n", "16", "-t", "0", "-t", "0.7", "--seed", "3")
    pair = load_pair()
    file = bundled_directory() / "heldout_prompts.jsonl"
    assert read["data"] == [str(file)]
    prompts = to_prompts(pair, spread([file], "*", 2))
    assert [s["label"] for s in read["settings"]] == ["greedy", "temperature 0.7"]
    for setting, temperature in zip(read["settings"], (0.0, 0.7), strict=True):
        params = replace(GREEDY, temperature=temperature, seed=3, max_tokens=16)
        expected = measure_acceptance(pair, prompts, 4, params).to_dict()
        assert {name: setting[name] for name in expected} == json.loads(json.dumps(expected))
        lengths = [row["expected_length"] for row in setting["predicted"]]
        assert lengths[4] == pytest.approx(setting["mean_acceptance_length"])
        costs = setting["round_seconds_by_draft_tokens"]
        for row, seconds in zip(setting["predicted"], costs, strict=False):
            assert row["cost"] == pytest.approx(seconds / costs[0])
        fastest = max(row["speedup"] for row in setting["predicted"])
        assert setting["predicted"][setting["best_draft_tokens"]]["speedup"] == fastest
        assert setting["predicted"][setting["break_even_draft_tokens"]]["speedup"] >= 1


def test_conversations_are_sampled_as_the_checkpoint_says_with_and_without_thinking(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[tuple[int, ...], SamplingParams]] = []
    real = Pair.generate

    def record(self: Pair, prompt: Any, params: SamplingParams, **rest: Any) -> Any:
        seen.append((tuple(prompt), params))
        return real(self, prompt, params, **rest)

    monkeypatch.setattr(Pair, "generate", record)
    arguments = [str(tiny / "chat.jsonl"), *models(tiny), *BRIEF, "-t", "0.7"]
    read = content(capsys, *arguments, "--thinking", "both")
    assert [(s["label"], s["thinking"]) for s in read["settings"]] == [
        ("temperature 0.7, thinking off", False), ("temperature 0.7, thinking on", True),
    ]  # fmt: skip
    assert list(read["settings"][0]["by_task"]) == ["odd", "even"]
    off, on = seen[:6], seen[6:]
    assert all(long[-5:] == short and len(long) == 7 for (long, _), (short, _) in zip(on, off, strict=True))
    for i, (_, params) in enumerate(off):
        assert params == SamplingParams(
            temperature=0.7, top_k=7, top_p=0.8, seed=i, max_tokens=16, logit_bias={9: float("-inf")}
        )
    seen.clear()
    content(capsys, *arguments, "--top-k", "0", "--top-p", "1", "--ignore-eos", "--limit", "1")
    assert [(p.top_k, p.top_p, p.ignore_eos) for _, p in seen] == [(0, 1.0, True)]
    seen.clear()
    content(capsys, str(tiny / "text.txt"), *models(tiny), *BRIEF, "-t", "1")
    assert [p for _, p in seen] == [SamplingParams(temperature=1.0, max_tokens=16, ignore_eos=True)]


def test_each_setting_is_weighed_with_the_costs_of_its_own_rounds(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Costs made up: drafts are free where the arg max is taken, and cost a step each where tokens are drawn."""
    dear = RoundCosts({0: 2.0, 4: 10.0})
    made_up: dict[ChoiceKind, RoundCosts] = {"argmax": RoundCosts({0: 1.0, 4: 1.0}), "drawn": dear, "processed": dear}
    asked: list[ChoiceKind] = []

    def measure(backend: object, choice: ChoiceKind) -> RoundCosts:
        asked.append(choice)
        return made_up[choice]

    monkeypatch.setattr(speedup, "measure_costs", measure)
    arguments = [str(tiny / "text.txt"), *models(tiny), *BRIEF, "-t", "0", "-t", "0.5", "-t", "1"]
    greedy, *drawn = content(capsys, *arguments)["settings"]
    assert sorted(asked) == ["argmax"] * 5 + ["drawn"] * 5, "each kind is measured once"
    assert [row["cost"] for row in greedy["predicted"][:5]] == [1.0] * 5
    assert greedy["round_seconds_by_draft_tokens"][:5] == [1.0] * 5
    for setting in drawn:
        assert [row["cost"] for row in setting["predicted"][:5]] == [1.0, 2.0, 3.0, 4.0, 5.0]
        assert setting["break_even_draft_tokens"] == setting["best_draft_tokens"] == 0
    assert greedy["break_even_draft_tokens"] >= 4
    # greedy conversations of this checkpoint choose by biased logits, and so by what processing rounds cost
    (chat,) = content(capsys, str(tiny / "chat.jsonl"), *models(tiny), *BRIEF, "-t", "0")["settings"]
    assert chat["predicted"][1]["cost"] == 2.0
    assert main(["acceptance", *arguments]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    (row,) = (row for row in rows if row[:2] == ["2", "1.00"])
    assert (row[4], row[7]) == ("3.00", "3.00")


def test_against_another_drafter_and_with_speeds(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(tiny / "chat.jsonl"), *models(tiny), *BRIEF, "-t", "0", "--ignore-eos", "--speed"]
    (setting,) = content(capsys, *arguments, "--against", str(tiny / "stranger"))["settings"]
    against = setting["against"]
    assert against["after"] == setting["mean_acceptance_length"] > against["before"]
    assert 0 < against["low"] <= against["difference"] <= against["high"]
    speeds = setting["measured_speedup"]
    assert speeds["ratio"] == pytest.approx(speeds["drafted_tokens_per_second"] / speeds["plain_tokens_per_second"])
    assert main(["acceptance", *arguments, "--against", str(tiny / "stranger")]) == 0
    out = capsys.readouterr().out
    assert "against the other drafter's" in out and "; measured at 3 drafts: " in out


def test_the_tables_say_what_was_measured(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(tiny / "chat.jsonl"), *models(tiny), *BRIEF, "-t", "0", "--ignore-eos"]
    (setting,) = content(capsys, *arguments)["settings"]
    assert main(["acceptance", *arguments]) == 0
    out = capsys.readouterr().out
    assert out.startswith("6 prompts, 3 drafts a round, exact verification\n")
    rows = [line.split() for line in out.splitlines()]
    length, drafts = setting["mean_acceptance_length"], setting["mean_accepted_drafts"]
    assert ["greedy", "96", str(setting["num_spec_steps"]), f"{length:.2f}", f"{drafts:.2f}"] in rows
    for name in ("conditional_acceptance_by_position", "joint_acceptance_by_position"):
        assert ["greedy", *(f"{share:.2f}" for share in setting[name])] in rows
    shares = [rounds / setting["num_spec_steps"] for rounds in setting["acceptance_histogram"].values()]
    assert ["greedy", *(f"{share:.2f}" for share in shares)] in rows
    for task, own in setting["by_task"].items():
        assert [task, f"{own['mean_acceptance_length']:.2f}"] in rows
    assert any(row[:1] == ["8"] and len(row) == 4 for row in rows) and "* positions beyond those measured" in out


def test_long_lists_of_tasks_show_the_worst(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(acceptance_report, "MOST_TASKS", 2)
    prompts = tuple(PromptAcceptance(str(i), f"task{i}", 1, 1, Acceptance((10 - i, i))) for i in range(4))
    report = AcceptanceReport(1, GREEDY, "exact", prompts)
    measured = acceptance_report.Measured("greedy", None, report, steady({0: 1.0, 1: 3.0}), None, None)
    acceptance_report.print_report(Console(), [measured])
    out = capsys.readouterr().out
    assert "task0" in out and "task1" in out and "task2" not in out and "and 2 better ones" in out
    assert "drafting does not pay here" in out


def test_the_picture_is_drawn(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(tiny / "chat.jsonl"), *models(tiny), *BRIEF, "--ignore-eos"]
    for name in ("a.png", "a.svg"):
        assert main(["acceptance", *arguments, "--plot", str(tmp_path / name)]) == 0
    capsys.readouterr()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG") and (tmp_path / "a.png").stat().st_size > 20_000
    drawn = (tmp_path / "a.svg").read_text(encoding="utf-8")
    for text in ("conditional", "joint", "without the target's own token", "with the target's own token", "Predicted"):
        assert text in drawn
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "a.svg"]


def test_examples_are_spread_evenly(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(f'{{"text": "{i}"}}\n' for i in range(10)), encoding="utf-8")
    assert [e.content for e in spread([file], "*", 4)] == ["0", "2", "5", "7"]
    assert spread([file], "*", 10) == spread([file], "*", 99) == list(read_examples(file))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/absent.jsonl"], "/absent.jsonl can not be read"),
        (["{root}/bad.jsonl"], "bad.jsonl:2 is not valid JSON"),
        (["{root}/text.txt", "{root}/chat.jsonl"], "text.txt is text among prompts or messages"),
        (["{root}", "--pattern", "*.rs"], "has no text file of the pattern '*.rs'"),
        (["--limit", "0"], "--limit is 0"),
        (["--prompt-tokens", "1"], "--prompt-tokens is 1"),
        (["--threads", "0"], "--threads is 0"),
        (["--thinking", "maybe"], "--thinking is 'maybe'"),
        (["--thinking", "on"], "--thinking needs a chat template that asks for enable_thinking"),
        (["--quantize", "int3"], "int3"),
        (["-k", "0"], "draft_tokens is 0"),
        (["-k", "4", "-n", "5"], "max_tokens is 5, but must be at least 6"),
        (["-t", "-1"], "temperature is -1"),
        (["--verification", "loose"], "verification is 'loose'"),
        (["--target", "{root}/target"], "acceptance needs a drafter"),
        (["--against", "{root}/drafter"], "hidden_size"),
        (["--plot", "a.jpeg"], "--plot is a.jpeg, but must end in .png, .svg or .pdf"),
        (["--plot", "/absent/a.png"], "its directory does not exist"),
    ],
)
def test_bad_input(arguments: list[str], message: str, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tiny / "bad.jsonl").write_text('{"text": "A"}\n{oops\n', encoding="utf-8")
    filled = [argument.replace("{root}", str(tiny)) for argument in arguments]
    assert message in refused(capsys, ["acceptance", *filled])


def test_a_picture_needs_matplotlib_and_a_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'gemma-mtp[plot]'" in refused(capsys, ["acceptance", "--plot", str(tmp_path / "a.png")])
    monkeypatch.undo()
    report = AcceptanceReport(1, GREEDY, "exact", (PromptAcceptance("a", "a", 1, 1, Acceptance((1, 1))),))
    (tmp_path / "a.png").mkdir()
    with pytest.raises(DataError, match=r"a\.png can not be written: Is a directory"):
        plot.plot_acceptance({"greedy": report}, tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_costs_of_a_busy_machine_are_measured_again_and_predict_nothing(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    costs = iter([RoundCosts({0: 1.0, 4: 1.0 + n / 10}) for n in range(1000)])
    monkeypatch.setattr(speedup, "measure_costs", lambda backend, choice: next(costs))
    shares = iter([0.5, 0.3, 0.4, 0.2, 0.05, 0.9])
    monkeypatch.setattr(CpuClock, "share_elsewhere", lambda self: next(shares))
    pair = load_pair()
    busy = speedup.steady_costs(pair, "argmax", repeats=2)
    assert (busy.busy, busy.disturbed) == (0.3, True)
    assert busy.measured[0].seconds[4] == pytest.approx(1.2), "the second attempt, the quietest of three"
    quiet = speedup.steady_costs(pair, "argmax", repeats=2)
    assert (quiet.busy, quiet.disturbed) == (0.05, False)
    assert list(quiet.relative(4)) == pytest.approx([1.8, 1.9])
    monkeypatch.setattr(CpuClock, "share_elsewhere", lambda self: 0.4)
    (setting,) = content(capsys, str(tiny / "text.txt"), *models(tiny), *BRIEF, "-t", "0")["settings"]
    assert (setting["costs_disturbed"], setting["best_draft_tokens"], setting["break_even_draft_tokens"]) == (
        True,
        None,
        None,
    )
    assert main(["acceptance", str(tiny / "text.txt"), *models(tiny), *BRIEF, "-t", "0"]) == 0
    out = capsys.readouterr().out
    assert "no speed-up is predicted: other work took 40% of the processor" in out
    assert "fastest with" not in out and "breaks even" not in out


def test_a_prediction_has_bounds() -> None:
    """Of two prompts, one accepts all and one nothing; the costs of a round with a draft were between 1.5 and 2."""
    prompts = tuple(PromptAcceptance(str(n), "", 1, 10, Acceptance((10 * (1 - n), 10 * n))) for n in (0, 1))
    report = AcceptanceReport(1, GREEDY, "exact", prompts)
    cheap, dear = RoundCosts({0: 1.0, 1: 1.5}), RoundCosts({0: 1.0, 1: 2.0})
    plain, drafted, *_ = speedup.speedup_intervals(report, speedup.SteadyCosts(cheap, (cheap, dear)))
    assert (plain.low, plain.high) == (1.0, 1.0)
    assert [drafted.low, drafted.high] == pytest.approx([1 / 2, 2 / 1.5])
    assert plain.sure and not drafted.sure
    measured = acceptance_report.Measured("greedy", None, report, steady({0: 1.0, 1: 1.2}), None, None)
    assert "which may be no gain" in acceptance_report._verdict(measured)
