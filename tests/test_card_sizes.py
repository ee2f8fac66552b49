"""What the GPU's kernels hold of a card, as plans and pools count it, against the tensors that they would really have:
on "meta", without memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the extra gpu-test is not installed")

from live_bytes import LiveBytes
from recorded_launches import META, SIZES, TYPES, caches, pair_of
from test_plan import preset

from gemma_mtp.backend.base import Rows
from gemma_mtp.backend.cuda.backend import CudaBackend
from gemma_mtp.backend.cuda.models import PairCalls, RopeTables
from gemma_mtp.backend.cuda.round import Buffers, Shape, SlotState, play_round
from gemma_mtp.backend.cuda.tiles import MOST_PARTS, PARALLEL_ROWS
from gemma_mtp.checkpoint import empty_model
from gemma_mtp.decoding.history import TokenHistory
from gemma_mtp.decoding.params import SamplingParams
from gemma_mtp.decoding.round_costs import LONGEST
from gemma_mtp.decoding.sampling import choose, probabilities, process, ranks, top_logprobs
from gemma_mtp.decoding.verify import verify_block, verify_rejection
from gemma_mtp.engine import costs
from gemma_mtp.engine.pool_size import pool_blocks
from gemma_mtp.engine.sequence import Sequence
from gemma_mtp.engine.settings import EngineSettings
from gemma_mtp.kv.pool import KVPool
from gemma_mtp.measure.plan import Load, largest_context, takes
from gemma_mtp.sizes import card
from gemma_mtp.sizes.run import CUDA_CONTEXT_BYTES, Held, Loaded
from gemma_mtp.weight_types import WeightTypes
from gemma_mtp.weights.fp8 import Fp8
from gemma_mtp.weights.matrix import Chooser, Embedding, matrices


def quiet(*args: Any, **options: Any) -> None:
    """Launches nothing."""


def loaded(size: str, types: WeightTypes = TYPES["none"], **changed: Any) -> Loaded:
    return dataclasses.replace(Loaded(*preset(size), types, 2, 2, "cuda"), **changed)


def tensors_in(found: Any) -> Iterator[torch.Tensor]:
    """All tensors that an object's parts hold."""
    if isinstance(found, torch.Tensor):
        yield found
    elif isinstance(found, torch.nn.Module):
        yield from (*found.parameters(), *found.buffers())
    elif isinstance(found, dict):
        for one in found.values():
            yield from tensors_in(one)
    elif isinstance(found, list | tuple):
        for one in found:
            yield from tensors_in(one)
    elif dataclasses.is_dataclass(found) or type(found).__module__.startswith("gemma_mtp.backend.cuda"):
        yield from tensors_in(vars(found))


def made_up(backend: CudaBackend, count: int) -> list[Sequence]:
    """The sequences that rounds are measured with."""
    with pytest.MonkeyPatch.context() as patched, torch.inference_mode():
        patched.setattr(costs, "prefill", lambda *args: None)
        return costs._made_up_sequences(backend, costs.CHOICES["argmax"], count)


def nbytes(*found: Any) -> int:
    """What lies in memory of them, each piece once."""
    storages = {one.untyped_storage()._cdata: one.untyped_storage().nbytes() for one in tensors_in(list(found))}
    return sum(storages.values())


#: the features of all sizes are in these two; the others are for `-m slow`
OFTEN = ("E2B", "26B-A4B")
FEW = [pytest.param(size, marks=() if size in OFTEN else pytest.mark.slow) for size in SIZES]


@pytest.mark.parametrize("kind", ["fp8", *(pytest.param(kind, marks=() if kind == "int4" else pytest.mark.slow)
                                           for kind in TYPES)])  # fmt: skip
