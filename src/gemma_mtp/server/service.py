"""The engine as the server sees it: batches of generations that are read as one, end in time, and are counted."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field

from prometheus_client import Gauge

from gemma_mtp.engine.request import Generation, Request, Update
from gemma_mtp.engine.thread import EngineThread
from gemma_mtp.errors import EngineError, GemmaMtpError, SamplingError, TokenizerError
from gemma_mtp.server.errors import ApiError, from_engine, internal_error, shutting_down
from gemma_mtp.server.metrics import Metrics
from gemma_mtp.server.settings import ServerSettings

#: seconds between looks at whether the last request has ended
DRAIN_TICK = 0.02
#: seconds that answers get to say that they were cancelled
LAST_WORDS = 1.0


class InWork:
    """Counts requests in work, in the event loop. `on_load` is called with their number whenever it changes."""

    def __init__(self, gauge: Gauge) -> None:
        self.in_flight = 0
        self.on_load: Callable[[int], object] = lambda in_flight: None
        self._gauge = gauge

    @contextlib.contextmanager
    def in_work(self) -> Iterator[None]:
        """Count a request while it is in work."""
        self._count_request(1)
        try:
            yield
        finally:
            self._count_request(-1)

    def _count_request(self, more: int) -> None:
        self.in_flight += more
        self._gauge.inc(more)
        self.on_load(self.in_flight)


class Service(InWork):
    """What requests share. Raises TokenizerError for a checkpoint without a tokenizer."""

    def __init__(self, engine: EngineThread, settings: ServerSettings) -> None:
        if engine.pair.tokenizer is None:
            raise TokenizerError("the target's directory has no tokenizer.json, and a server needs one; add it.")
        self.engine = engine
        self.settings = settings
        self.tokenizer = engine.pair.tokenizer
        labels = {"model_name": settings.model_name, "engine": "0"}
        self.metrics = Metrics(engine, labels, settings.metrics_prefix)
        super().__init__(self.metrics.in_flight)
        self.created = int(time.time())
        self.draining = False

    @property
    def longest_prompt(self) -> int:
        """Tokens that a prompt may have."""
        most = self.engine.max_tokens - 1
        return min(most, self.settings.max_prompt_tokens or most)

    def submit(self, requests: Sequence[Request], deadline: float) -> Batch:
        """Queue requests, all of them or none; `deadline` is on the event loop's clock. Raises ApiError."""
        batch = Batch(self.metrics, deadline)
        try:
            for request in requests:
                batch.add(self.engine.submit(request))
        except GemmaMtpError as error:
            batch.close()
            raise from_engine(error) from None
        return batch

    async def drain(self, seconds: float) -> None:
        """Take no more requests, let those in work go on for so long, then cancel them and stop the engine."""
        self.draining = True
        await self._wait_for_requests(seconds)
        await asyncio.to_thread(self.engine.stop)
        await self._wait_for_requests(LAST_WORDS)

    async def _wait_for_requests(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.in_flight:
                    await asyncio.sleep(DRAIN_TICK)


@dataclass
class _Member:
    """A generation, and when its tokens came (seconds of `time.perf_counter`)."""

    generation: Generation
    first: float = 0.0
    reason: str | None = None  # why it ended


@dataclass
class Batch:
    """The generations of one HTTP request, by index."""

    metrics: Metrics
    deadline: float
    started: float = field(default_factory=time.perf_counter)
    members: list[_Member] = field(default_factory=list)
    first_token_seconds: float | None = None
    failure: Exception | None = None

    @property
    def generations(self) -> list[Generation]:
        return [member.generation for member in self.members]

    @property
    def reasons(self) -> list[str | None]:
        """Why each ended: stop, length, cancelled or error."""
        return [member.reason for member in self.members]

    def add(self, generation: Generation) -> None:
        self.members.append(_Member(generation))

    def close(self) -> None:
        """Cancel what still runs."""
        self.cancel()
        for member in self.members:
            if member.reason is None:
                self._end(member, "cancelled")

    def cancel(self) -> None:
        """Have the engine end what still runs; who reads the updates finds that out."""
        for member in self.members:
            if member.reason is None:
                member.generation.cancel()

    async def updates(self, at_end: bool = False) -> AsyncIterator[tuple[int, list[Update]]]:
        """Updates of all generations, with their index: as they come, each time all that have come by then; or, which
        is cheaper, each generation's when it has ended, without text. Raises ApiError (408, 500, 503)."""
        ready, late = asyncio.Event(), False

        def end() -> None:
            # not read off the clock once more: a loop's timers may be a little early by its own clock
            nonlocal late
            late = True
            ready.set()

        for member in self.members:
            member.generation.subscribe(ready, at_end)
            if at_end:
                member.generation.leave_out_text()
        going = dict(enumerate(self.members))
        alarm = asyncio.get_running_loop().call_at(self.deadline, end)
        try:
            while going:
                await ready.wait()
                ready.clear()  # before looking: what comes after sets it again
                if late:
                    raise ApiError(408, "the request took longer than this server allows; ask for fewer tokens.")
                for index, member in list(going.items()):
                    taken, failure = self._taken(member)
                    if taken:
                        yield index, taken
                    if failure is not None:
                        raise failure
                    if member.reason is not None:
                        del going[index]
        finally:
            alarm.cancel()

    def _taken(self, member: _Member) -> tuple[list[Update], ApiError | None]:
        """A generation's updates, and why there are no more, where it failed."""
        taken: list[Update] = []
        try:
            for update in member.generation.take():
                self._note(member, update)
                taken.append(update)
        except SamplingError as error:
            self._end(member, "error")
            return taken, from_engine(error)
        except EngineError as error:
            self._end(member, "error")
            self.failure = error
            return taken, internal_error()
        except ApiError as error:
            return taken, error
        return taken, None

    def _note(self, member: _Member, update: Update) -> None:
        if update.finish_reason == "cancelled":  # by the engine's end: after `close` nobody reads
            self._end(member, "cancelled")
            raise shutting_down()
        if not member.first:
            member.first = self.started + update.seconds
            self.metrics.first_token.observe(update.seconds)
            self.first_token_seconds = self.first_token_seconds or update.seconds
            admitted = member.generation.admitted_seconds
            self.metrics.queued.observe(admitted)
            self.metrics.prefill.observe(max(0.0, update.seconds - admitted))
        elif update.token_ids:
            self.metrics.between_tokens.observe(update.seconds / len(update.token_ids))
        if update.finish_reason is not None:
            self._end(member, update.finish_reason)
            self._count(member, time.perf_counter())

    def _end(self, member: _Member, reason: str) -> None:
        member.reason = reason
        self.metrics.requests.labels(reason).inc()

    def _count(self, member: _Member, now: float) -> None:
        result, metrics = member.generation.result, self.metrics
        tokens = len(result.token_ids)
        metrics.whole.observe(now - self.started)
        metrics.prompt_tokens.observe(len(result.prompt_token_ids))
        metrics.output_tokens.observe(tokens)
        metrics.wanted_tokens.observe(member.generation.request.params.max_tokens)
        if tokens:
            metrics.decode.observe(now - member.first)
        if tokens > 1:
            metrics.each_token.observe((now - member.first) / (tokens - 1))
