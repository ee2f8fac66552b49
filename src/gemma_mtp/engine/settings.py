"""Limits of an engine, and what it counts."""

from __future__ import annotations

import copy
import threading
from collections import Counter
from collections.abc import Iterable
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
    #: (drafts made, drafts accepted) -> rounds of single sequences
    rounds_of: Counter[tuple[int, int]] = field(default_factory=Counter)
    preemptions: int = 0
    finished: Counter[str] = field(default_factory=Counter)  # stop, length, cancelled, error

    @property
    def rounds(self) -> int:
        """Returns how many rounds single sequences played."""
        return self.rounds_of.total()

    @property
    def draft_tokens(self) -> int:
        return sum(drafted * rounds for (drafted, _), rounds in self.rounds_of.items())

    @property
    def accepted_tokens(self) -> int:
        return sum(accepted * rounds for (_, accepted), rounds in self.rounds_of.items())

    @property
    def drafted_at(self) -> Counter[int]:
        """Returns position in the round, from 0 -> drafts made there."""
        return _by_position((drafted, rounds) for (drafted, _), rounds in self.rounds_of.items())

    @property
    def accepted_at(self) -> Counter[int]:
        """Returns position in the round, from 0 -> drafts accepted there."""
        return _by_position((accepted, rounds) for (_, accepted), rounds in self.rounds_of.items())


def _by_position(lengths: Iterable[tuple[int, int]]) -> Counter[int]:
    counts: Counter[int] = Counter()
    for length, rounds in lengths:
        for position in range(length):
            counts[position] += rounds
    return counts


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
