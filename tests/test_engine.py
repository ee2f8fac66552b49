"""Continuous batching: whatever runs beside a request, its output is that of a lone run."""

# mypy: disable-error-code="func-returns-value"

import asyncio
import dataclasses
import gc
import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from live_server import SECONDS
from mixed_load import lone, play, requests
from models import VOCAB, agreeing_pair, letters, native_only, random_drafter, random_target

from gemma_mtp.backend.native import set_threads
from gemma_mtp.backend.select import make_backend
from gemma_mtp.config.generation import GenerationDefaults
from gemma_mtp.datasets import read_examples
from gemma_mtp.decoding.draft_length import DraftLength
from gemma_mtp.decoding.params import ChoiceKind, SamplingParams
from gemma_mtp.decoding.round_costs import LONGEST, RoundCosts
from gemma_mtp.engine import draft as draft_module
from gemma_mtp.engine import execution as execution_module
from gemma_mtp.engine import round as round_module
from gemma_mtp.engine.engine import Engine
from gemma_mtp.engine.pair import Pair, bundled_directory, load_pair
from gemma_mtp.engine.request import Generation, Request, Update
from gemma_mtp.engine.settings import EngineSettings
from gemma_mtp.engine.thread import EngineThread
from gemma_mtp.errors import EngineError, PromptError, QueueFullError, SamplingError
from gemma_mtp.kv import blocks as blocks_module
from gemma_mtp.kv.blocks import BLOCK_ROWS

NAMES = blocks_module.block_names
LONG = [(7 * i * i + i) % VOCAB for i in range(300)]
OTHER = [(5 * i + 3) % VOCAB for i in range(200)]


def tiny_pair(directory: Path, centroids: bool = False) -> Pair:
    models = (random_target(3), random_drafter(seed=4, centroids=True)) if centroids else agreeing_pair(3)
    return Pair(make_backend(*models), letters(directory), GenerationDefaults(eos_token_ids=()))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return tiny_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def bundled() -> Iterator[Pair]:
    """With two threads, which divide the sequences among them."""
    threads = torch.get_num_threads()
    set_threads(2)
    yield load_pair()
    set_threads(threads)


def held_out_prompts(pair: Pair, least: int = 1) -> list[list[int]]:
    """Of so many tokens at least."""
    examples = read_examples(bundled_directory() / "heldout_prompts.jsonl")
    prompts = [pair.encode(example.content) for example in examples]  # type: ignore[arg-type]
    return [prompt for prompt in prompts if len(prompt) >= least]


def bundled_load(pair: Pair, count: int) -> list[Request]:
    return requests(held_out_prompts(pair)[:6], count, seed=count, longest=24)


#: room for little more than one request of the longest kind, so that a load of eight at a time sends some away
CRAMPED = EngineSettings(max_running=8, max_tokens=420, kv_memory_mb=0.4, max_stall_seconds=0.002)


@native_only
@pytest.mark.parametrize("centroids", [False, True])
def test_a_mixed_load_gives_what_lone_runs_give(tmp_path: Path, centroids: bool) -> None:
    pair = tiny_pair(tmp_path, centroids)
    loaded = play(pair, requests([LONG, OTHER], 40, seed=1, longest=60), CRAMPED)
    assert loaded.mismatches == []
    assert loaded.completed + loaded.cancelled == 40 and loaded.cancelled > 3
    assert loaded.stats.preemptions > 5 and loaded.stats.prefix_hit_tokens > 1000
    assert loaded.stats.accepted_tokens > 100 or centroids
    assert (loaded.stats.running, loaded.stats.waiting, loaded.stats.kv_blocks_used) == (0, 0, 0)


