"""What the engine is asked and what it answers, from and to any thread."""

from __future__ import annotations

import asyncio
import queue
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field

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


@dataclass(frozen=True)
class Update:
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
        self._wake: Callable[[], object] = lambda: None

    def cancel(self) -> None:
        """End the request after the round under way and free its blocks; the last update says `cancelled`."""
        self._cancel(self)

    def wait(self) -> GenerationResult:
        """Read updates to the end. Raises EngineError where the request failed."""
        for _ in self:
            pass
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
        loop, ready = asyncio.get_running_loop(), asyncio.Event()
        self._wake = lambda: loop.call_soon_threadsafe(ready.set)
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
        self.push(Update(text, token_ids, stats, logprobs, finish_reason, self._last_update - before))

    def push(self, event: Event) -> None:
        """From the engine's thread: an update, or the error that ends the request."""
        self._events.put(event)
        try:
            self._wake()
        except RuntimeError:  # the reader's event loop is closed: nobody listens any more
            self._wake = lambda: None

    @staticmethod
    def _checked(event: Event) -> Update:
        if isinstance(event, Exception):
            raise event
        return event