@pytest.mark.parametrize("size", FEW)
def test_a_card_holds_what_is_planned(size: str, kind: str) -> None:
    """Weights in the kernels' order, and norms beside them in float32, of whole pairs: to the byte. FP8 is kept as
    `keep_stored_` keeps it: in all matrices but tables, heads and routers."""
    types = TYPES.get(kind, WeightTypes())
    with torch.no_grad():
        models = [empty_model(config, types, torch.bfloat16).requires_grad_(False) for config in preset(size)]
        held = Held()
        if kind == "fp8":
            for matrix in (one for model in models for one in matrices(model)):
                if not isinstance(matrix, Chooser | Embedding):
                    matrix.convert_(Fp8)
            held = Held(*(sum(weight.nbytes for weight in model.checkpoint_tensors().values()) for model in models))
        backend = CudaBackend(*models, quiet)  # type: ignore[arg-type, call-arg]
    run = loaded(size, types, held=held)
    counted = run.target_weights() + run.target_copies() + run.drafter_weights()
    assert counted == nbytes(*models, backend.on_device, backend.drafts)
    if kind == "fp8":
        assert counted < 0.8 * (plain := loaded(size)).target_weights() + plain.drafter_weights()
        assert run.target_read_bytes(1) < 0.75 * plain.target_read_bytes(1)


@pytest.mark.parametrize("size", FEW)
def test_a_round_takes_what_is_planned_at_most(size: str) -> None:
    """Of the sequences and reaches that take most: no more, and not much less."""
    backend = CudaBackend(*pair_of(size, "none"), quiet)
    target, drafter = backend.target, backend.drafter
    assert drafter is not None
    tables = dict.fromkeys(("sliding_attention", "full_attention"), (torch.empty(2, 2, device=META),) * 2)
    calls = PairCalls(quiet, backend.on_device, backend.drafts, tables)  # type: ignore[arg-type]
    most = 0
    for sequences, reaches in ((1, (131072,)), (16, (1024, 8192)), (48, (1024, 131072))):
        places, expected = card.places_of(sequences), card.round_bytes(target.config, drafter.config, sequences)
        for reach in reaches:
            shape = Shape(LONGEST, places, "filtered", reach)
            buffers = Buffers(shape, target.config, drafter.config.text, META)
            pool = KVPool(target.config, dict.fromkeys(tables, 8), places, torch.bfloat16, META)  # type: ignore[arg-type]
            state = SlotState(*(torch.zeros(places, dtype=torch.int64, device=META) for _ in range(2)))
            with torch.inference_mode(), LiveBytes() as live:
                play_round(calls, buffers, state, pool)
            assert live.most <= expected, (sequences, reach)
            most = max(most, live.most)
    assert most > 0.5 * expected


@pytest.mark.parametrize("size", FEW)
def test_a_step_takes_what_is_planned_at_most(size: str) -> None:
    """A chunk of a prompt beside the rows of sixteen sequences, and a chunk alone."""
    backend = CudaBackend(*pair_of(size, "none"), quiet)
    target = backend.target.config
    several, (one,) = caches(backend, [900] * 16), caches(backend, [40])
    for cache in several:
        cache.pool = one.pool
    prompt, rounds = Rows(one, [1] * card.CARD_CHUNK_ROWS, 1), [Rows(cache, [1] * 17, 17) for cache in several]
    for calls in ([prompt], [prompt, *rounds]):
        rows = sum(len(call.token_ids) for call in calls)
        with torch.inference_mode(), LiveBytes() as live:
            backend.forward(calls)
        assert live.most <= card.call_bytes(target, rows)
    assert live.most > 0.25 * card.call_bytes(target, rows)


