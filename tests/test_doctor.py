"""`gemma-mtp doctor`: what it finds of the machine, and faults of a pair that are made on purpose."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gemma_mtp.backend.native import native_available
from gemma_mtp.backend.select import make_backend
from gemma_mtp.cli import main
from gemma_mtp.cli.doctor import ExaminedPair
from gemma_mtp.cli.doctor_checks import _gpu_checks, as_loaded, machine_checks, pair_checks
from gemma_mtp.cli.options import spread
from gemma_mtp.config import FULL, TextConfig
from gemma_mtp.engine.pair import Pair, bundled_directory, load_pair
from gemma_mtp.measure.acceptance import GREEDY, Prompt, measure_acceptance, prompts_of
from gemma_mtp.measure.diagnosis import (
    Finding,
    Written,
    compare_shares,
    diagnose,
    explains,
    first_drafts,
    knows_something,
    surely_above,
    write,
)
from gemma_mtp.measure.plan_models import planned
from gemma_mtp.model.drafter import Drafter
from gemma_mtp.weight_types import WeightTypes
from gemma_mtp.weights.matrix import Linear


@pytest.fixture
def pair() -> Pair:
    return load_pair(dtype="float32")


@pytest.fixture(autouse=True)
def little_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half as much as a user's is measured on, and fewer prompts of the command's: what is made wrong shows in it."""
    monkeypatch.setattr("gemma_mtp.measure.diagnosis.WRITTEN_TOKENS", 48)
    monkeypatch.setattr("gemma_mtp.cli.doctor_run.PROMPTS", 2)
    monkeypatch.setattr("gemma_mtp.cli.doctor_run.PROMPT_TOKENS", 96)


def heldout(tokens: int) -> list[Prompt]:
    files = [bundled_directory() / "heldout_prompts.jsonl"]
    return prompts_of(load_pair(use_drafter=False), spread(files, "*", 2), tokens)


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return heldout(96)


@pytest.fixture(scope="module")
def written(prompts: list[Prompt]) -> Written:
    """What the target writes in order. No test that takes it changes the target's weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gemma_mtp.measure.diagnosis.WRITTEN_TOKENS", 48)
        return write(load_pair(dtype="float32"), prompts)


def found(findings: list[Finding]) -> Iterator[tuple[str, str]]:
    return ((finding.name, finding.verdict) for finding in findings)


def test_a_pair_in_order(pair: Pair, prompts: list[Prompt]) -> None:
    told: list[str] = []
    verdicts = dict(found(diagnose(pair, write(pair, prompts, told.append), prompts, told.append)))
    assert told[:2] == ["the target writes text 1 of 2", "the target writes text 2 of 2"] and len(told) > 2
    assert verdicts == {
        "first drafts": "in order", "donor layers": "not it", "sliding window": "not it",
        "the drafter itself": "not it", "the target's fine-tune": "not it",
    }  # fmt: skip


def test_first_drafts_are_accepted_as_in_the_engine(pair: Pair, prompts: list[Prompt], written: Written) -> None:
    """The engine's rounds of one draft see the same positions where every second one is a bonus token; both shares are
    of some hundred drafts."""
    share = float(first_drafts(pair, written).double().mean())
    engine = measure_acceptance(pair, prompts, 1, replace(GREEDY, max_tokens=96)).pooled
    assert share == pytest.approx(engine.by_position[0], abs=0.08)


def test_a_wrong_window_is_found(pair: Pair, prompts: list[Prompt], written: Written) -> None:
    assert pair.drafter is not None
    config = pair.drafter.config
    pair.drafter.config = replace(config, text=replace(config.text, sliding_window=2))
    findings = diagnose(pair, written, prompts)
    assert dict(found(findings))["sliding window"] == "cause"
    assert "restore sliding_window" in findings[2].advice


def test_wrong_donor_layers_are_found(
    pair: Pair, prompts: list[Prompt], written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The drafter is sent to another full layer; the target goes on as it did."""
    config = pair.target.config
    donors = config.donor_layers
    shared = {i: donors[kind] for i, kind in enumerate(config.layer_types) if config.is_kv_shared(i)}
    other = next(i for i in range(config.first_kv_shared_layer) if not config.is_sliding(i) and i != donors[FULL])
    monkeypatch.setattr(TextConfig, "kv_layer", lambda self, layer: shared.get(layer, layer))
    monkeypatch.setitem(config.__dict__, "donor_layers", {**donors, FULL: other})
    findings = diagnose(pair, written, prompts)
    assert dict(found(findings))["donor layers"] == "cause", findings
    assert f"with layer {donors[FULL]} in place of {other} (full_attention)" in findings[1].measured
    assert "restore layer_types" in findings[1].advice


