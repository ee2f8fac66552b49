"""What benchmarks/serving.py measures with: the engine as the other side of a load, and mixed requests."""

# mypy: disable-error-code="func-returns-value"

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import threading
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace

import httpx
import pytest
import serving
from engine_load import body, greedy, held_out, mixed, serve_options, streamed_from_engine, to_engine, to_server
from live_server import SECONDS, wait_for
from models import VOCAB, agreeing_pair

from gemma_mtp import load_pair
from gemma_mtp.backend.select import make_backend
from gemma_mtp.config.generation import GenerationDefaults
from gemma_mtp.engine.engine import Engine
from gemma_mtp.engine.job import Job
from gemma_mtp.engine.pair import Pair
from gemma_mtp.engine.request import Generation, Update
from gemma_mtp.engine.settings import EngineSettings
from gemma_mtp.engine.thread import EngineThread
from gemma_mtp.measure.load import ClosedLoop, Extent, Reply, run_load

PROMPTS = [[7, 3, 11], [5, 6, 7, 8, 9]]


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair(make_backend(*agreeing_pair(3)), None, GenerationDefaults(()))


def test_a_load_on_the_engine_has_its_outputs_and_counts(pair: Pair) -> None:
    outputs: dict[int, list[int]] = {}
    requests = greedy(PROMPTS, 12, 3)
    with EngineThread(pair) as engine:
        send = to_engine(engine, requests, outputs.__setitem__)
        records = asyncio.run(run_load(ClosedLoop(2), send, Extent(3, warmup=1)))
    expected = [pair.generate(PROMPTS[i % 2], requests(i).params, draft_tokens=3) for i in range(4)]
    assert [outputs[i] for i in range(4)] == [result.token_ids for result in expected]
    for record, result in zip(records, expected[1:], strict=True):
        reply = record.reply
        assert (reply.prompt_tokens, reply.output_tokens) == (len(result.prompt_token_ids), 12)
        assert (reply.accepted_drafts, reply.rejected_drafts) == (result.accepted, result.drafted - result.accepted)
        assert len(record.chunks) == len(result.rounds)


def test_a_stream_from_the_engine_is_read_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at its end: the engine goes on after some steps when the first text has been read."""
    steps, seen, play, updates = itertools.count(), threading.Event(), Engine.play, Generation.updates

    def waiting(engine: Engine) -> None:
        assert next(steps) < 3 or seen.wait(SECONDS)
        play(engine)

    async def noticed(generation: Generation) -> AsyncIterator[Update]:
        async for update in updates(generation):
            if update.text:
                seen.set()
            yield update

    monkeypatch.setattr(Engine, "play", waiting)
    monkeypatch.setattr(Generation, "updates", noticed)
    pair = load_pair()
    requests = greedy(held_out(pair, 8), 24, 3)
    with EngineThread(pair) as engine:
        (record,) = asyncio.run(run_load(ClosedLoop(1), streamed_from_engine(engine, requests), Extent(1)))
    result = pair.generate(requests(0).prompt_token_ids, requests(0).params, draft_tokens=3)
    assert record.reply.output_tokens == 24 and record.reply.accepted_drafts == result.accepted
    assert next(steps) > 3 and 1 < len(record.chunks) <= len(result.rounds)
    assert list(record.chunks) == sorted(record.chunks)


def test_a_batch_is_measured_over_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many run as may, while requests wait; outputs are compared."""
    most: dict[int, int] = {}
    submitted = Counter[Engine]()
    play, add = Engine.play, Engine.add

    def counted(engine: Engine, job: Job) -> Generation:
        generation = add(engine, job)
        submitted[engine] += 1
        return generation

    def watched(engine: Engine) -> None:
        allowed = engine.settings.max_running
        wait_for(lambda: submitted[engine] % (2 * allowed) == 0)  # all of a repeat's, before its first step
        play(engine)
        most[allowed] = max(most.get(allowed, 0), engine.scheduler.ran_lately)

    monkeypatch.setattr(Engine, "add", counted)
    monkeypatch.setattr(Engine, "play", watched)
    options = ["batch", "--sequences", "1", "3", "--requests", "2", "--max-tokens", "6", "--repeats", "2"]
    args = serving.parse([*options, "--prompt-tokens", "5"])
    content = serving.measure_batch(load_pair(), args)
    assert most == {1: 1, 3: 3}
    assert {running: len(speeds) for running, speeds in content["tokens_per_second"].items()} == {1: 2, 3: 2}
    assert content["ratios_to_first"][1] == {"median": 1, "least": 1, "greatest": 1}
    assert content["same_outputs"] == {1: True, 3: True}
    assert serving.show_batch(content).row_count == 2


def test_cancelled_requests_end_early(pair: Pair) -> None:
    with EngineThread(pair) as engine:
        send = to_engine(engine, greedy(PROMPTS, 4000, 0), cancelled=lambda number: True)
        (record,) = asyncio.run(run_load(ClosedLoop(1), send, Extent(1)))
    assert record.completed and record.reply.output_tokens < 4000


