"""Requests as a load on the engine in this process, and the same ones on a server."""

from __future__ import annotations

import argparse
import asyncio
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import httpx
import numpy as np

from gemma_mtp import SamplingParams
from gemma_mtp.datasets import read_examples
from gemma_mtp.engine.pair import Pair, bundled_directory
from gemma_mtp.engine.request import Generation, Request
from gemma_mtp.engine.thread import EngineThread
from gemma_mtp.measure.load import Reply, Send
from gemma_mtp.measure.load_client import reply_of, stream
from gemma_mtp.measure.load_requests import Ask

#: the request of a number
Requests = Callable[[int], Request]


def held_out(pair: Pair, longest: int | None = None) -> list[list[int]]:
    """The bundled held-out prompts, or their first tokens."""
    assert pair.tokenizer is not None, "needs a target with a tokenizer"
    examples = read_examples(bundled_directory() / "heldout_prompts.jsonl")
    vocab_size = pair.target.config.vocab_size
    return [example.token_ids(pair.tokenizer, vocab_size=vocab_size)[:longest] for example in examples]


def greedy(prompts: Sequence[list[int]], max_tokens: int, draft_tokens: Any) -> Requests:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return lambda number: Request(prompts[number % len(prompts)], params, draft_tokens)


def mixed(prompts: Sequence[list[int]]) -> Requests:
    """Small requests of all kinds: greedy and drawn, drafted and not, with stop strings and log-probabilities."""

    def request(number: int) -> Request:
        draw = np.random.default_rng(number)
        params = SamplingParams(
            temperature=float(draw.choice([0.0, 0.8])), top_p=float(draw.choice([1.0, 0.9])), seed=number,
            max_tokens=int(draw.integers(1, 9)), stop=("\n",) if draw.random() < 0.3 else (),
            logprobs=2 if draw.random() < 0.2 else None,
        )  # fmt: skip
        prompt = prompts[int(draw.integers(len(prompts)))][: int(draw.integers(1, 65))]
        return Request(prompt, params, ("auto", 0, 3)[int(draw.integers(3))])

    return request


def serve_options(args: argparse.Namespace) -> list[str]:
    """That make a server's pair the one here."""
    options = [(f"--{name}", getattr(args, name)) for name in ("target", "drafter", "quantize", "threads")]
    return [str(word) for name, value in options if value is not None for word in (name, value)]


def to_engine(
    engine: EngineThread,
    requests: Requests,
    finished: Callable[[int, list[int]], object] = lambda number, token_ids: None,
    cancelled: Callable[[int], bool] = lambda number: False,
    at_once: bool = False,
) -> Send:
    """Submit to the engine. `finished` gets the output of every request; those `cancelled` are so after a round.

    The event loop is woken at a request's end only, and when each update came is read when the load is over, or at once
    (`at_once`), which keeps less in memory: what is done here meanwhile takes time of the engine's cores.
    """

    async def send(number: int) -> Reply | Callable[[], Reply]:
        generation, now = engine.submit(requests(number)), asyncio.get_running_loop().time()
        generation.leave_out_text()
        ready, cancel = asyncio.Event(), cancelled(number)
        generation.subscribe(ready, at_end=not cancel)
        while not generation.ended:
            await ready.wait()
            ready.clear()  # before looking: what comes after sets it again
            if cancel and generation.result.token_ids:
                generation.cancel()
        finished(number, generation.result.token_ids)
        reply = functools.partial(_reply, generation, now)
        return reply() if at_once else reply

    return send


def streamed_from_engine(engine: EngineThread, requests: Requests) -> Send:
    """Submit to the engine and read each update's text as it comes, as who shows or sends it on must."""

    async def send(number: int) -> Reply:
        generation, now = engine.submit(requests(number)), asyncio.get_running_loop().time
        times = [now() async for update in generation.updates() if update.text]
        return _usage(generation, times)

    return send


def _reply(generation: Generation, now: float) -> Reply:
    """Of a generation that has ended and was sent at that time."""
    times = []
    for update in generation.take():
        now += update.seconds
        times += [now] if update.token_ids else []
    return _usage(generation, times)


def _usage(generation: Generation, times: Sequence[float]) -> Reply:
    result = generation.result
    return Reply(
        tuple(times), len(result.prompt_token_ids), len(result.token_ids),
        accepted_drafts=result.accepted, rejected_drafts=result.drafted - result.accepted,
    )  # fmt: skip


def to_server(client: httpx.AsyncClient, model: str, requests: Requests, whole: bool = False) -> Send:
    """Post to a server's /v1/completions, prompts as token ids, and read a stream, or the `whole` answer at once."""

    async def send(number: int) -> Reply:
        ask = Ask("/v1/completions", {"model": model, **body(requests(number))})
        if not whole:
            return await stream(client, ask)
        answer = await client.post(ask.path, json=ask.body)
        answer.raise_for_status()
        now = asyncio.get_running_loop().time()
        return replace(reply_of(answer.json()["usage"]), chunk_times=(now,))

    return send


def body(request: Request) -> dict[str, Any]:
    """What a request says in the server's API."""
    params = request.params
    names = ("temperature", "top_k", "top_p", "seed", "max_tokens", "ignore_eos", "logprobs")
    fields = {name: getattr(params, name) for name in names if getattr(params, name) is not None}
    stop = {"stop": list(params.stop)} if params.stop else {}
    return {"prompt": list(request.prompt_token_ids), "draft_tokens": request.draft_tokens, **fields, **stop}