def test_another_fine_tune_is_found(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A target that says another token in two of three cases, in the same state: the drafter still knows the text."""
    prompts = heldout(160)
    monkeypatch.setattr("gemma_mtp.measure.diagnosis.WRITTEN_TOKENS", 96)  # as much as of a user's
    target = pair.target
    table = target.embed_tokens.weight
    rows = torch.arange(len(table))
    moved = (rows % 3 != 2) & (rows < len(table) - 1)
    head = Linear(table.shape[1], len(table))
    head.weight = torch.nn.Parameter(table[torch.where(moved, rows - rows % 3 + (rows % 3 + 1) % 2, rows)], False)
    target.lm_head = head
    pair.backend = make_backend(target, pair.drafter)
    findings = diagnose(pair, write(pair, prompts), prompts)
    assert dict(found(findings))["the target's fine-tune"] == "cause", findings
    assert dict(found(findings))["the drafter itself"] == "not it", findings
    assert "another fine-tune" in findings[4].advice


@pytest.mark.parametrize("seed", [0, 1])
def test_a_drafter_that_knows_nothing_has_no_other_cause(
    seed: int, pair: Pair, prompts: list[Prompt], written: Written
) -> None:
    """Random weights guess one token everywhere, or nothing; other layers' keys and values make another guess of it."""
    assert pair.drafter is not None
    torch.manual_seed(seed)
    stranger = Drafter(pair.drafter.config).eval().requires_grad_(False)
    for parameter in stranger.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    pair.backend = make_backend(pair.target, stranger)
    findings = diagnose(pair, written, prompts if seed == 0 else ())
    causes = [finding.name for finding in findings if finding.verdict == "cause"]
    assert causes == ["first drafts", "the drafter itself"], findings
    assert "untrained, damaged or of another model" in findings[3].advice


def test_a_drafter_that_knows_little_is_to_be_trained(pair: Pair, prompts: list[Prompt], written: Written) -> None:
    assert pair.drafter is not None
    torch.manual_seed(0)
    for name, parameter in pair.drafter.named_parameters():
        if "post_projection" not in name and parameter.ndim > 1:
            parameter.add_(0.65 * parameter.std() * torch.randn_like(parameter))
    pair.backend = make_backend(pair.target, pair.drafter)
    findings = diagnose(pair, written, prompts)
    assert dict(found(findings))["the drafter itself"] == "cause", findings
    assert "train it longer" in findings[3].advice


def test_differences_must_be_sure() -> None:
    few, half = torch.tensor([True, False, False, False]), torch.tensor([True, True, False, False])
    assert not explains(few, half)
    assert explains(few.repeat(50), half.repeat(50))
    assert not explains(half.repeat(50), few.repeat(50))
    none, some = torch.zeros(400, dtype=torch.bool), torch.arange(400) < 80
    assert not explains(none, some)  # a fifth is no drafter that fits
    for times, verdict in ((1, "not it"), (100, "cause")):
        assert compare_shares("x", few.repeat(times), half.repeat(times), "a", "b", "do").verdict == verdict
    assert compare_shares("x", none, some, "a", "b", "do").verdict == "not it"


def test_the_best_of_many_alternatives_is_rarely_chance() -> None:
    """Of 1000 questions with 20 alternatives each, all as good as what there is: false alarms stay within the bound,
    which a bound that leaves out how many were tried breaks."""
    generator = torch.Generator().manual_seed(0)
    differences = torch.randint(-1, 2, (1000, 20, 400), generator=generator)
    best = differences[torch.arange(1000), differences.sum(-1).argmax(-1)]
    alarms = sum(surely_above(row, 0.0, 20) for row in best)
    assert alarms <= 22  # 1% are 10; a binomial is above 22 once in 10,000 times
    assert sum(surely_above(row) for row in best) > 100


def test_who_says_one_thing_everywhere_knows_nothing() -> None:
    choices = torch.tensor([7, 7, 7, 1, 2, 3] * 50)
    says_seven = choices == 7
    assert not knows_something(choices, [says_seven, choices == 1])
    assert knows_something(choices, [says_seven, says_seven | (choices == 1)])
    assert not knows_something(torch.arange(300), [torch.arange(300) < 20])  # more than one guess, and next to none
    assert not knows_something(torch.arange(0), [])


def test_the_command_without_a_pair(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", "--json"])
    read = json.loads(capsys.readouterr().out)
    names = [check["name"] for check in read["checks"]]
    for name in ("processor", "operators", "threads", "memory", "memory bandwidth", "other work", "versions", "extras"):
        assert name in names
    problems = [check for check in read["checks"] if check["status"] == "problem"]
    assert code == (1 if problems else 0)
    assert all(check["advice"] for check in problems)
    assert read["diagnosis"] == []


def test_the_fallback_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemma_mtp.cli.doctor_checks.native_available", lambda: False)
    monkeypatch.setenv("GEMMA_MTP_NATIVE", "0")
    (check,) = (check for check in machine_checks() if check.name == "operators")
    assert (check.status, check.advice) == ("problem", "unset GEMMA_MTP_NATIVE")
    assert "GEMMA_MTP_NATIVE is 0" in check.found


def test_memory_is_counted_and_looked_up_on_the_device_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU keeps bfloat16 where the native operators keep float32, and has its own free memory."""
    asked = list[torch.device]()

    def free(device: torch.device) -> int:
        asked.append(device)
        return 1000

    monkeypatch.setattr("gemma_mtp.cli.doctor_checks.device_free_bytes", free)
    monkeypatch.setattr("gemma_mtp.cli.doctor_checks.choose_device", torch.device)
    found = {}
    for device in ("cpu", "cuda"):
        check = pair_checks(ExaminedPair(target=Path("bundled"), device=device))[0]
        assert (check.name, check.status) == ("fits into memory", "problem")
        assert f"on {device}, but 1.00 kB are free" in check.found
        assert check.advice == f"see what fits: gemma-mtp plan bundled --device {device}"
        run = as_loaded(planned("bundled"), WeightTypes(), torch.device(device), torch.bfloat16)
        found[device] = run.operators, run.kv_bytes
    assert asked == [torch.device("cpu"), torch.device("cuda")]
    assert found["cuda"] == ("reference", 2)
    assert found["cpu"] == (("reference", 2) if not native_available() else ("native", 4))


def test_the_command_with_a_pair(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--target", "bundled", "--quantize", "int8"]) in (0, 1)
    out = capsys.readouterr().out
    assert "drafter: bundled: fits the target" in out
    assert "weights: target int8, embeddings int8, drafter int8, drafter-head int8" in out
    assert "first drafts: in order" in out
    assert "the target's quantisation: not it" in out


def test_it_says_which_operators_a_card_would_run_and_why_not_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An old card, and one that could run the Triton kernels; with them asked for and not."""
    capabilities = [(7, 5), (9, 0)]
    for name, value in {
        "is_available": lambda: True, "device_count": lambda: 2, "mem_get_info": lambda i: (1 << 30, 2 << 30),
        "get_device_name": lambda i: f"card {i}", "get_device_capability": lambda device: capabilities[device.index],
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr("gemma_mtp.backend.cuda.usable.importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("gemma_mtp.backend.cuda.usable.shutil.which", lambda name: "/usr/bin/cc")
    monkeypatch.setattr("gemma_mtp.backend.cuda.usable.sysconfig.get_path", lambda name, scheme: str(tmp_path))
    (tmp_path / "Python.h").touch()
    first = SimpleNamespace(failed_launch=lambda device: None)
    monkeypatch.setitem(sys.modules, "gemma_mtp.backend.cuda.probe", first)
    monkeypatch.delenv("GEMMA_MTP_CUDA", raising=False)
    old, new = (check for check in _gpu_checks() if check.name.startswith("operators of GPU"))
    assert (old.status, new.status) == ("note", "note")
    assert "compute capability 7.5, and bf16 products need 8.0" in old.found
    assert new.found.startswith("PyTorch's") and "GEMMA_MTP_CUDA=1" in new.advice
    monkeypatch.setenv("GEMMA_MTP_CUDA", "1")
    old, new = (check for check in _gpu_checks() if check.name.startswith("operators of GPU"))
    assert old.found.startswith("PyTorch's") and new.found.startswith("Triton kernels") and new.status == "ok"