def test_the_numbers_are_the_kernels() -> None:
    assert card.PART_ROWS == MOST_PARTS * PARALLEL_ROWS
    backend = CudaBackend(*pair_of("31B", "none"), quiet)
    pool = made_up(backend, 12)[0].cache.pool
    held = nbytes([[rows.keys, rows.values] for rows in pool.layers.values()])
    text = backend.target.config
    assert held <= card.measured_bytes(text, 12) - card.call_bytes(text, 33) < 2 * held
    for size in SIZES:
        text = preset(size)[0].text
        for context in (300, 5000, 131072):
            tables = RopeTables(text, META)
            found = [tables.reaching(n) for n in (1, context // 2, context)]  # all of them may be recorded with
            assert nbytes(list(found[-1].values())) * 2 >= nbytes([list(one.values()) for one in found])
            assert nbytes(list(found[-1].values())) * 2 == card.rope_bytes(text, context)


def test_choices_outside_of_rounds_take_what_is_planned_at_most() -> None:
    """Of each logit, whatever parameters there are. A card's sort takes two keys more, of 8 bytes."""
    R, V, most = 17, 2000, 0.0
    logits, ids = torch.randn(R, V), torch.zeros(R, dtype=torch.int64)
    history = TokenHistory([1, 2, 3], V, torch.device("cpu"))
    everything = SamplingParams(
        temperature=0.9, top_p=0.9, min_p=0.1, repetition_penalty=1.2, presence_penalty=0.3, logit_bias={3: 1.0}
    )

    def choose_by(params: SamplingParams) -> None:
        counts = history.rows(ids[1:]) if params.uses_history else None
        choose(process(logits, params, counts=counts), params, ids)

    def verify(block: bool) -> None:
        probs = probabilities(process(logits, SamplingParams(temperature=0.9)), SamplingParams(temperature=0.9), V)
        (verify_block if block else verify_rejection)(probs, probs[1:], ids[1:], 3, torch.tensor(5))

    for call in (
        lambda: choose_by(SamplingParams(temperature=1.0, top_k=64)), lambda: choose_by(everything),
        lambda: top_logprobs(logits, ids, 5), lambda: ranks(logits, ids), lambda: verify(True), lambda: verify(False),
    ):  # fmt: skip
        with LiveBytes() as live:
            call()
        most = max(most, live.most / (R * V))
    assert card.CHOICE_BYTES / 2 < most <= card.CHOICE_BYTES - 16


def test_a_plan_and_an_engine_agree_on_what_fits() -> None:
    """The longest context that a plan gives to sequences on a card has room in an engine's pool there, and a longer one
    has none."""
    for size, kind, memory, sequences in (
        ("31B", "int4", 24e9, 1), ("12B", "int8", 24e9, 2), ("31B", "none", 80e9, 4), ("26B-A4B", "int4", 24e9, 3),
    ):  # fmt: skip
        run = loaded(size, TYPES[kind])
        text = run.target.text
        context = largest_context(run, Load(sequences, 1, 4), memory, True)
        assert 1000 < context < text.max_position_embeddings
        weights = run.target_weights() + run.target_copies() + run.drafter_weights()

        room = int(memory) - CUDA_CONTEXT_BYTES - weights - sequences * text.hidden_size * 2

        def free(tokens: int, run: Loaded = run, n: int = sequences, room: int = room) -> int:
            return room - card.workspace_bytes(run.target.text, run.drafter, n, tokens)

        assert takes(run, Load(sequences, context, 4), True).total <= memory
        settings = EngineSettings(max_running=sequences)
        for tokens, fits in ((context, True), (context + 256, False)):
            size_of_all = takes(run, Load(sequences, tokens, 4), True).kv
            assert (size_of_all <= free(tokens)) == fits
        assert pool_blocks(text, settings, context, card.CARD_CHUNK_ROWS, 2, free(context))


def test_an_engine_on_a_card_leaves_room_for_what_rounds_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pool is what is free after the weights, less the backend's own count."""
    from models import random_target

    from gemma_mtp.config.generation import GenerationDefaults
    from gemma_mtp.engine import engine
    from gemma_mtp.engine.loaded import LoadedPair

    backend = CudaBackend(random_target(5).bfloat16(), None, quiet)
    asked: list[int] = []

    def free_for_pool(device: torch.device, workspace: int) -> int:
        asked.append(workspace)
        return 10**9

    monkeypatch.setattr(engine, "free_for_pool", free_for_pool)
    engine.Engine(LoadedPair(backend, None, GenerationDefaults(())), EngineSettings(max_running=3, max_tokens=50))
    assert asked == [card.workspace_bytes(backend.target.config, None, 3, 50)]


def test_the_plan_says_which_operators_it_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that would run: the kernels where they are asked for and can."""
    import json

    from gemma_mtp.cli import main

    for asked, options, operators in (
        ("0", [], "reference"), ("1", [], "cuda"), ("1", ["--dtype", "float32"], "reference"),
        ("1", ["--kv-type", "float32"], "reference"),
    ):  # fmt: skip
        monkeypatch.setenv("GEMMA_MTP_CUDA", asked)
        arguments = ["plan", "gemma-4-E2B-it", "--device", "cuda", "--memory", "24GB", "--json", *options]
        assert main(arguments) == 0
        read = json.loads(capsys.readouterr().out)
        assert read["operators"] == operators
        if operators == "cuda":
            taken, run = read["choices"][0]["takes"], loaded("E2B")
            assert taken == takes(run, Load(1, 8192, 4), True).to_dict()
            assert taken["workspace"] > run.recorded_bytes(1) + run.target_copies()