def test_mixed_requests_are_of_all_kinds_and_a_function_of_their_number() -> None:
    requests = [mixed(PROMPTS)(number) for number in range(300)]
    assert requests == [mixed(PROMPTS)(number) for number in range(300)]
    assert {request.draft_tokens for request in requests} == {"auto", 0, 3}
    assert {request.params.greedy for request in requests} == {True, False}
    assert {bool(request.params.stop) for request in requests} == {True, False}
    assert {request.params.max_tokens for request in requests} == set(range(1, 9))
    assert {len(request.prompt_token_ids) for request in requests} == {1, 2, 3, 4, 5}


def test_a_request_says_the_same_to_a_server() -> None:
    request = greedy(PROMPTS, 12, "auto")(0)
    said = {"prompt": PROMPTS[0], "draft_tokens": "auto", "temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0,
            "max_tokens": 12, "ignore_eos": True}  # fmt: skip
    assert body(request) == said
    stopping = replace(request, params=replace(request.params, stop=("a",), logprobs=2))
    assert body(stopping) == {**said, "stop": ["a"], "logprobs": 2}
    options = argparse.Namespace(target="T", drafter="D", quantize=None, threads=2)
    assert serve_options(options) == ["--target", "T", "--drafter", "D", "--threads", "2"]


def test_a_whole_answer_has_the_counts_of_its_usage() -> None:
    details = {"accepted_prediction_tokens": 5, "rejected_prediction_tokens": 3}
    usage = {"prompt_tokens": 3, "completion_tokens": 12, "completion_tokens_details": details}
    transport = httpx.MockTransport(lambda request: httpx.Response(200, json={"usage": usage}))

    async def asked() -> Reply:
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            reply = await to_server(client, "m", greedy(PROMPTS, 12, "auto"), whole=True)(0)
            return reply if isinstance(reply, Reply) else reply()

    reply = asyncio.run(asked())
    assert (reply.prompt_tokens, reply.output_tokens, reply.accepted_drafts, reply.rejected_drafts) == (3, 12, 5, 3)
    assert len(reply.chunk_times) == 1 and reply.error is None


def test_the_prefix_measurement_sends_what_it_says(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts: list[list[int]] = []
    submit = EngineThread.submit
    monkeypatch.setattr(EngineThread, "submit", lambda engine, request: prompts.append(list(request.prompt_token_ids))
                        or submit(engine, request))  # fmt: skip
    content = serving.measure_prefix(pair, serving.parse(["prefix", "--prefix-tokens", "40", "--repeats", "2"]))
    assert {name: len(seconds) for name, seconds in content["seconds"].items()} == {
        "first": 2, "same beginning": 2, "another beginning": 2
    }  # fmt: skip
    assert len(prompts) == 9 and {len(prompt) for prompt in prompts} == {40 + serving.PREFIX_TAIL}
    beginnings = [tuple(prompt[:40]) for prompt in prompts]
    for turn in (beginnings[:3], beginnings[3:6], beginnings[6:]):
        assert len(set(turn)) == 2
    assert len(set(beginnings)) == 6 and len({tuple(prompt[40:]) for prompt in prompts}) == 9
    assert max(map(max, prompts)) < VOCAB
    with pytest.raises(SystemExit, match="--prefix-tokens is 9999"):
        serving.measure_prefix(pair, serving.parse(["prefix", "--prefix-tokens", "9999"]))


def test_memory_is_read_after_the_warmup_and_in_equal_steps(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "held_out", lambda pair: PROMPTS)
    monkeypatch.setattr(serving, "mixed", lambda prompts: greedy(prompts, 2, 0))
    monkeypatch.setattr(serving, "READINGS", 4)
    readings = iter(range(1000, 100_000, 1000))
    monkeypatch.setattr(serving, "resident_bytes", lambda process: next(readings))
    content = serving.measure_memory(pair, serving.parse(["memory", "--requests", "40", "--warmup", "5"]))
    assert [number for number, _ in content["readings"]] == [5, 15, 25, 35, 45]
    assert content["growth_bytes"] == 4_000
    assert content["slope_bytes_per_request"] == pytest.approx(100.0)


def test_resident_memory_is_that_of_the_process() -> None:
    before = serving.resident_bytes(os.getpid())
    held = b"x" * (64 << 20)
    assert serving.resident_bytes(os.getpid()) - before > len(held) // 2


def test_the_engine_measurement_compares_outputs(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "held_out", lambda pair, longest: PROMPTS)
    arguments = ["engine", "--sequences", "1", "2", "--requests", "2", "--max-tokens", "6", "--repeats", "2"]
    content = serving.measure_engine(pair, serving.parse(arguments))
    assert content["same_outputs"] == {"1": True, "2": True}
    assert [level["clients"] for level in content["levels"]] == [1, 2]
    for level in content["levels"]:
        assert list(level["sides"]) == ["no drafts", "auto"]
        assert [side["completed"] for side in level["sides"].values()] == [4 * level["clients"]] * 2
        assert level["sides"]["no drafts"]["acceptance"] is None
    content["levels"][0]["sides"]["auto"].update(accepted_drafts=5, rejected_drafts=3, output_tokens=16)
    columns = {str(column.header): list(column.cells) for column in serving.show_levels(content).columns}
    assert columns["drafts a token"][0] == "0.000, 0.500"
    assert EngineSettings().prefix_reuse  # the prefix measurement is of the default
