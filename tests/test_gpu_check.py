"""`benchmarks/gpu_check.py` without a card: its comparisons at small sizes, interpreted, and that they can fail."""

from __future__ import annotations

import gpu_calls
import gpu_check
import gpu_generations
import pytest
import torch
from gpu_check import Run, check_attention, check_instructions, check_linear, check_model
from models import WIDE, random_target, wide_drafter
from recorded_launches import META, Recorder
from tensor_core import Interpreter
from tensor_core_model import CORES
from test_cuda_rows import careless
from torch import Tensor

from gemma_mtp.backend.cuda.backend import CudaBackend
from gemma_mtp.backend.cuda.models import DeviceTarget, ropes_of
from gemma_mtp.backend.cuda.weights import DeviceWeight
from gemma_mtp.config import PRESETS
from gemma_mtp.config.generation import GenerationDefaults
from gemma_mtp.engine.pair import Pair
from gemma_mtp.engine.settings import EngineSettings


def interpreted(core: str = "Hopper") -> Run:
    torch.manual_seed(3)
    return Run(torch.device("cpu"), Interpreter(CORES[core]))


def test_products_and_attention_compare_bits() -> None:
    run = interpreted()
    check_linear(run, "int8", 40, 576, (1, 2, 17))
    check_attention(run, 4, 2, 16, 40, [1, 33])
    assert [line.differing for line in run.lines] == [0] * 5
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
    check_linear(run, "bf16", 40, 576, (1, 2, 17))
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
    assert gpu_calls.bytes_read(target, 1) / 1e9 == pytest.approx(gigabytes, rel=0.02)


def test_calls_of_the_sizes_are_made() -> None:
    for size, weights in (("E2B", "none"), ("31B", "int8")):
        whole = PRESETS[f"gemma-4-{size}-it"].text
        text = gpu_calls.shortened(whole, 2e10)
        assert (text is whole) == (size == "E2B")
        target = DeviceTarget(gpu_calls.random_target(text, weights, META))
        batch, pool = gpu_calls.batch_of(text, 5, 2, META)
        record = Recorder()
        assert target.forward(record, batch, pool, ropes_of(text, 2000, META)).shape == (10, text.hidden_size)
        assert record.kernels


@pytest.mark.slow
@pytest.mark.parametrize("kind", gpu_generations.KINDS)
def test_generations_compare_tokens_and_bits(kind: str) -> None:
    pair = tiny_pair()
    prompts = [[1, 2, 3, 4, 5], [1, 2, 3, 9]]
    settings = EngineSettings(max_running=2, max_tokens=40, prefix_reuse=True)
    found = list(gpu_generations.compare(pair, kind, prompts, 6, [1, 3], settings))
    assert len(found) == 4
    assert [wrong for _, _, wrong, _ in found] == [0] * 4


@pytest.mark.slow
def test_a_generation_with_and_without_drafts() -> None:
    """Tokens, and the bits of log-probabilities."""
    pair = tiny_pair()
    (request,) = gpu_generations.requests_of("drawn", [[1, 2, 3, 4, 5]], 4)
    plain, drafted = (pair.generate(request.prompt_token_ids, request.params, draft_tokens=K) for K in (0, 2))
    assert gpu_generations.same(plain, drafted) and len(plain.token_ids) == 4


def tiny_pair() -> Pair:
    target, drafter = random_target(5, WIDE["ple"]).bfloat16(), wide_drafter(WIDE["ple"], True).bfloat16()
    return Pair(CudaBackend(target, drafter, Interpreter()), None, GenerationDefaults(eos_token_ids=()))
