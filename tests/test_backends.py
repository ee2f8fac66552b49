"""What every backend must keep: a row's bits depend on the tokens up to it alone, and choices are the general ones."""

from __future__ import annotations

import dataclasses
import importlib.util
import random
from pathlib import Path
from typing import cast

import pytest
import torch
from mixed_load import lone, play, requests
from models import (
    TINY,
    VOCAB,
    WIDE,
    WithoutChoices,
    agreeing_pair,
    backends,
    opened,
    random_drafter,
    random_target,
    wide_drafter,
)

from gemma_mtp.backend.base import Backend, DraftRows, Rows
from gemma_mtp.backend.reference import BLOCK, ReferenceBackend
from gemma_mtp.backend.select import make_backend
from gemma_mtp.checkpoint import load_drafter, load_target, save_drafter, save_target, stored_tensors
from gemma_mtp.config import TargetConfig
from gemma_mtp.config.generation import GenerationDefaults
from gemma_mtp.decoding.early_stop import StopRule
from gemma_mtp.decoding.noise import STREAM_CHOICE, row_key
from gemma_mtp.decoding.params import SamplingParams
from gemma_mtp.decoding.sampling import choose, process
from gemma_mtp.engine.draft import propose
from gemma_mtp.engine.pair import Pair
from gemma_mtp.engine.round import forward
from gemma_mtp.engine.sequence import Turn
from gemma_mtp.engine.settings import EngineSettings
from gemma_mtp.errors import CheckpointError
from gemma_mtp.kv.blocks import BLOCK_ROWS, block_counts
from gemma_mtp.model.drafter import Drafter
from gemma_mtp.model.target import Target
from gemma_mtp.ops import reference as ops
from gemma_mtp.weights.int8 import Int8
from gemma_mtp.weights.matrix import matrices

FAMILIES = ("ple", "untied", "odd", "moe")
TOKENS = [(7 * i * i + i) % VOCAB for i in range(90)]


def pairs_of(family: str, dtype: torch.dtype) -> dict[str, Backend]:
    return backends(random_target(5, WIDE[family]).to(dtype), wide_drafter(WIDE[family], family == "ple").to(dtype))


def interpreted(family: str) -> Backend:
    """The kernels of the GPU backend in Triton's interpreter, whose products are a tensor core's."""
    from tensor_core import Interpreter

    from gemma_mtp.backend.cuda.backend import CudaBackend

    target, drafter = random_target(5, WIDE[family]), wide_drafter(WIDE[family], family == "ple")
    return CudaBackend(target.bfloat16(), drafter.bfloat16(), Interpreter())


BACKENDS = {
    f"{name}, {family}, {str(dtype)[6:]}": backend
    for family in FAMILIES
    for dtype in (torch.float32, torch.bfloat16)
    for name, backend in pairs_of(family, dtype).items()
}
HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON:
    BACKENDS |= {f"cuda, {family}, bfloat16": interpreted(family) for family in FAMILIES}
#: its experts take a second; bfloat16's show more
SLOWEST = "reference, moe, float32"
#: the interpreter takes half a second a call: by default it runs the smaller models of `test_contract`
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name.startswith("cuda") else name for name in BACKENDS]


def sized(name: str, rows: int) -> int:
    """So many rows, or fewer where each call takes long: of the reference, more than a block of its own."""
    return min(rows, 6) if name.startswith("cuda") else min(rows, 40) if name.startswith("reference") else rows


@torch.inference_mode()
def states(backend: Backend, lengths: list[int], cuts: list[int], together: bool = True) -> list[torch.Tensor]:
    """Hidden states of all rows of sequences of so many tokens, read in chunks that end at the cuts."""
    counts = block_counts(backend.target.config.sliding_window, 128, 128)
    pool = backend.make_pool({kind: len(lengths) * count for kind, count in counts.items()}, len(lengths))
    caches = [pool.cache(128) for _ in lengths]
    found: list[list[torch.Tensor]] = [[] for _ in lengths]
    for begin, end in zip([0, *cuts], [*cuts, max(lengths)], strict=True):
        calls = [(i, TOKENS[begin : min(end, length)]) for i, length in enumerate(lengths) if length > begin]
        parts = [calls] if together else [[call] for call in calls]
        for part in parts:
            hidden_RD = forward(backend, [Rows(caches[i], tokens, len(tokens)) for i, tokens in part])
            for (i, tokens), of_one in zip(part, hidden_RD.split([len(tokens) for _, tokens in part]), strict=True):
                caches[i].table.commit(len(tokens))
                found[i].append(of_one.clone())
    return [torch.cat(parts) for parts in found]


