"""A mixed load for the engine, each request with what a lone run of it gives."""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gemma_mtp.decoding.params import SamplingParams
from gemma_mtp.engine.pair import Pair
from gemma_mtp.engine.request import Generation, Request
from gemma_mtp.engine.result import GenerationResult
from gemma_mtp.engine.settings import EngineSettings, EngineStats
from gemma_mtp.engine.thread import EngineThread


@dataclass
class Loaded:
    """What a load came to: requests whose output is not a lone run's, the engine's counters at the end, and outputs."""

    mismatches: list[Request]
    completed: int
    cancelled: int
    stats: EngineStats

    def count(self, request: Request, result: GenerationResult, alone: GenerationResult) -> None:
        """A cancelled output must be the beginning of the lone one, any other the whole of it."""
        ended = result.finish_reason != "cancelled"
        tokens = len(alone.token_ids if ended else result.token_ids)
        same = result.token_ids == alone.token_ids[:tokens] and (result.text == alone.text or not ended)
        same &= result.logprobs == (None if alone.logprobs is None else alone.logprobs[:tokens])
        self.mismatches += [] if same else [request]
        self.completed += ended
        self.cancelled += not ended


def requests(beginnings: Sequence[Sequence[int]], count: int, seed: int, longest: int) -> list[Request]:
    """Prompts that often begin alike, of mixed lengths, parameters, draft lengths and priorities."""
    rng = random.Random(seed)
    found = []
    for i in range(count):
        beginning = rng.choice(beginnings)
        prompt = [*beginning[: rng.randint(1, len(beginning))], *rng.choices(beginnings[0], k=rng.randint(0, 3))]
        params = SamplingParams(
            max_tokens=rng.randint(1, longest), temperature=rng.choice([0.0, 0.0, 0.0, rng.uniform(0.2, 1.5)]),
            top_k=rng.choice([0, 0, 20]), top_p=rng.choice([1.0, 1.0, 0.9]), seed=rng.getrandbits(60), ignore_eos=True,
            repetition_penalty=rng.choice([1.0, 1.0, 1.2]), logprobs=rng.choice([None, None, 2]),
        )  # fmt: skip
        drafts = rng.choice([0, "auto", "auto", 1, 4, 8])
        found.append(Request(prompt, params, drafts, priority=rng.choice([0, 0, 0, 1, -1])))  # type: ignore[arg-type]
        if i % 10 == 9:  # the very same again
            found[-1] = found[rng.randrange(len(found))]
    return found


def lone(pair: Pair, request: Request) -> GenerationResult:
    return pair.generate(request.prompt_token_ids, request.params, draft_tokens=0)


def play(pair: Pair, load: Sequence[Request], settings: EngineSettings, seed: int = 0) -> Loaded:
    """Send a load in bursts, cancel one request in four somewhere on its way, compare all outputs."""
    rng = random.Random(seed)
    finished: list[tuple[Request, GenerationResult]] = []
    with EngineThread(pair, settings) as engine:
        pending: list[Generation] = []
        for request in load:
            pending.append(engine.submit(request))
            if rng.random() < 0.25:
                _cancel_after(pending[-1], rng.randint(1, 4))
            if len(pending) >= 24:
                finished += [_finish(pending.pop(rng.randrange(len(pending)))) for _ in range(12)]
        finished += [_finish(one) for one in pending]
        stats = engine.stats()
    expected: dict[int, GenerationResult] = {}
    loaded = Loaded([], 0, 0, stats)
    for request, result in finished:
        if id(request) not in expected:
            expected[id(request)] = lone(pair, request)
        loaded.count(request, result, expected[id(request)])
    return loaded


def _cancel_after(generation: Generation, updates: int) -> None:
    """Cancel it when so many more updates have come, in the engine's thread: a reader may come too late to."""
    push, left = generation._push, itertools.count(updates - 1, -1)

    def counted(event: Any, last: bool) -> None:
        push(event, last)
        if next(left) == 0:
            generation.cancel()

    generation._push = counted  # type: ignore[method-assign]


def _finish(generation: Generation) -> tuple[Request, GenerationResult]:
    """Read to the end."""
    for _ in generation:
        pass
    return generation.request, generation.result
