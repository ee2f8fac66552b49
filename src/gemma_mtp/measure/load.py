"""Sends requests as a load and notes when each was due, sent, answered and done.

Two shapes. In an **open loop** requests come when the schedule says, whether or not earlier ones are done, as users who
know nothing of each other do; `intended` is the scheduled time and every latency counts from it, so that a server that
stalls is charged for the requests it kept from being sent (no coordinated omission). In a **closed loop** each client
sends its next request when its last one is done; `intended` is that moment, and a slow server is asked less.

Time is the running event loop's, so that tests run on a loop whose clock they turn.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class OpenLoop:
    """`rate` requests a second: at exponential gaps (Poisson arrivals), or at equal ones."""

    rate: float
    equal_gaps: bool = False

    @property
    def label(self) -> str:
        return f"{self.rate:g}/s"

    def times(self, seed: int) -> Iterator[float]:
        """Seconds from the load's start at which requests are due, without end."""
        if self.equal_gaps:
            yield from (i / self.rate for i in itertools.count())
        generator = np.random.default_rng(seed)
        due = 0.0
        while True:
            due += float(generator.exponential(1 / self.rate))
            yield due


@dataclass(frozen=True)
class ClosedLoop:
    """`clients` that each have one request under way at any time."""

    clients: int

    @property
    def label(self) -> str:
        return "1 client" if self.clients == 1 else f"{self.clients} clients"


Shape = OpenLoop | ClosedLoop


@dataclass(frozen=True)
class Extent:
    """How long a load goes on: so many requests or seconds, whichever is over first, after `warmup` requests.

    Warm-up requests are the load's first ones; the load does not pause after them.
    """

    requests: int | None
    seconds: float | None = None
    warmup: int = 0


@dataclass(frozen=True)
class Reply:
    """What came back: when text came (the loop's time, one entry a chunk), the usage, and what went wrong.

    `error` is a kind of failure, None where there was none. `retry_after`: seconds a refusal (429) asked to wait.
    """

    chunk_times: tuple[float, ...] = ()
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    accepted_drafts: int = 0
    rejected_drafts: int = 0
    error: str | None = None
    retry_after: float | None = None


#: sends the request of a number and reads its answer to the end; failures are replies too. What takes time to find out
#: may be left for when the load is over
Send = Callable[[int], Awaitable[Reply | Callable[[], Reply]]]


@dataclass(frozen=True)
class Record:
    """One request: its number, and seconds since the load's start."""

    number: int
    intended: float
    sent: float
    chunks: tuple[float, ...]
    done: float
    reply: Reply = field(repr=False)

    @property
    def completed(self) -> bool:
        return self.reply.error is None

    @property
    def refused(self) -> bool:
        """Turned away with a time to come back at, as a full server should."""
        return self.reply.retry_after is not None

    @property
    def send_delay(self) -> float:
        """Seconds the request waited here, for its turn or for the load generator."""
        return self.sent - self.intended

    @property
    def time_to_first_token(self) -> float | None:
        return self.chunks[0] - self.intended if self.chunks else None

    @property
    def time_per_output_token(self) -> float | None:
        """Mean seconds of a token after the first; None for outputs of one token."""
        tokens = self.reply.output_tokens
        return (self.chunks[-1] - self.chunks[0]) / (tokens - 1) if self.chunks and tokens > 1 else None

    @property
    def chunk_gaps(self) -> list[float]:
        """Seconds between chunks, each of which brings the tokens of a round."""
        return [later - earlier for earlier, later in itertools.pairwise(self.chunks)]

    @property
    def end_to_end(self) -> float:
        return self.done - self.intended


async def run_load(
    shape: Shape, send: Send, extent: Extent, seed: int = 0, max_in_flight: int | None = None
) -> list[Record]:
    """Send the load and return the records of the requests after the warm-up, in the order they were due.

    `max_in_flight` bounds the requests of an open loop that are under way; more wait here, and their wait counts.
    """
    load = _Load(send, extent)
    if isinstance(shape, ClosedLoop):
        async with asyncio.TaskGroup() as tasks:
            for _ in range(shape.clients):
                tasks.create_task(load.client())
    else:
        slots = contextlib.nullcontext() if max_in_flight is None else asyncio.Semaphore(max_in_flight)
        async with asyncio.TaskGroup() as tasks:
            for due in shape.times(seed):
                if not load.more(due):
                    break
                await asyncio.sleep(load.started + due - load.loop.time())
                tasks.create_task(load.one(next(load.numbers), due, slots))
    return [load.record(answer) for answer in sorted(load.answers, key=lambda answer: answer.number)
            if answer.number >= extent.warmup]  # fmt: skip


class _Answer(NamedTuple):
    """A request that came back; times are the loop's."""

    number: int
    due: float  # since the load's start
    sent: float
    done: float
    reply: Reply | Callable[[], Reply]


class _Load:
    """A load under way."""

    def __init__(self, send: Send, extent: Extent) -> None:
        self.loop = asyncio.get_running_loop()
        self.started = self.loop.time()
        self.answers: list[_Answer] = []
        self.numbers = itertools.count()
        self._send, self._extent = send, extent
        self._given = 0
        self._counted_from = math.inf

    def more(self, due: float) -> bool:
        """Whether one more request shall be sent at that time; each that shall is asked for once."""
        extent = self._extent
        if self._given == extent.warmup:
            self._counted_from = due
        if extent.requests is not None and self._given >= extent.warmup + extent.requests:
            return False
        if extent.seconds is not None and due - self._counted_from >= extent.seconds:
            return False
        self._given += 1
        return True

    async def client(self) -> None:
        while self.more(due := self.loop.time() - self.started):
            await self.one(next(self.numbers), due, contextlib.nullcontext())

    async def one(self, number: int, due: float, slots: contextlib.AbstractAsyncContextManager[None]) -> None:
        async with slots:
            sent = self.loop.time()
            reply = await self._send(number)
            done = self.loop.time()
        self.answers.append(_Answer(number, due, sent, done, reply))

    def record(self, answer: _Answer) -> Record:
        reply = answer.reply() if callable(answer.reply) else answer.reply
        chunks = tuple(at - self.started for at in reply.chunk_times)
        return Record(answer.number, answer.due, answer.sent - self.started, chunks, answer.done - self.started, reply)
