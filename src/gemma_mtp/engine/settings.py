"""Limits of an engine, and what it counts."""

from __future__ import annotations

import copy
import threading
from collections import Counter
from dataclasses import dataclass, field


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
    kv_memory_mb: float | None = None
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

    def count_round(self, drafted: int, accepted: int) -> None:
        """Count one sequence's round."""
        self.rounds += 1
        if drafted:
            self.draft_tokens += drafted
            self.accepted_tokens += accepted
            self.drafted_at.update(range(drafted))
            self.accepted_at.update(range(accepted))


class StatsKeeper:
    """The counters of an engine, changed and copied under one lock: `with keeper as stats: stats.steps += 1`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stats = EngineStats()

    def __enter__(self) -> EngineStats:
        self._lock.acquire()
        return self._stats

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def snapshot(self) -> EngineStats:
        """Returns a copy."""
        with self as stats:
            return copy.deepcopy(stats)
