"""Rounds on the device, under a recorder that stands for CUDA's graphs: replays are the rounds that the host plays."""

from __future__ import annotations

import random
import weakref
from typing import Any

import pytest
import torch
from mixed_load import lone, play, requests
from models import VOCAB, WIDE, open_caches, play_rounds, random_target, wide_drafter
from recorded_rounds import Recorder, plain_backend
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from gemma_mtp.backend.cuda.backend import CudaBackend
from gemma_mtp.backend.cuda.device_round import COUNTS
from gemma_mtp.backend.cuda.round import Buffers, Shape, SlotState, play_round
from gemma_mtp.config.generation import GenerationDefaults
from gemma_mtp.decoding.noise import STREAM_CHOICE, row_key, row_keys, signed, stream_key
from gemma_mtp.decoding.params import ChoiceKind, SamplingParams
from gemma_mtp.engine.costs import measure_costs
from gemma_mtp.engine.execution import run_step
from gemma_mtp.engine.pair import Pair
from gemma_mtp.engine.round import RoundOutput, prefill
from gemma_mtp.engine.sequence import Sequence, Turn, open_sequence
from gemma_mtp.engine.settings import EngineSettings
from gemma_mtp.engine.whole_rounds import play_whole
from gemma_mtp.kv.blocks import BLOCK_ROWS
from gemma_mtp.sizes.card import LEAST_REACH

TOKENS = [(7 * i * i + i) % VOCAB for i in range(90)]
ROOM = 400


def pair_of(recorder: Recorder | None, eos: tuple[int, ...] = ()) -> Pair:
    return Pair(plain_backend(recorder), None, GenerationDefaults(eos_token_ids=eos))


FILTERS: list[dict[str, Any]] = [{"top_k": 7}, {"top_p": 0.7}, {"min_p": 0.1}, {}, {"top_k": 20, "top_p": 0.9}]


def sequences(backend: CudaBackend, temperatures: list[float], end: int, filtered: bool = False) -> list[Sequence]:
    """Sequences of prompts of several lengths, which begin side by side in a pool."""
    caches = open_caches(backend, len(temperatures), ROOM)
    found = []
    for i, (cache, temperature) in enumerate(zip(caches, temperatures, strict=True)):
        prompt = TOKENS[i : 30 + 3 * i]
        params = SamplingParams(temperature=temperature, seed=i + 5, **FILTERS[i] if filtered else {})
        found.append(open_sequence(backend, cache, params, prompt, end=end))
        prefill(backend, found[-1], prompt)
    return found


ONE, THREE, FIVE = [0.0], [0.0, 0.8, 0.0], [1.3, 0.2, 0.7, 1.0, 0.0]


@pytest.mark.parametrize(
    ("temperatures", "filtered", "ahead"),
    [(ONE, False, False), (ONE, False, True), (THREE, False, True), (THREE, True, False),
     *((FIVE, filtered, ahead) for filtered in (False, True) for ahead in (False, True)),
     *(pytest.param(*one, marks=pytest.mark.slow)
       for one in ((ONE, True, False), (ONE, True, True), (THREE, False, False), (THREE, True, True)))],
)  # fmt: skip
@torch.inference_mode()
def test_replays_are_the_rounds_that_the_host_plays(temperatures: list[float], filtered: bool, ahead: bool) -> None:
    """Of lengths that change from round to round: the same tokens, the same acceptances, and one host wait a round."""
    recorder, rng = Recorder(), random.Random(3)
    ours, theirs = plain_backend(recorder), plain_backend(None)
    theirs.chooses = frozenset({"argmax", "drawn"})  # so that filtered choices are those of every backend
    recorded, eager = (sequences(backend, temperatures, ROOM * ahead, filtered) for backend in (ours, theirs))
    accepted: set[int] = set()
    under_way: list[int] | None = None
    for _ in range(20):
        asked = [rng.choice([0, 1, 2, 4, 5]) for _ in temperatures]
        outputs = play_whole(ours, [Turn(one, most) for one, most in zip(recorded, asked, strict=True)])
        played = [output.drafted for output in outputs if output is not None]
        assert played == (under_way or asked)  # what is ahead has the drafts that were asked for a round before
        under_way = asked if ahead else None
        expected = play_rounds(theirs, [Turn(one, most) for one, most in zip(eager, played, strict=True)])
        assert [output and output[:3] for output in outputs] == [output[:3] for output in expected]
        accepted |= {output.accepted for output in outputs if output is not None}
        for one, other in zip(recorded, eager, strict=True):
            assert (one.length, one.last_token) == (other.length, other.last_token)
            assert one.cache.table.length == other.cache.table.length
            assert ahead or torch.equal(one.cache.state, other.cache.state)
    assert recorder.waits == 20 and recorder.replayed > 5
    assert accepted >= {0, 1, 2, 4}


