"""One contract for every backend and every family: what a row computes, what is chosen, drafted and decoded.

The GPU's kernels run in Triton's interpreter, whose products are a tensor core's.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from models import PLE, VOCAB, F, S, WithoutChoices, backends, letters, open_caches, opened, random_target, wide_drafter
from torch import Tensor

from gemma_mtp.backend.base import Backend, Rows
from gemma_mtp.checkpoint import stored_tensors
from gemma_mtp.config import LayerOptions, TextConfig
from gemma_mtp.config.generation import GenerationDefaults
from gemma_mtp.config.rope import RopeConfig
from gemma_mtp.decoding.grammar import Grammar
from gemma_mtp.decoding.noise import STREAM_CHOICE, row_key
from gemma_mtp.decoding.params import SamplingParams
from gemma_mtp.decoding.sampling import choose, process
from gemma_mtp.engine.draft import propose
from gemma_mtp.engine.pair import Pair
from gemma_mtp.engine.round import forward
from gemma_mtp.engine.sequence import Turn
from gemma_mtp.errors import DeviceError
from gemma_mtp.model.drafter import Drafter
from gemma_mtp.model.target import Target
from gemma_mtp.weight_types import UNIFORM
from gemma_mtp.weights.matrix import matrices

HAS_TRITON = importlib.util.find_spec("triton") is not None
TOKENS = [(7 * i * i + i) % VOCAB for i in range(9)]
SHARED = dataclasses.replace(PLE, num_hidden_layers=4, layer_types=(S, F, S, F), sliding_window=2)
DENSE = dataclasses.replace(
    SHARED, num_hidden_layers=2, layer_types=(S, F), num_kv_shared_layers=0, use_double_wide_mlp=False,
    hidden_size_per_layer_input=0, vocab_size_per_layer_input=0, attention_k_eq_v=True, num_global_key_value_heads=1,
)  # fmt: skip
#: what differs between the sizes of Gemma 4, and Gemma 3's options
FAMILIES: dict[str, TextConfig] = {
    "E2B": dataclasses.replace(SHARED, num_key_value_heads=1, num_global_key_value_heads=1),
    "E4B": dataclasses.replace(SHARED, use_double_wide_mlp=False),
    "12B": dataclasses.replace(DENSE, model_type="gemma4_unified_text"),
    "26B": dataclasses.replace(
        DENSE, enable_moe_block=True, num_experts=8, top_k_experts=2, moe_intermediate_size=64
    ),
    "31B": dataclasses.replace(DENSE, num_key_value_heads=4, num_global_key_value_heads=2),
    "Gemma 3": dataclasses.replace(
        DENSE, attention_k_eq_v=False, num_global_key_value_heads=2, global_head_dim=16, final_logit_softcapping=None,
        sliding_rope=RopeConfig(1e4), full_rope=RopeConfig(1e6, "linear", factor=8.0),
        options=LayerOptions(value_norm=False, score_scale=24**-0.5, layer_scalar=False),
    ),
}  # fmt: skip
NAMES = ["reference", "native", *(["cuda"] if HAS_TRITON else [])]
#: where each call takes long, the rest is for `-m slow`
OFTEN = [pytest.param(name, marks=pytest.mark.slow) if name == "cuda" else name for name in NAMES]


@functools.cache
def backend_of(name: str, family: str) -> Backend:
    config = FAMILIES[family]
    target, drafter = random_target(5, config).bfloat16(), wide_drafter(config, family.startswith("E")).bfloat16()
    if name != "cuda":
        found = backends(target, drafter)
        return found[name] if name in found else pytest.skip("the native operators were not built")
    from tensor_core import Interpreter

    from gemma_mtp.backend.cuda.backend import CudaBackend

    return CudaBackend(target, drafter, Interpreter())


@torch.inference_mode()
def states(backend: Backend, ends: list[int]) -> Tensor:
    """Hidden states of the first tokens, read in chunks that end there."""
    (cache,) = open_caches(backend, 1, 40)
    found = []
    for begin, end in zip([0, *ends], ends, strict=False):
        found.append(forward(backend, [Rows(cache, TOKENS[begin:end], end - begin)]).clone())
        cache.table.commit(end - begin)
    return torch.cat(found)


@pytest.mark.parametrize(
    ("name", "family"),
    # E4B's kernels are those of E2B, and 31B's run in what is drafted below
    [pytest.param(name, family, marks=[pytest.mark.slow] * (name == "cuda" and family in ("E4B", "31B")))
     for name in NAMES for family in FAMILIES],
)  # fmt: skip
@torch.inference_mode()
def test_a_model_is_run_and_chosen_from(name: str, family: str) -> None:
    """A row's bits in any chunk; within bf16's rounding of float32; and choices of all kinds in one call."""
    backend = backend_of(name, family)
    rows = 3  # beyond the window
    hidden_RD = states(backend, [rows])
    assert torch.equal(states(backend, [1, rows]), hidden_RD)

    wide = random_target(5, FAMILIES[family])
    for tensor in wide.parameters():
        tensor.copy_(tensor.bfloat16())
    expected = wide.logits(wide.forward_sequence(torch.tensor([TOKENS[:rows]])).hidden_BTD[0])
    logits = backend.logits(hidden_RD)
    errors_R = (logits.float() - expected).abs().amax(1)
    worst = errors_R.median() if family == "26B" else errors_R.max()  # rounding may change a row's experts
    assert worst < 0.06 * expected.abs().max()

    ways: list[dict[str, Any]] = [{}, {"temperature": 0.8}]
    if "filtered" in backend.chooses and family == "12B":  # whose logits they are is no matter
        ways += [{"temperature": 1.2, "top_k": 9, "top_p": 0.9}]
    params = [SamplingParams(seed=row, **ways[row % len(ways)]) for row in range(rows)]
    wanted = [
        int(choose(process(logits[row : row + 1], one), one, torch.tensor([row]))) for row, one in enumerate(params)
    ]
    keys = [row_key(row, row, STREAM_CHOICE) for row in range(rows)]
    temperatures, filters = [one.temperature for one in params], [one.filters for one in params]
    assert backend.choose(hidden_RD, range(rows), temperatures, keys, filters) == wanted
    assert backend.choose(hidden_RD, range(rows)) == backend.choose(hidden_RD, range(rows), [0.0] * rows, keys)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", OFTEN)
@torch.inference_mode()
def test_drafts_are_those_of_single_steps(name: str, family: str) -> None:
    backend = backend_of(name, family)
    ways: list[dict[str, Any]] = [{}, {"temperature": 0.8}, {"temperature": 0.8, "top_k": 9, "min_p": 0.05}]
    for way in ways:
        params = SamplingParams(seed=4, **way)
        sequence = opened(backend, TOKENS[:3], params)[0]
        (at_once,) = propose(backend, [Turn(sequence, 3)])
        (stepwise,) = propose(WithoutChoices(backend), [Turn(sequence, 3)])  # type: ignore[arg-type]
        assert at_once.token_ids == stepwise.token_ids and len(at_once) == 3


#: how requests choose, and how they are verified
WAYS: dict[str, tuple[dict[str, Any], str]] = {
    "greedy": ({"logprobs": 2}, "exact"),
    "penalties": ({"temperature": 0.7, "repetition_penalty": 1.3, "presence_penalty": 0.4, "logprobs": 0}, "exact"),
    "filters": ({"temperature": 1.1, "top_k": 12, "top_p": 0.9, "min_p": 0.02}, "exact"),
    "bias": ({"temperature": 0.8, "logit_bias": {3: 4.0, 9: -5.0}}, "exact"),
    "grammar": ({"temperature": 0.9, "grammar": Grammar("regex", "[A-Za-f]{9}")}, "exact"),
    "rejection": ({"temperature": 0.9, "top_k": 20}, "rejection"),
    "block": ({"temperature": 0.9, "frequency_penalty": 0.3}, "block"),
}


def is_default(name: str, family: str, way: str) -> bool:
    """The kernels' own part is in every other test; PyTorch's path takes seven times as long as the native one."""
    if name == "cuda":
        return family == "31B" and way in ("grammar", "block")
    return name == "native" or (list(FAMILIES).index(family) + list(WAYS).index(way)) % 3 == 0


CASES = [
    pytest.param(name, family, way, marks=() if is_default(name, family, way) else pytest.mark.slow)
    for name in NAMES for family in FAMILIES for way in WAYS
]  # fmt: skip


@pytest.mark.parametrize(("name", "family", "way"), CASES)
def test_drafting_changes_nothing(name: str, family: str, way: str, tmp_path: Path) -> None:
    """Of `exact` neither tokens nor the bits of log-probabilities; the others give what the seed says, again."""
    options, verification = WAYS[way]
    count, drafts = (3, 1) if name == "cuda" else (9, 3)
    pair = Pair(backend_of(name, family), letters(tmp_path), GenerationDefaults(eos_token_ids=()))
    params = SamplingParams(seed=3, max_tokens=count, **options)
    made = [
        pair.generate(TOKENS[:2], params, draft_tokens=K, verification=verification)  # type: ignore[arg-type]
        for K in ((0, drafts) if verification == "exact" else (drafts, drafts))
    ]
    assert made[0].token_ids == made[1].token_ids and len(made[0].token_ids) == count
    assert made[0].logprobs == made[1].logprobs
    assert made[1].drafted > 0


@dataclasses.dataclass(frozen=True)
class Strange(LayerOptions):
    """Options of a family that nobody has met."""

    parallel_branches: bool = False


@pytest.mark.skipif(not HAS_TRITON, reason="the extra gpu-test is not installed")
def test_an_option_that_the_kernels_do_not_know_is_refused_by_name() -> None:
    from gemma_mtp.backend.cuda.backend import CudaBackend

    config = dataclasses.replace(DENSE, options=Strange(parallel_branches=True))
    with pytest.raises(DeviceError, match=r"parallel_branches = True.*reference backend"):
        CudaBackend(random_target(5, config).bfloat16(), None, print)  # type: ignore[arg-type]
    known = dataclasses.replace(DENSE, options=Strange())
    assert CudaBackend(random_target(5, known).bfloat16(), None, print)  # type: ignore[arg-type]


@pytest.mark.skipif(not HAS_TRITON, reason="the extra gpu-test is not installed")
@pytest.mark.parametrize("kind", ["int4", "q8_0"])
def test_a_card_holds_each_weight_once_and_saves_it_as_it_was(kind: str) -> None:
    """In the kernels' order, in place of the files'."""
    from gemma_mtp.backend.cuda.backend import CudaBackend

    target, drafter = random_target(5, FAMILIES["26B"]).bfloat16(), wide_drafter(FAMILIES["26B"]).bfloat16()
    models: tuple[Target | Drafter, ...] = (target, drafter)
    for model in models:
        model.quantise_(UNIFORM[kind])
    before = [{n: t.clone() for n, t in stored_tensors(m.checkpoint_tensors()).items()} for m in models]
    backend = CudaBackend(target, drafter, print)  # type: ignore[arg-type]
    stored = [matrix.stored for model in models for matrix in matrices(model)]
    held = {tensor.data_ptr() for weight in stored for tensor in weight.kept().values()}
    assert backend.drafts is not None and backend.on_device.layers[0].experts is not None
    for layer in (*backend.on_device.layers, *backend.drafts.layers):
        for weight in (layer.qkv, layer.o, layer.gate_up, layer.down):
            assert {weight.data.data_ptr(), weight.scales.data_ptr()} <= held
    assert backend.on_device.layers[0].experts.down.data.data_ptr() in held
    for model, expected in zip(models, before, strict=True):
        found = stored_tensors(model.checkpoint_tensors())
        assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []
