"""`benchmarks/gpu_check.py` without a card: its comparisons at small sizes, interpreted, and that they can fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import gpu_calls
import gpu_check
import pytest
import torch
from gpu_check import check_attention, check_instructions, check_model, check_product
from gpu_run import EagerReplays, Line, Run
from gpu_scale import full, tiny
from gpu_watch import watch
from recorded_launches import META, Recorder
from rich.console import Console
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


def test_without_a_card_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--alone", "1"]) == 0
    (said,) = capsys.readouterr().out.splitlines()

    def refusing(command: list[str], seconds: float, on_line: Callable[[str], None]) -> None:
        on_line(said)

    monkeypatch.setattr(gpu_check, "watch", refusing)
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
    """Even where every part is killed in the end."""
    assert sum(gpu_check.BUDGETS.values()) + len(gpu_check.BUDGETS) * gpu_check.GRACE <= 590


@pytest.mark.parametrize(
    ("part", "lines"),
    [
        (1, 3), pytest.param(3, 10, marks=pytest.mark.slow), pytest.param(2, 11, marks=pytest.mark.slow),
        pytest.param(4, 9, marks=pytest.mark.slow), pytest.param(5, 20, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_part_runs(part: int, lines: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a card; each line is said as soon as it is known."""
    assert gpu_check.main(["--interpret", "--alone", str(part)]) == 0
    where, *found = map(json.loads, capsys.readouterr().out.splitlines())
    assert where["where"].startswith("Triton's interpreter")
    assert len(found) >= lines and {line["part"] for line in found} == {part}
    assert sum(line["differing"] for line in found) == 0 and not any(line["failed"] for line in found)
    if part == 5:
        rounds = [line for line in found if "round of" in line["what"]]
        assert {line["what"].split(" x ")[1] for line in rounds} == {"0 drafts", "2 drafts"}
        assert all("1.0 host waits" in line["note"] for line in rounds)


#: the check with parts that differ, that fail, that hang, that crash and that are well
PROGRAM = f"""
import os, sys, time
sys.path[:0] = {[str(Path(gpu_check.__file__).parent), str(Path(__file__).parent)]!r}
import gpu_check
from gpu_run import Line

def differing(run):
    run.add(Line(1, "bits", 10, 1))

def failing(run):
    run.add(Line(2, "before", 5))
    raise ValueError("made on purpose")

def hanging(run):
    run.add(Line(3, "before", 5))
    time.sleep(300)

def well(run):
    run.timed(5, "slow", 1e9, 1.0)
    run.add(Line(5, "after", 5))

gpu_check.PARTS = dict(enumerate((differing, failing, hanging, lambda run: os.abort(), well), 1))
gpu_check.BUDGETS = dict.fromkeys(gpu_check.PARTS, 0.0)
gpu_check.GRACE = 15.0 if "--alone" in sys.argv else float(os.environ["GRACE"])
sys.exit(gpu_check.main(sys.argv[1:], [sys.executable, __file__]))
"""


@pytest.mark.slow
def test_what_goes_wrong_in_one_part_leaves_the_others_alone(tmp_path: Path) -> None:
    """A mismatch is the exit code 1, all else that kept something from being shown 2, and no speed is any."""
    program, record = tmp_path / "program.py", tmp_path / "out.json"
    program.write_text(PROGRAM, encoding="utf-8")

    def ran(*only: str) -> tuple[int, str]:
        ended = subprocess.run(
            [sys.executable, str(program), "--interpret", "--json", str(record), "--only", *only],
            capture_output=True, text=True, env=os.environ | {"GRACE": "40"}, timeout=400,
        )  # fmt: skip
        return ended.returncode, ended.stdout

    assert ran("5")[0] == 0
    code, shown = ran("2", "3", "4", "5")
    assert code == 2
    assert "part 2: the rest did not run: ValueError: made on purpose" in shown
    assert "part 3: the rest did not run: it had not ended after 40 seconds and was killed" in shown
    assert "part 4: the rest did not run: it was ended by SIGABRT" in shown
    found = json.loads(record.read_text())
    assert [line["part"] for line in found if line["what"] in ("before", "after")] == [2, 3, 5]
    assert ran("1", "2")[0] == 1