@native_only
@pytest.mark.parametrize("count", [12, pytest.param(2000, marks=pytest.mark.slow)])
def test_the_bundled_pair_under_load(bundled: Pair, count: int) -> None:
    settings = EngineSettings(max_running=8, max_tokens=250, kv_memory_mb=2, max_stall_seconds=0.002)
    loaded = play(bundled, bundled_load(bundled, count), settings)
    assert loaded.mismatches == []
    assert loaded.cancelled >= count // 40
    assert loaded.stats.preemptions > count / 40 and loaded.stats.prefix_hit_tokens > 10 * count
    assert loaded.stats.accepted_tokens > 2 * count
    assert loaded.stats.kv_blocks_used == 0


def own_names(ids: list[int], before: bytes = b"") -> list[bytes]:
    """Blocks named by their own tokens alone, whatever tokens come before them."""
    return [name for i in range(0, len(ids), BLOCK_ROWS) for name in NAMES(ids[i : i + BLOCK_ROWS])]


@native_only
@pytest.mark.parametrize(("names", "exact"), [(NAMES, True), (own_names, False)])
def test_a_block_is_shared_where_all_tokens_before_it_are_the_same(
    bundled: Pair, monkeypatch: pytest.MonkeyPatch, names: Any, exact: bool
) -> None:
    """And its control: blocks named by fewer tokens than they depend on give other outputs."""
    monkeypatch.setattr(blocks_module, "block_names", names)
    first, second, third, fourth = (one[:BLOCK_ROWS] for one in held_out_prompts(bundled, BLOCK_ROWS)[:4])
    params = SamplingParams(max_tokens=8, logprobs=2)
    load = [Request([*prompt, 5], params) for prompt in (first + second, third + fourth, first + fourth)]
    with EngineThread(bundled, EngineSettings(max_tokens=250)) as engine:
        results = [engine.submit(request).wait() for request in load]
        reused = engine.stats().prefix_hit_tokens
    alone = [lone(bundled, request) for request in load]
    same = [(a.token_ids, a.logprobs) == (b.token_ids, b.logprobs) for a, b in zip(results, alone, strict=True)]
    assert same == [True, True, exact]
    assert reused == (BLOCK_ROWS if exact else 2 * BLOCK_ROWS)


@pytest.fixture
def engine(pair: Pair) -> Iterator[EngineThread]:
    with EngineThread(pair, EngineSettings(max_running=4, max_waiting=8, max_tokens=400)) as engine:
        yield engine


def lone_pair(engine: EngineThread) -> Pair:
    """The engine's pair, for lone runs."""
    assert isinstance(engine.pair, Pair)
    return engine.pair


def updates(generation: Generation) -> list[Update]:
    return list(generation)


@contextmanager
def held(calls: int = 1) -> Iterator[None]:
    """The engine makes so many calls of the target, and the next one when the block has ended: however late this thread
    comes, nothing ends before."""
    go_on, made, forward = threading.Event(), itertools.count(), round_module.forward

    def wait(target: Any, rows: Any) -> Any:
        if next(made) >= calls:
            assert go_on.wait(SECONDS)
        return forward(target, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execution_module, "forward", wait)
        try:
            yield
        finally:
            go_on.set()


def test_updates_make_up_the_result(engine: EngineThread) -> None:
    generation = engine.submit(Request(LONG[:50], SamplingParams(max_tokens=30, logprobs=1), 4))
    seen = updates(generation)
    result = generation.result
    assert "".join(update.text for update in seen) == result.text
    assert [token for update in seen for token in update.token_ids] == result.token_ids
    assert [update.round for update in seen] == result.rounds
    assert [entry for update in seen for entry in update.logprobs or []] == result.logprobs
    assert [update.finish_reason for update in seen] == [None] * (len(seen) - 1) + ["length"]
    assert result.prefill_seconds > 0 and result.decode_seconds > 0


