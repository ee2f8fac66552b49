"""Who waits, who runs, and what each does in the next step. Integers only: no tensors, no tokens chosen, no threads.

An entry waits, is admitted when there are a place and blocks for it, reads its prompt in chunks, then plays rounds.
Where blocks run out the entry that comes last is preempted: it loses its blocks and waits again, and what it lost is
computed anew.
"""

from __future__ import annotations

import contextlib
import heapq
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from gemma_mtp.decoding.round_costs import LONGEST
from gemma_mtp.engine.settings import EngineSettings
from gemma_mtp.errors import QueueFullError
from gemma_mtp.kv.blocks import BLOCK_ROWS, BlockTable, OutOfBlocksError, block_counts

#: weight of a step against the ones before it, in what a row of a step takes
ROW_SECONDS_WEIGHT = 0.2


@dataclass(eq=False, slots=True)
class Entry:
    """A request as the scheduler sees it: its tokens, its blocks, and how far it is."""

    order: tuple[int, int]  # priority, arrival: who comes first
    tokens: list[int]  # prompt and committed output
    table: BlockTable
    reading: bool = True  # whether rows are missing before rounds can be played
    started: bool = False  # whether the first output token is there
    admitted: bool = False  # whether it has run at all
    reused: int = 0  # rows that it took from earlier requests when it was admitted first
    scored: bool = False  # whether its prompt's rows are wanted: none are reused before they were all computed
    drafts: int = 0  # of its next round, at most

    def __lt__(self, other: Entry) -> bool:
        return self.order < other.order

    @property
    def rows_wanted(self) -> int:
        """Rows that must be there before rounds are played: the last committed token's comes with a round."""
        return len(self.tokens) - self.started


E = TypeVar("E", bound=Entry)


@dataclass
class Schedule(Generic[E]):
    """What is run together in a step: entries that play a round, and chunks of tokens to read."""

    rounds: list[E] = field(default_factory=list)
    chunks: list[tuple[E, list[int]]] = field(default_factory=list)
    preempted: list[E] = field(default_factory=list)


class Scheduler(Generic[E]):
    """Decides. `chunk_rows`: rows of prompts that one step reads at most. `window`: rows that sliding layers see."""

    def __init__(self, settings: EngineSettings, chunk_rows: int, window: int) -> None:
        self.settings = settings
        self.chunk_rows = chunk_rows
        self.window = window
        self.waiting: list[E] = []
        self.running: list[E] = []
        #: sequences that ran lately, readers too. It falls by one a step: where some have ended others often follow,
        #: and drafts would keep those waiting
        self.ran_lately = 0
        self._row_seconds = 0.0

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.waiting and not self.running

    @property
    def entries(self) -> list[E]:
        """Whoever waits or runs."""
        return [*self.waiting, *self.running]

    def add(self, entry: E) -> None:
        """Queue a new entry. Raises QueueFullError."""
        if len(self.waiting) >= self.settings.max_waiting:
            raise QueueFullError(
                f"{len(self.waiting)} requests are waiting already, which is as many as may; try again later."
            )
        heapq.heappush(self.waiting, entry)

    def remove(self, entry: E) -> None:
        """Take an entry out wherever it is, free its blocks, and keep what they hold for prompts to come."""
        if entry in self.running:
            self.running.remove(entry)
        elif entry in self.waiting:
            self.waiting.remove(entry)
            heapq.heapify(self.waiting)
        self._give_blocks_back(entry)

    def admit(self) -> list[E]:
        """Begin a step: let waiting entries run while there are places and blocks. Returns those."""
        admitted = []
        while self.waiting and len(self.running) < self.settings.max_running and self._has_room_for(self.waiting[0]):
            entry = heapq.heappop(self.waiting)
            admitted.append(entry)
            self.running.append(entry)
            self.running.sort()
        self.ran_lately = max(len(self.running), self.ran_lately - 1)
        return admitted

    def schedule(self) -> Schedule[E]:
        """Returns every running entry's part in the next step, with the blocks for it."""
        schedule: Schedule[E] = Schedule()
        room = self._chunk_room()
        for entry in tuple(self.running):
            if entry in schedule.preempted:
                continue
            rows = entry.drafts + 1
            if entry.reading:
                rows = min(room, entry.rows_wanted - entry.table.length)
                if not rows:
                    continue
            try:
                entry.table.reserve(rows)
            except OutOfBlocksError:
                if not self._preempt_for(entry, rows, schedule):
                    continue
            if entry.reading:
                begin = entry.table.length
                schedule.chunks.append((entry, entry.tokens[begin : begin + rows]))
                room -= rows
            else:
                schedule.rounds.append(entry)
        return schedule

    def note(self, rows: int, seconds: float) -> None:
        """Learn from a step how long a row takes."""
        of_one = seconds / rows
        old = self._row_seconds or of_one
        self._row_seconds = old + ROW_SECONDS_WEIGHT * (of_one - old)

    def register(self, entry: Entry) -> None:
        """Keep what an entry's full blocks hold for prompts to come."""
        if self.settings.prefix_reuse:
            entry.table.register(entry.tokens)

    def _chunk_room(self) -> int:
        """Returns how many rows of prompts the next step may read."""
        if not self._row_seconds or all(entry.reading for entry in self.running):
            return self.chunk_rows
        rows = int(self.settings.max_stall_seconds / self._row_seconds)
        return max(BLOCK_ROWS, min(self.chunk_rows, rows))

    def _has_room_for(self, entry: E) -> bool:
        """Returns whether the blocks that an entry needs to be read and to play a round are there; takes what it can
        reuse."""
        table = entry.table
        reuse = self.settings.prefix_reuse and (entry.started or not entry.scored)
        hit = table.adopt(entry.tokens[: entry.rows_wanted]) if reuse else 0
        needed = block_counts(self.window, entry.rows_wanted - hit + LONGEST + 1, self.chunk_rows)
        # a block for each running sequence, lest the newcomer preempts one at once
        short = any(table.blocks[kind].available < count + len(self.running) for kind, count in needed.items())
        if self.running and short:
            table.release()
            return False
        if not entry.admitted:
            entry.reused = hit
        return True

    def _preempt_for(self, entry: E, rows: int, schedule: Schedule[E]) -> bool:
        """Take the blocks for an entry's rows from the entry that comes last, which has no part in the step yet, as
        often as it takes. Returns whether the entry still runs."""
        while True:
            last = self.running.pop()
            self._give_blocks_back(last)
            last.reading = True
            heapq.heappush(self.waiting, last)
            schedule.preempted.append(last)
            if last is entry:
                return False
            with contextlib.suppress(OutOfBlocksError):
                entry.table.reserve(rows)
                return True

    def _give_blocks_back(self, entry: Entry) -> None:
        self.register(entry)
        entry.table.release()