@torch.inference_mode()
def test_who_leaves_loses_what_was_played_ahead() -> None:
    """Sequences come and go between rounds, also for a round without any; the others go on as alone."""
    recorder, rng = Recorder(), random.Random(8)
    ours, theirs = plain_backend(recorder), plain_backend(None)
    recorded, eager = (sequences(backend, [0.0, 0.9, 0.0, 0.6, 0.3], ROOM) for backend in (ours, theirs))
    for number in range(16):
        some = [i for i in range(5) if rng.random() < 0.6] if number != 7 else []
        play_whole(ours, [Turn(recorded[i], 3) for i in some], recorded[0])
    assert len({one.length for one in recorded}) > 1
    for one, other in zip(recorded, eager, strict=True):
        tokens: list[int] = []
        while other.length < one.length:
            (output,) = play_rounds(theirs, [Turn(other, 0)])
            tokens += output.token_ids
        assert (one.length, one.last_token) == (other.length, other.last_token)


@pytest.mark.parametrize("reuse", [False, True])
def test_an_engine_gives_each_request_what_it_gives_alone(reuse: bool) -> None:
    """Batches, preemption between rounds, cancellation, and requests whose choices stay with the host, beside whole
    rounds."""
    recorder = Recorder()
    load = requests([TOKENS, TOKENS[::-1]], 24, seed=4, longest=30)
    settings = EngineSettings(max_running=5, max_tokens=140, kv_memory_mb=0.08, prefix_reuse=reuse)
    loaded = play(pair_of(recorder), load, settings)
    assert loaded.mismatches == []
    assert (reuse or loaded.stats.preemptions > 0) and loaded.completed > 12
    assert recorder.replayed > 3 * recorder.captured
    recorded, eager = pair_of(recorder), pair_of(None)
    assert lone(recorded, load[0]).token_ids == lone(eager, load[0]).token_ids


def test_ends_inside_the_drafts_are_those_of_plain_rounds() -> None:
    eos = (3, 11)
    recorded, eager = pair_of(Recorder(), eos), pair_of(None, eos)
    ended = 0
    for seed in range(8):
        params = SamplingParams(temperature=seed % 3 * 0.5, seed=seed, max_tokens=24)
        plain = eager.generate(TOKENS[seed : seed + 9], params, draft_tokens=0)
        drafted = recorded.generate(TOKENS[seed : seed + 9], params, draft_tokens=seed % 5)
        assert (plain.token_ids, plain.finish_reason) == (drafted.token_ids, drafted.finish_reason)
        ended += plain.finish_reason == "stop"
    assert 0 < ended < 8


@torch.inference_mode()
def test_what_the_device_does_not_play_whole_stays_with_the_host() -> None:
    """Bias, penalties, log-probabilities, other verification and drafts beyond the longest, in one step."""
    recorder = Recorder()
    backend = plain_backend(recorder)
    kinds: list[Any] = [{"logit_bias": {3: 1.0}}, {"repetition_penalty": 1.2}, {"logprobs": 2}, {}, {}]
    caches = open_caches(backend, len(kinds), ROOM)
    turns = []
    for kind, cache in zip(kinds, caches, strict=True):
        sequence = open_sequence(backend, cache, SamplingParams(**kind), TOKENS[:20], end=ROOM)
        prefill(backend, sequence, TOKENS[:20])
        turns.append(Turn(sequence, 3))
    turns[-1] = Turn(turns[-1].sequence, COUNTS[-1] + 1)
    result = run_step(backend, turns, [])
    assert [isinstance(outcome, RoundOutput) for outcome in result.outcomes] == [True] * 5
    assert recorder.waits == 1  # of the fourth turn alone
    assert [outcome is None for outcome in play_whole(backend, turns)] == [True] * 3 + [False, True]
    assert play_whole(backend, [Turn(turns[0].sequence, 2, "rejection")]) == [None]


def test_costs_are_those_of_replays() -> None:
    recorder = Recorder()
    costs = measure_costs(plain_backend(recorder), "drawn", 3)
    assert (
        recorder.captured >= 2 and recorder.replayed >= recorder.captured
    )  # each length was recorded before it counted
    assert recorder.waits == recorder.captured + recorder.replayed
    assert costs.drafting == [0.0] * 17 and min(costs.seconds) > 0