@pytest.mark.parametrize("draft_tokens", [0, 4])
def test_readers_see_no_stop_string(engine: EngineThread, draft_tokens: int) -> None:
    """They make the text of the tokens themselves, and come to where the engine ended the output."""
    text = lone_pair(engine).generate(LONG[:50], SamplingParams(max_tokens=30)).text
    assert text is not None
    for at in range(0, len(text) - 3, 5):
        stop = text[at : at + 3]
        generation = engine.submit(Request(LONG[:50], SamplingParams(max_tokens=30, stop=(stop,)), draft_tokens))
        seen = updates(generation)
        assert "".join(update.text for update in seen) == generation.result.text == text[: text.index(stop)]
        assert seen[-1].finish_reason == "stop"


def test_counters(engine: EngineThread) -> None:
    result = engine.submit(Request(LONG[:50], SamplingParams(max_tokens=30), 4)).wait()
    again = engine.submit(Request(LONG[:50], SamplingParams(max_tokens=30), 4)).wait()
    stats = engine.stats()
    assert again.token_ids == result.token_ids
    assert (stats.output_tokens, stats.prompt_tokens) == (60, 100)
    assert stats.prefix_hit_tokens == 32, "one whole block, and never the last row"
    assert (stats.draft_tokens, stats.accepted_tokens) == (2 * result.drafted, 2 * result.accepted)
    assert sum(stats.drafted_at.values()) == stats.draft_tokens
    assert stats.finished == {"length": 2} and stats.kv_blocks_kept > 0
    stats.finished["length"] = 7
    assert engine.stats().finished == {"length": 2}, "a snapshot"


def test_a_request_says_how_long_it_drafts(engine: EngineThread) -> None:
    for drafts in (0, 3, 8):
        result = engine.submit(Request([5, 6, 7], SamplingParams(max_tokens=20), drafts)).wait()
        assert {r.drafted for r in result.decode_rounds[:-1]} <= {drafts, 20 - 1}
        assert max(r.drafted for r in result.decode_rounds) == min(drafts, 18)


def test_more_drafts_than_a_lone_request_has_blocks_for(pair: Pair) -> None:
    params = SamplingParams(max_tokens=300)
    engine = EngineThread(pair, EngineSettings(max_running=1, max_tokens=400))
    engine.start()
    generation = engine.submit(Request([5, 6], params, 250))
    engine.stop(drain_seconds=SECONDS)  # and cancels what never comes to an end
    assert generation.wait().finish_reason == "length"
    assert generation.result.token_ids == pair.generate([5, 6], params, draft_tokens=0).token_ids


def test_lower_priority_numbers_go_first(pair: Pair) -> None:
    with EngineThread(pair, EngineSettings(max_running=1, max_tokens=400)) as engine:
        order: list[int] = []
        with held():
            first = engine.submit(Request(LONG, SamplingParams(max_tokens=60)))
            later = [engine.submit(Request([5], SamplingParams(max_tokens=1), priority=p)) for p in (2, 0, 1, -5)]
            for one in later:
                one.update = lambda *_, g=one: order.append(g.request.priority)  # type: ignore[method-assign]
        first.wait()
        engine.stop(drain_seconds=SECONDS)
    assert order == [-5, 0, 1, 2]


