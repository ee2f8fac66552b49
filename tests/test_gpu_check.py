"""`benchmarks/gpu_check.py` without a card: its comparisons at small sizes, interpreted, and that they can fail."""

from __future__ import annotations

import json
from pathlib import Path

import gpu_calls
import gpu_check
import gpu_run
import pytest
import torch
from gpu_check import check_attention, check_instructions, check_model, check_product
from gpu_run import Run
from gpu_scale import full, tiny
from recorded_launches import META, Recorder
from tensor_core import Interpreter
from tensor_core_model import CORES
from test_cuda_rows import careless
from torch import Tensor

from gemma_mtp.backend.cuda.models import DeviceDrafter, DeviceTarget, ropes_of
from gemma_mtp.backend.cuda.weights import DeviceWeight
from gemma_mtp.config import PRESETS
from gemma_mtp.model.drafter import Drafter


def interpreted(core: str = "Hopper") -> Run:
    torch.manual_seed(3)
    return Run(torch.device("cpu"), Interpreter(CORES[core]), tiny())


def test_products_and_attention_compare_bits() -> None:
    run = interpreted()
    for product in gpu_check.products_of(run):
        check_product(run, "fp8" if product else "int8", 40, 192, (1, 2, 17), product=product)
    for context in (1, 33):
        check_attention(run, 4, 2, 16, 40, context)
    assert [line.differing for line in run.lines] == [0] * 7
    assert all(line.compared > 0 for line in run.lines)


@pytest.mark.parametrize("core", CORES)
def test_instructions_and_the_model(core: str) -> None:
    """The interpreter's products are the model's, so none may differ; those of the other model do."""
    run = interpreted(core)
    check_instructions(run, 8, 64)
    check_model(run, core, 8, 256)
    assert run.lines[0].compared == 128 * 8 and run.lines[0].differing == 0
    assert run.lines[1].note == "0 of 128 differ"
    check_model(run, next(other for other in CORES if other != core), 8, 256)
    assert not run.lines[2].note.startswith("0 ")


def test_a_product_that_follows_the_rows_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def cut_by_rows(launch: Interpreter, x_RK: Tensor, weight: DeviceWeight) -> Tensor:
        return careless(launch, x_RK, weight)[None]

    monkeypatch.setattr(gpu_check, "linear", cut_by_rows)
    run = interpreted()
    check_product(run, "bf16", 40, 576, (1, 2, 17))
    (line,) = run.lines
    assert line.differing > line.compared / 10


def test_without_a_card_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main([]) == 2
    assert "there is no NVIDIA card" in capsys.readouterr().err


@pytest.mark.parametrize(("size", "gigabytes"), [("E2B", 4.56 + 0.04), ("12B", 23.81 + 0.35), ("31B", 61.39 + 0.92)])
def test_a_call_reads_what_the_design_says(size: str, gigabytes: float) -> None:
    """Weights and keys and values of one row at 1,024 rows, as the table of floors has them; nothing is allocated."""
    text = PRESETS[f"gemma-4-{size}-it"].text
    target = DeviceTarget(gpu_calls.random_target(text, "none", META))
    assert gpu_calls.bytes_read(target, 1, 1024) / 1e9 == pytest.approx(gigabytes, rel=0.02)


def test_calls_of_the_sizes_are_made() -> None:
    for size, weights in (("E2B", "none"), ("31B", "int8")):
        whole = PRESETS[f"gemma-4-{size}-it"].text
        text = gpu_calls.shortened(whole, 2e10)
        assert (text is whole) == (size == "E2B")
        target = DeviceTarget(gpu_calls.random_target(text, weights, META))
        batch, pool = gpu_calls.batch_of(text, 5, 2, 1024, META)
        record = Recorder()
        assert target.forward(record, batch, pool, ropes_of(text, 2000, META)).shape == (10, text.hidden_size)
        assert record.kernels


def test_a_drafter_reads_what_the_design_says() -> None:
    """GPU.md's table of drafter steps, in GB."""
    for size, gigabytes in (("E2B", 0.023), ("12B", 0.846), ("31B", 0.939)):
        text, config = full().models[size]
        target = DeviceTarget(gpu_calls.random_target(gpu_calls.shortened(text, 3e9), "none", META))
        with META:
            drafter = Drafter(config).bfloat16()
        assert gpu_calls.drafted_bytes(DeviceDrafter(drafter, target)) / 1e9 == pytest.approx(gigabytes, rel=0.05)


def test_the_budgets_leave_room_within_ten_minutes() -> None:
    assert sum(gpu_check.BUDGETS.values()) <= 540


@pytest.mark.parametrize(
    ("parts", "lines"),
    [
        (("1",), 3),
        pytest.param(("3",), 10, marks=pytest.mark.slow),
        pytest.param(("2",), 11, marks=pytest.mark.slow), pytest.param(("4",), 9, marks=pytest.mark.slow),
        pytest.param(("5",), 20, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_parts_run(parts: tuple[str, ...], lines: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole program without a card, with a table and a record at the end."""
    assert gpu_check.main(["--interpret", "--json", str(tmp_path / "out.json"), "--parts", *parts]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert len(found) >= lines
    assert sum(line["differing"] for line in found) == 0
    assert "numbers differ" in capsys.readouterr().out
    if "5" in parts:
        rounds = [line for line in found if "round of" in line["what"]]
        assert {line["what"].split(" x ")[1] for line in rounds} == {"0 drafts", "2 drafts"}
        assert all("1.0 host waits" in line["note"] for line in rounds)


def test_a_mismatch_is_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing else: not the speed, nor what does not fit."""

    def differing(run: Run) -> None:
        run.lines.append(gpu_run.Line(1, "bits", 10, 1))

    def too_large(run: Run) -> None:
        run.timed(2, "slow", 1e9, 1.0)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu_check, "PARTS", {1: differing, 2: too_large})
    assert gpu_check.main(["--interpret", "--parts", "2"]) == 0
    assert gpu_check.main(["--interpret", "--parts", "1", "2"]) == 1
