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
from gemma_mtp.decoding.params import SamplingParams
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


def merged(updates: Sequence[Update]) -> Update:
    """Updates of one request that came one after the other, as one; the round is that of the last."""
    if len(updates) == 1:
        return updates[0]
    first, last = updates[0], updates[-1]
    logprobs = None if first.logprobs is None else [entry for update in updates for entry in update.logprobs or []]
    token_ids = [token_id for update in updates for token_id in update.token_ids]
    seconds = sum(update.seconds for update in updates)
    text = "".join([update.text for update in updates])
    return Update(text, token_ids, last.round, logprobs, last.finish_reason, seconds)


#: what the engine says of a round: when it was over, then an Update's fields but its text
_Event = tuple[float, list[int], RoundStats | None, list[TokenLogprob] | None, FinishReason | None] | Exception


class Generation:
    """A request under way. Its updates are read once, by iterating or by `updates`; `result` grows while it runs.

    `cached_tokens`: how many of the prompt's tokens were taken from an earlier request's blocks.
    `admitted_seconds`: how long it had waited when it was first run.
    """

    def __init__(self, request: Request, result: GenerationResult, cancel: Callable[[Generation], None]) -> None:
        self.request = request
        self.result = result
        self.cached_tokens = 0
        self.admitted_seconds = 0.0
        self._cancel = cancel
        self._text = result.text_reader()
        self._came = self._last_update = time.perf_counter()
        self._events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self._ended = threading.Event()
        self._failure: Exception | None = None
        self._wake: Callable[[], object] | None = None
        self._at_end = False

    def cancel(self) -> None:
        """End the request after the round under way and free its blocks; the last update says `cancelled`."""
        self._cancel(self)

    @property
    def ended(self) -> bool:
        """Whether its last update is there, or the error that ended it."""
        return self._ended.is_set()

    def wait(self) -> GenerationResult:
        """Wait for the end, reading no updates. Raises EngineError where the request failed."""
        self._ended.wait()
        if self._failure is not None:
            raise self._failure
        return self.result

    def __iter__(self) -> Iterator[Update]:
        """Updates as they come, blocking; none once the last was read. Raises EngineError where the request failed."""
        while not (self._ended.is_set() and self._events.empty()):
            update = self._read(self._events.get())
            yield update
            if update.finish_reason is not None:
                return

    async def updates(self) -> AsyncIterator[Update]:
        """The same for an event loop. Whoever leaves early should `cancel`."""
        ready = asyncio.Event()
        self.subscribe(ready)
        while True:
            await ready.wait()
            ready.clear()  # before looking: what comes after sets it again
            for update in self.take():
                yield update
                if update.finish_reason is not None:
                    return

    def subscribe(self, ready: asyncio.Event, at_end: bool = False) -> None:
        """Have `ready` set, in the running event loop: now, and when there are updates.

        `at_end`: only at the last one.
        """
        self._at_end = at_end
        self._wake = functools.partial(_waker(asyncio.get_running_loop()).wake, ready)
        ready.set()

    def leave_out_text(self) -> None:
        """Have updates without text from now on, which costs less: the result has all of it."""
        self._text = None

    def take(self) -> Iterator[Update]:
        """The updates that have come and were not read yet. Raises EngineError where the request failed."""
        while True:
            try:
                event = self._events.get_nowait()
            except queue.Empty:
                return
            yield self._read(event)

    def update(
        self, token_ids: list[int], stats: RoundStats | None, logprobs: list[TokenLogprob] | None,
        finish_reason: FinishReason | None,
    ) -> None:  # fmt: skip
        """From the engine's thread: what a round brought. Its text is made by who reads it, not by who others wait
        for."""
        self._push((time.perf_counter(), token_ids, stats, logprobs, finish_reason), finish_reason is not None)

    def admit(self, cached_tokens: int) -> None:
        """From the engine's thread: it runs for the first time."""
        self.cached_tokens, self.admitted_seconds = cached_tokens, time.perf_counter() - self._came

    def fail(self, error: Exception) -> None:
        """From the engine's thread: the error that ends the request."""
        self._failure = error
        self._push(error, last=True)

    def _push(self, event: _Event, last: bool) -> None:
        self._events.put(event)
        if last:  # before the reader is woken
            self._ended.set()
        if self._wake is not None and (last or not self._at_end):
            self._wake()

    def _read(self, event: _Event) -> Update:
        if isinstance(event, Exception):
            raise event
        now, token_ids, stats, logprobs, finish_reason = event
        before, self._last_update = self._last_update, now
        text = ""
        if self._text is not None:  # an output that was cancelled has no end, and what is held back stays so
            text = self._text.push(token_ids, last=finish_reason in ("stop", "length"))
        return Update(text, token_ids, stats, logprobs, finish_reason, now - before)


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