def test_an_error_is_a_line_of_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that nobody meant keeps something from being shown; what does not fit is said, and a budget that is spent."""
    errors = {2: ValueError("made on purpose"), 3: torch.OutOfMemoryError("CUDA out of memory.\nTried to")}

    def raising(run: Run) -> None:
        raise errors[2 if run.until == 2 else 3]

    monkeypatch.setattr(gpu_check, "PARTS", {2: raising, 3: raising})
    monkeypatch.setattr(gpu_check, "BUDGETS", {2: 2.0, 3: 3.0})
    run = interpreted()
    for part in errors:
        gpu_check.play(run, part, 0.0)
    assert [(line.part, line.failed, line.what.split(":")[0]) for line in run.lines] == [
        (2, True, "the rest did not run"), (2, False, "the budget was spent"),
        (3, False, "the rest did not fit"), (3, False, "the budget was spent"),
    ]  # fmt: skip


def test_what_fails_in_a_part_leaves_its_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One product that does not compile, and one that does not fit: the rest is compared. Not so where the device has
    failed."""
    errors = {"int8": RuntimeError("PTX assembly aborted\nand more"), "int4": torch.OutOfMemoryError("out of memory")}

    def checking(run: Run, kind: str, *what: object) -> None:
        if kind in errors:
            raise errors[kind]
        run.add(Line(2, kind, 5))

    monkeypatch.setattr(gpu_check, "check_product", checking)
    monkeypatch.setattr(gpu_check, "measure_product", lambda *what: None)
    monkeypatch.setitem(gpu_check.BUDGETS, 2, float("inf"))
    run = interpreted()
    gpu_check.play(run, 2, 0.0)
    compared = {line.what for line in run.lines if line.compared}
    assert compared == {*gpu_check.KINDS, *gpu_check.FEW_KINDS} - errors.keys()
    failed = [line for line in run.lines if not line.compared]
    assert sum(line.failed for line in failed) == len(failed) / 2
    assert any(line.what.endswith("did not run: RuntimeError: PTX assembly aborted") for line in failed)

    def dead() -> float:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    lost = interpreted()
    lost.seconds = dead  # type: ignore[method-assign]
    gpu_check.play(lost, 2, 0.0)
    assert "the rest did not run: RuntimeError: CUDA error: an illegal memory access" in lost.lines[-1].what
    assert len(lost.lines) < len(run.lines)


def test_rounds_that_are_not_recorded_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are played all the same, so that only a line shows it."""

    class Refusing(EagerReplays):
        def capture(self, body: Callable[[], None]) -> Callable[[], None]:
            raise RuntimeError("operation not permitted when stream is capturing")

    def recording(run: Run) -> None:
        for _ in range(2):
            with pytest.raises(RuntimeError):
                run.replays().capture(lambda: None)

    monkeypatch.setattr("gpu_run.EagerReplays", Refusing)
    monkeypatch.setattr(gpu_check, "PARTS", {5: recording})
    monkeypatch.setitem(gpu_check.BUDGETS, 5, float("inf"))
    run = interpreted()
    gpu_check.play(run, 5, 0.0)
    (line,) = run.lines
    assert line.failed and "launch by launch" in line.what and "not permitted when stream" in line.what
    assert (run.recorded, len(run.unrecorded)) == (0, 2)


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("print('a', flush=True); print('b')", None),
        ("print('a', flush=True); print('b', flush=True); import time; time.sleep(60)", "not ended after 1 seconds"),
        ("print('a'); print('b', flush=True); import os; os.abort()", "ended by SIGABRT"),
        ("print('a'); print('b'); raise SystemExit(3)", "ended with exit code 3"),
    ],
)
def test_a_part_is_watched(script: str, why: str | None) -> None:
    lines: list[str] = []
    found = watch([sys.executable, "-c", script], 1.0, lines.append)
    assert found is None if why is None else why in str(found)
    assert lines == ["a\n", "b\n"]


def test_a_mismatch_is_the_exit_code() -> None:
    """And nothing else: not the speed, nor what does not fit. Where nothing differs, it says what was not shown."""
    for lines, code in (
        ([Line(1, "bits", 10, 1), Line(2, "crashed", failed=True)], 1), ([Line(2, "crashed", failed=True)], 2),
        ([Line(1, "bits", 10, 0), Line(5, "slow", milliseconds=1e9), Line(5, "did not fit")], 0),
    ):  # fmt: skip
        found = gpu_check.Collected(Console(quiet=True))
        for line in lines:
            found.take(json.dumps(asdict(line)))
        found.take("a library prints\n")
        assert found.exit_code() == code