@torch.inference_mode()
def test_a_pool_that_nobody_uses_is_free_at_once() -> None:
    """What was recorded, and a round under way, do not keep it."""
    backend = plain_backend(Recorder())
    made = sequences(backend, [0.0, 0.5], ROOM)
    play_whole(backend, [Turn(one, 2) for one in made])
    pool = weakref.ref(made[0].cache.pool)
    assert pool() is not None
    del made
    assert pool() is None


def test_keys_of_rows_are_made_on_the_device_as_on_the_host() -> None:
    positions = torch.tensor([0, 1, 77, 2**40])
    for seed in (0, 5, 2**63 - 1):
        found = row_keys(torch.tensor(signed(stream_key(seed, STREAM_CHOICE))), positions)
        assert found.tolist() == [signed(row_key(seed, int(place), STREAM_CHOICE)) for place in positions]


class _Reading:
    """Calls of a pair of which one reads the device."""

    def __init__(self, calls: Any) -> None:
        self._calls = calls

    def __getattr__(self, name: str) -> Any:
        return getattr(self._calls, name)

    def choose(self, hidden_RD: Any, draws: Any) -> Any:
        chosen = self._calls.choose(hidden_RD, draws)
        return torch.tensor(chosen.tolist())


@pytest.mark.parametrize(
    ("choice", "family"),
    [("argmax", "ple"), ("drawn", "ple"), ("filtered", "ple"), ("filtered", "moe"), ("drawn", "untied"),
     ("argmax", "odd"), *(pytest.param(*one, marks=pytest.mark.slow)
                          for one in (("argmax", "moe"), ("drawn", "moe"), ("argmax", "untied"), ("filtered", "untied"),
                                      ("drawn", "odd"), ("filtered", "odd")))],
)  # fmt: skip
def test_no_round_reads_the_device(family: str, choice: ChoiceKind) -> None:
    """The kernels' own calls, on tensors that have no values to read. A control that reads them fails."""
    target, drafter = random_target(5, WIDE[family]).bfloat16(), wide_drafter(WIDE[family], family == "ple").bfloat16()
    launches: list[str] = []

    def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        launches.append(kernel.__name__)

    backend = CudaBackend(target, drafter, launch, None, Recorder())
    assert backend.rounds is not None and backend.drafts is not None
    calls = backend.rounds.models_for(LEAST_REACH)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
        pool = backend.make_pool({"sliding_attention": 8, "full_attention": 8}, 4)
        shape = Shape(3, 2, choice, LEAST_REACH)
        buffers = Buffers(shape, target.config, drafter.config.text, backend.device)
        state = SlotState(torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64))
        play_round(calls, buffers, state, pool)
        assert launches.count("draw_kernel") == (4 if choice == "filtered" else 0)
        assert launches.count("heads_kernel") == 3 * len(backend.drafts.layers) + len(target.layers)
        assert buffers.tables_NBW.shape[2] == LEAST_REACH // BLOCK_ROWS
        with pytest.raises((RuntimeError, DynamicOutputShapeException)):
            play_round(_Reading(calls), buffers, state, pool)


def test_a_recorder_refuses_a_read() -> None:
    """The control of the recorder."""
    tensor = torch.ones(1)

    def reading() -> None:
        tensor.mul_(float(tensor.sum()))

    for inference in (False, True):
        with torch.inference_mode(inference), pytest.raises(AssertionError, match="the host reads the device"):
            Recorder().capture(reading)


@pytest.mark.slow
@torch.inference_mode()
def test_the_kernels_play_whole_rounds_as_they_play_parts() -> None:
    """In Triton's interpreter, recorded and replayed."""
    from tensor_core import Interpreter

    target, drafter = random_target(5, WIDE["ple"]).bfloat16(), wide_drafter(WIDE["ple"], True).bfloat16()
    recorder = Recorder(Interpreter())
    ours = CudaBackend(target, drafter, recorder.launch, None, recorder)
    theirs = CudaBackend(target, drafter, Interpreter())
    played = []
    for backend in (ours, theirs):
        caches, tokens = open_caches(backend, 2, 40), []
        for i, cache in enumerate(caches):
            params = SamplingParams(temperature=0.7 * i, seed=3)
            one = open_sequence(backend, cache, params, TOKENS[i : i + 3], end=30)
            prefill(backend, one, TOKENS[i : i + 3])
            for _ in range(2):
                tokens += run_step(backend, [Turn(one, 1)], []).outcomes
        played.append([output.token_ids for output in tokens if isinstance(output, RoundOutput)])
        assert len(played[-1]) == 4
    assert played[0] == played[1]
    assert recorder.replayed >= 2 and recorder.waits == 5  # of four rounds, and of one that was thrown away