@pytest.mark.parametrize(
    "name",  # a head of its own changes no states
    [pytest.param(name, marks=[pytest.mark.slow] * (name.startswith("cuda") or "untied" in name or name == SLOWEST))
     for name in BACKENDS],
)  # fmt: skip
def test_a_row_has_the_same_bits_whatever_shares_its_call(name: str) -> None:
    backend, rng, most = BACKENDS[name], random.Random(1), sized(name, 70)
    (alone,) = states(backend, [most], list(range(1, most)))  # one row at a time
    for _ in range(3 if name.startswith("native") else 1):
        lengths = [most, rng.randint(1, most), rng.randint(1, most + 20 * most // 70)]
        cuts = sorted(rng.sample(range(1, most), rng.randint(most // 60, most // 6)))
        for length, found in zip(lengths, states(backend, lengths, cuts), strict=True):
            assert torch.equal(found[:most], alone[:length])


def test_a_kernel_that_sees_the_number_of_rows_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: the reference without its fixed shape. Sums in another order differ in their last bits."""
    backend = BACKENDS["reference, ple, float32"]
    gated = ops.gated_mlp
    rows_seen: list[int] = []

    def another_order(gate_up: torch.Tensor) -> torch.Tensor:
        rows_seen.append(gate_up.shape[-2])
        return gated(gate_up) * (1 + 2.0**-20 * (rows_seen[-1] % 7))

    monkeypatch.setattr(ops, "gated_mlp", another_order)
    (first,), (second,) = states(backend, [40], [17]), states(backend, [40], [3, 20])
    assert torch.equal(first, second)
    assert set(rows_seen) == {BLOCK}
    monkeypatch.setattr("gemma_mtp.backend.reference.BLOCK", 5)  # which the blocks of keys and values do not hold whole
    assert not torch.equal(states(backend, [40], [17])[0], alone_states(backend))


def alone_states(backend: Backend) -> torch.Tensor:
    """Of the same tokens without a cache: another order of sums."""
    with torch.inference_mode():
        return backend.target.forward_sequence(torch.tensor([TOKENS[:40]])).hidden_BTD[0]


@pytest.mark.parametrize("name", [name for name in BACKENDS if name.endswith("float32")])
def test_states_are_those_of_a_whole_sequence(name: str) -> None:
    backend = BACKENDS[name]
    target = Target(backend.target.config).eval().requires_grad_(False)
    for ours, theirs in zip(
        target.checkpoint_tensors().values(), backend.target.checkpoint_tensors().values(), strict=True
    ):
        ours.copy_(theirs.dense())
    with torch.inference_mode():
        expected = target.forward_sequence(torch.tensor([TOKENS[:70]])).hidden_BTD[0]
    (found,) = states(backend, [70], [33])
    assert (found - expected).abs().max() < 2e-4 * expected.abs().max()


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("name", NAMES)
def test_choices_are_the_general_ones(name: str, temperature: float) -> None:
    backend, count = BACKENDS[name], sized(name, 40)
    (hidden_RD,) = states(backend, [count], [])
    params = SamplingParams(temperature=temperature, seed=11)
    with torch.inference_mode():
        expected = choose(process(backend.logits(hidden_RD), params), params, torch.arange(1, count + 1)).tolist()
        keys = [row_key(11, position, STREAM_CHOICE) if temperature else 0 for position in range(1, count + 1)]
        assert backend.choose(hidden_RD, range(count), [temperature] * count, keys) == expected
        some = [3, count - 1, 0]
        found = backend.choose(hidden_RD, some, [temperature] * 3, [keys[row] for row in some])
    assert found == [expected[row] for row in some]


STOP = StopRule((0.0, 0.02, 0.05, 0.1), 0.5, 1.2)


@pytest.mark.parametrize(
    ("name", "temperature", "stop"),
    [pytest.param(name, temperature, stop,
                  marks=[pytest.mark.slow] * (name.startswith("cuda") or (name.startswith("reference") and crossed)))
     for name in BACKENDS
     for temperature, stop, crossed in ((0.0, None, False), (0.8, STOP, False), (0.0, STOP, True), (0.8, None, True))],
)  # fmt: skip
@torch.inference_mode()
def test_drafts_are_those_of_single_steps(name: str, temperature: float, stop: StopRule | None) -> None:
    """Drafted at once or step by step, alone or together."""
    backend = BACKENDS[name]
    params = SamplingParams(temperature=temperature, seed=4)
    most = 3 if name.startswith("cuda") else 6
    lengths = (4,) if name.startswith("cuda") else (9, 40)
    sequences = [opened(backend, TOKENS[:length], params)[0] for length in lengths]
    for sequence in sequences:
        (at_once,) = propose(backend, [Turn(sequence, most, "exact", stop)])
        stepwise = propose(cast(Backend, WithoutChoices(backend)), [Turn(sequence, most, "exact", stop)])[0]
        assert at_once.token_ids == stepwise.token_ids
        assert at_once.confidences == pytest.approx(stepwise.confidences, abs=1e-4)
        assert (len(at_once) == most) or stop is not None


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_slots_keep_states_and_drafting_leaves_sequences_alone(name: str) -> None:
    backend = BACKENDS[name]
    sequence, _ = opened(backend, TOKENS[: sized(name, 20)], SamplingParams())
    before, length = sequence.cache.state.clone(), sequence.cache.table.length
    call = DraftRows(sequence.cache, sequence.last_token, 4, 0.0, [0] * 4, None)
    first, again = backend.draft([call]), backend.draft([call])
    assert first == again and len(first[0].token_ids) == 4
    assert torch.equal(sequence.cache.state, before) and sequence.cache.table.length == length
    assert backend.with_drafter(None).drafter is None
    assert backend.with_drafter(backend.drafter).draft([call]) == first
    assert backend.identity["operators"]


def reference_pair(dtype: torch.dtype, family: str) -> Pair:
    if family == "agreeing":
        target, drafter = agreeing_pair(3)
    elif family == "centroids":
        target, drafter = random_target(3), random_drafter(seed=4, centroids=True)
    else:
        target, drafter = random_target(5, WIDE[family]), wide_drafter(WIDE[family])
    backend = ReferenceBackend(target.to(dtype), drafter.to(dtype))
    return Pair(backend, None, GenerationDefaults(eos_token_ids=()))


@pytest.mark.parametrize("count", [3, pytest.param(34, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("dtype", "family"),
    [(torch.float32, "agreeing"), (torch.bfloat16, "centroids"), (torch.bfloat16, "moe"),
     *(pytest.param(*one, marks=pytest.mark.slow)
       for one in ((torch.float32, "centroids"), (torch.bfloat16, "agreeing"), (torch.float32, "moe")))],
)  # fmt: skip
def test_plain_pytorch_is_exact(dtype: torch.dtype, family: str, count: int) -> None:
    """Drafted equals plain, tokens and log-probabilities, alone and in batches that preempt and reuse."""
    pair = reference_pair(dtype, family)
    load = requests([TOKENS[:50], TOKENS[49::-1]], count, seed=2, longest=10)
    for request in load:
        plain, drafted = lone(pair, request), pair.generate(request.prompt_token_ids, request.params, draft_tokens=5)
        assert (plain.token_ids, plain.logprobs) == (drafted.token_ids, drafted.logprobs)
    settings = EngineSettings(max_running=3, max_tokens=120, kv_memory_mb=0.5, max_stall_seconds=0.002)
    loaded = play(pair, [*load, *load], settings)
    assert loaded.mismatches == []
    assert loaded.stats.prefix_hit_tokens > 0 and loaded.completed > count


def test_blocks_of_the_reference_lie_within_blocks_of_the_pool() -> None:
    assert BLOCK_ROWS % BLOCK == 0 and TINY.sliding_window < BLOCK


def test_what_a_backend_reordered_is_saved_as_it_was(tmp_path: Path) -> None:
    """Weights in panels are the model's still: nothing that was freed is written empty."""
    target, drafter = random_target(5, WIDE["ple"]).bfloat16(), wide_drafter(WIDE["ple"]).bfloat16()
    models: tuple[Target | Drafter, ...] = (target, drafter)
    written = [
        {name: tensor.clone() for name, tensor in stored_tensors(model.checkpoint_tensors()).items()}
        for model in models
    ]
    backend = make_backend(target, drafter)
    assert backend.drafter is not None
    save_target(backend.target, TargetConfig(target.config), tmp_path / "target")
    save_drafter(backend.drafter, drafter.config, tmp_path / "drafter")
    read: tuple[Target | Drafter, ...] = (
        load_target(tmp_path / "target", torch.bfloat16),
        load_drafter(tmp_path / "drafter", torch.bfloat16),
    )
    for expected, loaded in zip(written, read, strict=True):
        found = stored_tensors(loaded.checkpoint_tensors())
        assert found.keys() == expected.keys()
        assert [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])] == []


def test_what_the_config_would_not_say_is_not_saved(tmp_path: Path) -> None:
    """A matrix in a format that the record of weight types lacks, and another model's configuration."""
    target, drafter = random_target(5, WIDE["ple"]), wide_drafter(WIDE["ple"])
    matrices(target)[3].convert_(Int8)
    with pytest.raises(CheckpointError, match=r"can not be saved: of model\.\S+ it has .+, but its .* call for "):
        save_target(target, TargetConfig(target.config), tmp_path / "target")
    wrong = dataclasses.replace(drafter.config, text=dataclasses.replace(drafter.config.text, intermediate_size=64))
    with pytest.raises(CheckpointError, match=r"mlp\.\w+_proj\.weight it has float"):
        save_drafter(drafter, wrong, tmp_path / "drafter")
    assert list(tmp_path.iterdir()) == []