def test_a_long_prompt_does_not_keep_others_waiting(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds go on between its chunks."""
    with EngineThread(pair, EngineSettings(max_running=2, max_tokens=1000, max_stall_seconds=1e-9)) as engine:
        played: list[tuple[int, int]] = []
        forward = round_module.forward

        def spy(target: Any, calls: Any) -> Any:
            played.append((sum(c.keep == len(c.token_ids) for c in calls), max(len(c.token_ids) for c in calls)))
            return forward(target, calls)

        monkeypatch.setattr(execution_module, "forward", spy)
        with held():
            running = engine.submit(Request([5, 6], SamplingParams(max_tokens=390, ignore_eos=True), 0))
            next(iter(running))
            long = engine.submit(Request(LONG * 2, SamplingParams(max_tokens=2), 0))
        long.wait()
        running.cancel()
    with_chunk = [(rounds, rows) for rounds, rows in played if rows > 1]
    assert len(with_chunk) >= 600 // 32
    assert all(rounds == 1 and rows <= 32 for rounds, rows in with_chunk[1:-1])


def test_cancelling_frees_everything(engine: EngineThread) -> None:
    with held(calls=4):  # of which the first read prompts, all of them at most 128 rows a call
        generations = [engine.submit(Request(LONG, SamplingParams(max_tokens=90))) for _ in range(8)]
        next(iter(generations[0]))
        for generation in generations:
            generation.cancel()
    assert [generation.wait().finish_reason for generation in generations[1:]] == ["cancelled"] * 7
    assert updates(generations[0])[-1].finish_reason == "cancelled"
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.kv_blocks_used, stats.finished["cancelled"]) == (0, 0, 0, 8)
    generations[0].cancel()  # once more does nothing
    assert len(engine.submit(Request([5], SamplingParams(max_tokens=3))).wait().token_ids) == 3


def test_too_many_waiting_are_refused(pair: Pair) -> None:
    with EngineThread(pair, EngineSettings(max_running=1, max_waiting=2, max_tokens=400)) as engine:
        with held():
            running = engine.submit(Request([5], SamplingParams(max_tokens=90)))
            next(iter(running))
            for _ in range(2):
                engine.submit(Request([5], SamplingParams(max_tokens=2)))
            with pytest.raises(QueueFullError, match="2 requests are waiting") as caught:
                engine.submit(Request([5], SamplingParams(max_tokens=2)))
        assert caught.value.retry_after > 0


@pytest.mark.parametrize(
    ("request_", "error", "match"),
    [
        (Request([], SamplingParams()), PromptError, "empty"),
        (Request([VOCAB]), PromptError, f"token id {VOCAB}"),
        (Request([1] * 400), PromptError, "at most 400"),
        (Request([1], draft_tokens=-1), SamplingError, "draft_tokens"),
        (Request([1], verification="maybe"), SamplingError, "verification"),  # type: ignore[arg-type]
        (Request([1], SamplingParams(stop_token_ids=[VOCAB])), SamplingError, "stop_token_ids"),
    ],
)
def test_bad_requests_are_refused(engine: EngineThread, request_: Request, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        engine.submit(request_)
    assert engine.stats().waiting == 0


def test_memory_that_holds_no_request(pair: Pair) -> None:
    with pytest.raises(EngineError, match=r"1\.00 kB do not hold .* of 400 tokens, which take .* [kM]B"):
        EngineThread(pair, EngineSettings(max_tokens=400, kv_memory_mb=0.001))


@pytest.mark.parametrize("where", ["drafting", "concluding"])
def test_a_request_that_fails_fails_alone(engine: EngineThread, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    place = draft_module if where == "drafting" else round_module
    process = place.process

    def failing(logits: Any, params: SamplingParams, *rest: Any, **named: Any) -> Any:
        if params.seed == 666:
            raise ValueError("of this request")
        return process(logits, params, *rest, **named)

    monkeypatch.setattr(place, "process", failing)
    seeds = (1, 666, 3)
    drawn = [SamplingParams(max_tokens=20, temperature=1.0, top_p=0.95, seed=seed) for seed in seeds]
    generations = [engine.submit(Request([5, 6], params, 3)) for params in drawn]
    good = [generations[i].wait() for i in (0, 2)]
    with pytest.raises(EngineError, match=r"failed inside the engine: of this request"):
        generations[1].wait()
    stats = engine.stats()
    assert stats.finished == {"length": 2, "error": 1} and stats.kv_blocks_used == 0
    for result, params in zip(good, drawn[::2], strict=True):
        assert result.token_ids == lone_pair(engine).generate([5, 6], params, draft_tokens=0).token_ids


def test_after_a_call_that_fails_the_engine_goes_on(engine: EngineThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution_module, "forward", lambda *_: 1 / 0)
    with pytest.raises(EngineError, match="division by zero"):
        engine.submit(Request([5, 6], SamplingParams(max_tokens=20))).wait()
    monkeypatch.undo()
    assert len(engine.submit(Request([5, 6], SamplingParams(max_tokens=20))).wait().token_ids) == 20
    assert engine.stats().kv_blocks_used == 0


def test_after_a_plan_that_fails_the_engine_goes_on(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in the call of the target, but before it: what raises there would end the thread that steps."""
    engine = Engine(pair, EngineSettings(max_running=1, max_tokens=400))
    monkeypatch.setattr(engine.policy, "costs", lambda *_: 1 / 0)
    failing, waiting = (engine.submit(Request([5, 6], SamplingParams(max_tokens=20))) for _ in range(2))
    while not failing.ended:
        engine.step()
    with pytest.raises(EngineError, match="division by zero"):
        failing.wait()
    monkeypatch.undo()
    while not engine.idle:
        engine.step()
    assert len(waiting.wait().token_ids) == 20
    assert engine.stats().kv_blocks_used == 0


def test_stopping_drains_or_cancels(pair: Pair) -> None:
    engine = EngineThread(pair, EngineSettings(max_running=2, max_tokens=4000))
    engine.start()
    short = [engine.submit(Request([5, 6], SamplingParams(max_tokens=20))) for _ in range(4)]
    engine.stop(drain_seconds=SECONDS)
    assert [generation.wait().finish_reason for generation in short] == ["length"] * 4
    with pytest.raises(EngineError, match="stopping"):
        engine.submit(Request([5, 6]))
    engine = EngineThread(pair, EngineSettings(max_running=2, max_tokens=4000))
    engine.start()
    long = [engine.submit(Request([5, 6], SamplingParams(max_tokens=3900), 0)) for _ in range(4)]
    engine.stop()
    assert [generation.wait().finish_reason for generation in long] == ["cancelled"] * 4


def test_garbage_is_not_looked_for_in_the_models_of_an_engine(pair: Pair) -> None:
    gc.unfreeze()  # what is frozen while tests run
    try:
        with EngineThread(pair) as first:
            assert all(pair.target is not known for known in gc.get_objects())
        assert not gc.get_freeze_count()
        assert any(pair.target is known for known in gc.get_objects())
    finally:
        gc.freeze()  # the caller's own, which an engine leaves alone
    with EngineThread(pair):
        pass
    first.stop()
    assert gc.get_freeze_count()


def test_updates_in_an_event_loop(engine: EngineThread) -> None:
    async def run() -> list[str]:
        async def text(seed: int) -> str:
            generation = engine.submit(Request([5, 6], SamplingParams(max_tokens=15, temperature=1.0, seed=seed)))
            return "".join([update.text async for update in generation.updates()])

        return list(await asyncio.gather(*map(text, range(6))))

    expected = [
        lone_pair(engine).generate([5, 6], SamplingParams(max_tokens=15, temperature=1.0, seed=s)).text
        for s in range(6)
    ]
    assert asyncio.run(run()) == expected


def test_a_reader_that_left_does_no_harm(engine: EngineThread) -> None:
    async def leave() -> None:
        async for _ in engine.submit(Request([5, 6], SamplingParams(max_tokens=200), 0)).updates():
            return

    asyncio.run(leave())  # the loop is closed while the engine still pushes
    assert len(engine.submit(Request([5, 6], SamplingParams(max_tokens=20))).wait().token_ids) == 20


def test_costs_follow_the_number_that_runs(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[ChoiceKind, int]] = []
    measured = Pair.round_costs
    monkeypatch.setattr(Pair, "round_costs", lambda self, *key: asked.append(key) or measured(self, *key))
    with EngineThread(dataclasses.replace(pair), EngineSettings(max_running=6, max_tokens=400)) as engine:
        with held(calls=0):
            six = [engine.submit(Request(LONG[:9], SamplingParams(max_tokens=60))) for _ in range(6)]
        for generation in six:
            generation.wait()
        assert ("argmax", 8) in asked and all(choice == "argmax" for choice, _ in asked)
        engine.engine.scheduler.ran_lately = 6  # as where all have ended in the same step
        asked.clear()
        engine.submit(Request(LONG[:9], SamplingParams(max_tokens=60))).wait()
        counts = [count for _, count in asked]
    assert counts[0] > 1 and counts == sorted(counts, reverse=True) and counts[4:] == [1] * len(counts[4:])
    asked.clear()
    EngineThread(pair, EngineSettings(max_running=3, max_tokens=400)).warm_up()
    kinds = ("argmax", "drawn", "processed")  # what a backend does not choose itself has one kind of costs
    assert set(asked) == {(choice, count) for choice in kinds for count in (1, 2, 4)}


@native_only
def test_sequences_that_run_together_have_one_plan(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A newcomer drafts by what was accepted of the others' drafts; a lone one begins with little."""
    monkeypatch.setattr(Pair, "round_costs", lambda self, *key: RoundCosts({0: 1.0, LONGEST: 4.0}))
    monkeypatch.setattr(RoundCosts, "note", lambda *what: None)  # how long rounds really take decides nothing
    params, request = SamplingParams(max_tokens=60), Request(LONG[:9], SamplingParams(max_tokens=60))
    expected = pair.generate(LONG[:9], params, draft_tokens=0).token_ids

    def first_drafts(engine: EngineThread) -> int:
        result = engine.submit(request).wait()
        assert result.token_ids == expected
        return result.rounds[1].drafted  # after the one that ended the prompt

    known = DraftLength(RoundCosts({0: 1.0, LONGEST: 4.0}), early_stop=False)
    for _ in range(30):
        known.record(LONGEST, LONGEST)
    known.tried = known.rounds  # no other length is due for a trial
    shares: list[float] = []
    monkeypatch.setattr(known, "record", lambda *what: shares.append(what[-1]) or DraftLength.record(known, *what))
    together: list[int] = []
    monkeypatch.setattr(known, "use", lambda *what: together.append(what[-1]) or DraftLength.use(known, *what))
    with EngineThread(dataclasses.replace(pair), EngineSettings(max_running=3, max_tokens=400)) as engine:
        engine.engine.policy.watches_drafts = False
        assert 0 < first_drafts(engine) < 5
        assert not engine.engine.policy.shared
        engine.engine.policy.shared["argmax"] = known
        engine.engine.scheduler.ran_lately = 9  # as where others have just ended
        assert first_drafts(engine) == LONGEST
        assert together[:3] == [7, 6, 5]  # one less a step, the first of which read the prompt
        assert shares and set(shares) == {1.0}
        shares.clear()
        with held(calls=0):
            three = [engine.submit(request) for _ in range(3)]
        for generation in three:
            assert generation.wait().token_ids == expected
        assert set(shares) & {1 / 2, 1 / 3}  # of those that play a round, each has a part of it
        assert sum(shares) == pytest.approx(round(sum(shares)))


@native_only
def test_together_drafts_are_made_where_they_pay_among_so_many(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look at most where a row costs a plain round; rounds of drafts where it costs two thirds, though perfect ones
    would gain no more than half."""
    for of_row, many in ((1.0, False), (0.65, True)):
        costs = RoundCosts({0: 1.0, LONGEST: 1 + of_row * LONGEST})
        monkeypatch.setattr(Pair, "round_costs", lambda self, *key, costs=costs: costs)
        monkeypatch.setattr(costs, "note", lambda *what: None)
        known = DraftLength(costs, early_stop=False)
        for _ in range(20):
            known.record(4, 4)
        with EngineThread(dataclasses.replace(pair), EngineSettings(max_running=3, max_tokens=400)) as engine:
            engine.engine.policy.shared["argmax"] = known
            engine.engine.scheduler.ran_lately = 999  # falls by one a step
            drafted = engine.submit(Request(LONG[:9], SamplingParams(max_tokens=60))).wait().drafted
        assert drafted > 20 if many else drafted < 3
