"""Continuous batching: many requests decode together, one round of all of them at a time.

A thread of the engine's own plays steps while there is work. Requests come from any thread and are answered by
`Generation`s.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

import torch

from gemma_mtp.decoding.draft_length import LONGEST, DraftLength, Plan
from gemma_mtp.decoding.round import Sequence, open_sequence, play_round, prefill
from gemma_mtp.engine.output import OutputBuilder
from gemma_mtp.engine.pair import PREFILL_CHUNK_ROWS, Pair
from gemma_mtp.engine.request import Generation, Request, Update
from gemma_mtp.engine.result import GenerationResult
from gemma_mtp.errors import EngineError, QueueFullError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineSettings:
    """Limits of an engine.

    max_running         sequences that decode together
    max_waiting         requests that may wait beside them; one more is refused with QueueFullError
    max_tokens          prompt and output of one request together; None: the model's context
    kv_memory_mb        megabytes of keys and values of all sequences; None: room for `max_running` requests of a
                        quarter of `max_tokens` each
    max_stall_seconds   how long a prompt may keep the running sequences from their next round, about
    prefix_reuse        keep the keys and values of prompts for later prompts that begin alike
    """

    max_running: int = 16
    max_waiting: int = 256
    max_tokens: int | None = None
    kv_memory_mb: int | None = None
    max_stall_seconds: float = 0.05
    prefix_reuse: bool = True


@dataclass
class EngineStats:
    """Counters since the start, and how things stand now."""

    running: int = 0
    waiting: int = 0
    kv_blocks: int = 0
    kv_blocks_used: int = 0  # by running sequences
    kv_blocks_kept: int = 0  # for prompts to come, and given up when others need them
    prompt_tokens: int = 0
    prefix_hit_tokens: int = 0  # of them, taken from an earlier request's blocks
    output_tokens: int = 0
    steps: int = 0
    rounds: int = 0  # of single sequences
    draft_tokens: int = 0
    accepted_tokens: int = 0
    drafted_at: Counter[int] = field(default_factory=Counter)  # position in the round, from 0 -> drafts made there
    accepted_at: Counter[int] = field(default_factory=Counter)
    preemptions: int = 0
    finished: Counter[str] = field(default_factory=Counter)  # stop, length, cancelled, error


@dataclass(eq=False)
class Running:
    """A request and what decoding it needs."""

    generation: Generation
    output: OutputBuilder
    policy: DraftLength | None
    fixed: Plan
    sequence: Sequence | None = None


class Engine:
    """Decodes requests of one pair together. Thread-safe; start it with `start` or as a context manager."""

    def __init__(self, pair: Pair, settings: EngineSettings | None = None) -> None:
        self.pair = pair
        self.settings = settings or EngineSettings()
        context = pair.target.config.max_position_embeddings
        self.max_tokens = min(context, self.settings.max_tokens or context)
        self._condition = threading.Condition()
        self._order = itertools.count()
        self._waiting: list[tuple[int, int, Generation]] = []
        self._running: list[Running] = []
        self._cancelled: set[Generation] = set()
        self._stats = EngineStats()
        self._stopping = False
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Engine:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self) -> None:
        """Begin to play steps, in a thread of the engine's own."""
        assert self._thread is None
        self._thread = threading.Thread(target=self._loop, name="gemma-mtp-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Generation:
        """Queue a request.

        Raises PromptError, SamplingError, TokenizerError where it can not run, QueueFullError, and EngineError where
        the engine is stopping.
        """
        prompt = self.pair.encode(request.prompt_token_ids)
        self.pair.check(request.params, request.draft_tokens, request.verification)
        drafts = request.draft_tokens if self.pair.drafter is not None else 0
        generation = Generation(request, GenerationResult(prompt, drafts, request.verification), self._cancel)
        with self._condition:
            if self._stopping:
                raise EngineError("the engine is stopping and takes no more requests; send it to another one.")
            if len(self._waiting) >= self.settings.max_waiting:
                raise QueueFullError(
                    f"{len(self._waiting)} requests are waiting already, which is as many as may; try again later."
                )
            heapq.heappush(self._waiting, (request.priority, next(self._order), generation))
            self._condition.notify_all()
        return generation

    def stop(self, drain_seconds: float = 0.0) -> None:
        """Take no more requests, let those that are here go on for so long, cancel the rest and end the thread."""
        with self._condition:
            self._stopping = True
            self._condition.notify_all()
            self._condition.wait_for(lambda: not self._running and not self._waiting, drain_seconds)
            self._cancelled.update(entry[2] for entry in self._waiting)
            self._cancelled.update(running.generation for running in self._running)
            self._condition.notify_all()
        if self._thread is not None:
            self._thread.join()

    def stats(self) -> EngineStats:
        """A snapshot."""
        with self._condition:
            self._stats.running, self._stats.waiting = len(self._running), len(self._waiting)
            return self._stats

    def _cancel(self, generation: Generation) -> None:
        with self._condition:
            self._cancelled.add(generation)
            self._condition.notify_all()

    def _loop(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._waiting or self._running or self._stopping)
                if self._stopping and not self._waiting and not self._running:
                    return
            self._step()

    def _step(self) -> None:
        """Take in cancellations and new requests, then one round of every running sequence."""
        self._take_in()
        for running in list(self._running):
            try:
                with torch.inference_mode():
                    self._play(running)
            except Exception as error:
                log.exception("a request failed")
                failure = EngineError(f"the request failed inside the engine ({error}); others go on.")
                self._finish(running, "error", failure)
        with self._condition:
            self._stats.steps += 1
            self._condition.notify_all()

    def _take_in(self) -> None:
        with self._condition:
            for entry in [entry for entry in self._waiting if entry[2] in self._cancelled]:
                self._waiting.remove(entry)
                heapq.heapify(self._waiting)
                self._end(entry[2])
            for running in [running for running in self._running if running.generation in self._cancelled]:
                self._running.remove(running)
                self._end(running.generation)
            self._cancelled.clear()
            while self._waiting and len(self._running) < self.settings.max_running:
                self._running.append(self._admit(heapq.heappop(self._waiting)[2]))

    def _end(self, generation: Generation) -> None:
        generation.result.finish_reason = "cancelled"
        self._stats.finished["cancelled"] += 1
        generation.push(Update("", [], None, None, "cancelled"))

    def _admit(self, generation: Generation) -> Running:
        request, result = generation.request, generation.result
        limit = min(request.params.max_tokens, self.max_tokens - len(result.prompt_token_ids))
        output = OutputBuilder(result, request.params, limit, self.pair.eos_token_ids, self.pair.tokenizer)
        if result.draft_tokens == "auto":
            policy = DraftLength(self.pair.round_costs(request.params.is_argmax))
            return Running(generation, output, policy, Plan(LONGEST))
        return Running(generation, output, None, Plan(result.draft_tokens))

    def _play(self, running: Running) -> None:
        pair, generation, output = self.pair, running.generation, running.output
        started = time.perf_counter()
        if running.sequence is None:
            prompt = generation.result.prompt_token_ids
            sequence = open_sequence(
                pair.target, len(prompt), output.max_tokens, running.fixed.longest, generation.request.params
            )
            device = pair.target.embed_tokens.weight.device
            played = prefill(pair.target, sequence, torch.tensor(prompt, device=device), PREFILL_CHUNK_ROWS)
            running.sequence = sequence
            self._stats.prompt_tokens += len(prompt)
        else:
            plan = running.fixed if running.policy is None else running.policy.choose()
            drafts = min(plan.longest, output.remaining - 1)
            played = play_round(
                pair.target, pair.drafter, running.sequence, drafts, generation.request.verification, plan.stop
            )
        before = len(generation.result.token_ids)
        text = output.push(played)
        seconds = time.perf_counter() - started
        result = generation.result
        if len(result.rounds) == 1:
            result.prefill_seconds = seconds
        else:
            result.decode_seconds += seconds
            if running.policy is not None:
                running.policy.record(played.drafted, played.accepted, played.confidences, seconds)
        self._count(played.drafted, played.accepted, len(result.token_ids) - before)
        logprobs = None if result.logprobs is None else result.logprobs[before:]
        finish = result.finish_reason if output.done else None
        generation.push(Update(text, result.token_ids[before:], result.rounds[-1], logprobs, finish))
        if output.done:
            self._finish(running, result.finish_reason, None)

    def _count(self, drafted: int, accepted: int, committed: int) -> None:
        stats = self._stats
        stats.rounds += 1
        stats.output_tokens += committed
        stats.draft_tokens += drafted
        stats.accepted_tokens += accepted
        stats.drafted_at.update(range(drafted))
        stats.accepted_at.update(range(accepted))

    def _finish(self, running: Running, reason: str, failure: Exception | None) -> None:
        with self._condition:
            self._running.remove(running)
            self._stats.finished[reason] += 1
        if failure is not None:
            running.generation.push(failure)
