"""What the engine is asked and what it answers, from and to any thread."""

from __future__ import annotations

import asyncio
import functools
import queue
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from gemma_mtp.decoding.draft_length import DraftTokens
from gemma_mtp.decoding.sampling import SamplingParams
from gemma_mtp.decoding.verify import Verification
from gemma_mtp.engine.result import FinishReason, GenerationResult, RoundStats, TokenLogprob


@dataclass(frozen=True)
class Request:
    """One prompt to complete. Of waiting requests, those of lower `priority` come first, then the older ones.

    `draft_tokens`: drafts a round; 0 is plain decoding, "auto" what pays most among the sequences then running.
    """

    prompt_token_ids: Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    draft_tokens: DraftTokens = "auto"
    verification: Verification = "exact"
    priority: int = 0


class Update(NamedTuple):
    """What one round brought a request: the text that became certain, its tokens, and how the round went.

    The update with a `finish_reason` is the last. `seconds`: since the update before it, or since the request came.
    """

    text: str
    token_ids: list[int]
    round: RoundStats | None
    logprobs: list[TokenLogprob] | None
    finish_reason: FinishReason | None
    seconds: float = 0.0


Event = Update | Exception


class Generation:
    """A request under way. Its updates are read once, by iterating or by `updates`; `result` grows while it runs.

    `cached_tokens`: how many of the prompt's tokens were taken from an earlier request's blocks.
    """

    def __init__(self, request: Request, result: GenerationResult, cancel: Callable[[Generation], None]) -> None:
        self.request = request
        self.result = result
        self.cached_tokens = 0
        self._cancel = cancel
        self._last_update = time.perf_counter()
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._ended = threading.Event()
        self._failure: Exception | None = None
        self._wake: Callable[[], object] | None = None

    def cancel(self) -> None:
        """End the request after the round under way and free its blocks; the last update says `cancelled`."""
        self._cancel(self)

    def wait(self) -> GenerationResult:
        """Wait for the end, reading no updates. Raises EngineError where the request failed."""
        self._ended.wait()
        if self._failure is not None:
            raise self._failure
        return self.result

    def __iter__(self) -> Iterator[Update]:
        """Updates as they come, blocking. Raises EngineError where the request failed."""
        while True:
            update = self._checked(self._events.get())
            yield update
            if update.finish_reason is not None:
                return

    async def updates(self) -> AsyncIterator[Update]:
        """The same for an event loop. Whoever leaves early should `cancel`."""
        ready = asyncio.Event()
        self._wake = functools.partial(_waker(asyncio.get_running_loop()).wake, ready)
        while True:
            ready.clear()  # before looking: what comes after sets it again
            try:
                update = self._checked(self._events.get_nowait())
            except queue.Empty:
                await ready.wait()
                continue
            yield update
            if update.finish_reason is not None:
                return

    def update(
        self, text: str, token_ids: list[int], stats: RoundStats | None, logprobs: list[TokenLogprob] | None,
        finish_reason: FinishReason | None,
    ) -> None:  # fmt: skip
        """From the engine's thread: what a round brought."""
        before, self._last_update = self._last_update, time.perf_counter()
        self._push(Update(text, token_ids, stats, logprobs, finish_reason, self._last_update - before))
        if finish_reason is not None:
            self._ended.set()

    def fail(self, error: Exception) -> None:
        """From the engine's thread: the error that ends the request."""
        self._failure = error
        self._push(error)
        self._ended.set()

    def _push(self, event: Event) -> None:
        self._events.put(event)
        if self._wake is not None:
            self._wake()

    @staticmethod
    def _checked(event: Event) -> Update:
        if isinstance(event, Exception):
            raise event
        return event


class _Waker:
    """Wakes the readers in one event loop: all that a step has news for by one call into the loop, which is dear."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._ready: list[asyncio.Event] = []

    def wake(self, ready: asyncio.Event) -> None:
        """From any thread."""
        with self._lock:
            self._ready.append(ready)
            first = len(self._ready) == 1
        if first:
            try:
                self._loop.call_soon_threadsafe(self._flush)
            except RuntimeError:  # the loop is closed: nobody listens any more
                self._ready.clear()

    def _flush(self) -> None:
        with self._lock:
            found, self._ready = self._ready, []
        for ready in found:
            ready.set()


_wakers: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Waker] = weakref.WeakKeyDictionary()


def _waker(loop: asyncio.AbstractEventLoop) -> _Waker:
    """The loop's own, made from its thread."""
    if loop not in _wakers:
        _wakers[loop] = _Waker(loop)
    return _wakers[loop]
