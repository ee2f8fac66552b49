"""Rounds that the device plays as a whole, recorded once for each shape, with the host one round behind.

A recording saves time and nothing else. Where it fails, the same calls are made one by one, to the same bits. A pool
keeps so many recorded at most, and gives up the one that was played longest ago. Where memory is short, all are given
up before anything else fails for it.

While the host reads what a round committed, the device already plays the next one of the same sequences, from the state
that the first left on it. Where a sequence has ended meanwhile, or lost its blocks, that round's part is thrown away:
rows beyond the committed length are garbage to everyone, and the device does in order what it is asked for.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from gemma_mtp.backend.base import Committed, RoundRows
from gemma_mtp.backend.cuda.draws import least_of
from gemma_mtp.backend.cuda.replay import Replays
from gemma_mtp.backend.cuda.round import (
    FIELDS,
    FRESH,
    LAST,
    LEAST,
    LENGTH,
    LIMIT,
    NOISE,
    SLOT,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    Buffers,
    RoundModels,
    Shape,
    SlotState,
    play_round,
)
from gemma_mtp.config import LAYER_TYPES, TextConfig
from gemma_mtp.decoding.noise import signed
from gemma_mtp.decoding.params import ChoiceKind
from gemma_mtp.kv.blocks import OutOfBlocksError
from gemma_mtp.kv.pool import KVCache, KVPool
from gemma_mtp.sizes.card import LEAST_REACH, places_of, recorded_rounds

log = logging.getLogger(__name__)
_Made = TypeVar("_Made")

#: drafts of a recorded round; a sequence that wants fewer than the next of them has a lower limit
COUNTS = (0, 1, 2, 3, 4, 6, 8, 12, 16)


class _Staging(NamedTuple):
    """Memory of the host for one round under way."""

    control_FB: Tensor
    tables_NBW: Tensor
    result_BT: Tensor


@dataclass
class _Recorded:
    """A shape's buffers, and what replays it; None until it has been played once, for that compiles its kernels."""

    buffers: Buffers
    body: Callable[[], None]
    replay: Callable[[], None] | None = None
    spare: list[_Staging] = field(default_factory=list)


class _Flight(NamedTuple):
    """A round that the device was asked for and whose result nobody has read. `parts`: its sequences and their drafts
    at most. It keeps no sequence alive, because the pool keeps it."""

    parts: Sequence[tuple[weakref.ref[KVCache], int]]
    recorded: _Recorded
    staging: _Staging
    wait: Callable[[], None]

    def find(self, cache: KVCache) -> int | None:
        """Returns a sequence's place."""
        return next((place for place, (part, _) in enumerate(self.parts) if part() is cache), None)

    def land(self) -> list[Committed]:
        """Wait for the round. Returns what each sequence committed."""
        self.wait()
        rows = self.staging.result_BT[: len(self.parts)].tolist()
        self.recorded.spare.append(self.staging)
        return [Committed(choices[:count], most) for (count, *choices), (_, most) in zip(rows, self.parts, strict=True)]


class DeviceRounds:
    """Plays whole rounds of the sequences of any pool. One thread at a time plays those of a pool."""

    def __init__(
        self, models_for: Callable[[int], RoundModels], target: TextConfig, drafter: TextConfig | None,
        replays: Replays,
    ) -> None:  # fmt: skip
        """`models_for`: the pair's calls for positions below a reach, whose memory stays where it is."""
        self.models_for, self.target, self.drafter, self.replays = models_for, target, drafter, replays
        self._pools: weakref.WeakSet[_PoolRounds] = weakref.WeakSet()
        self._lock = threading.Lock()  # of the pools, of which each may have a thread
        self._warned = False

    @property
    def longest(self) -> int:
        return COUNTS[-1]

    def play(self, pool: KVPool, calls: Sequence[RoundRows]) -> list[Committed]:
        return self._of_pool(pool).play(calls)

    def with_room(self, call: Callable[[], _Made]) -> _Made:
        """Returns what a call gives that may be made again. Where memory is short for it, what is recorded is given up,
        and it is made once more."""
        try:
            return call()
        except RuntimeError as error:
            if not is_short(error) or not self.give_up():
                raise
            log.warning("recorded rounds are given up, because memory is short (%s)", _first_line(error))
        return call()  # here, where nothing holds what the failed call had made

    def record(self, shape: Shape, body: Callable[[], None]) -> Callable[[], None] | None:
        """Returns what replays a round that has been played once; None where it can not be recorded. Then what is
        recorded is given up, too: what it takes may be what was missing, and the attempt's part of the memory that all
        share with it."""
        try:
            return self.replays.capture(body)
        except RuntimeError as error:  # the lack of memory, and whatever CUDA or Triton say
            self.say_unrecorded(shape, error)
        self.give_up()
        return None

    def say_unrecorded(self, shape: Shape, error: Exception) -> None:
        """Log that a shape of round is played launch by launch from now on: the first as a warning."""
        level, self._warned = (logging.DEBUG if self._warned else logging.WARNING), True
        log.log(
            level, "rounds of %d drafts and %d sequences are not recorded as a CUDA graph, and play launch by launch,"
            " which is slower: %s: %s", shape.drafts, shape.places, type(error).__name__, _first_line(error),
        )  # fmt: skip

    def give_up(self) -> bool:
        """Forget all that is recorded, and give its memory back. Returns whether there was anything. Raises
        RuntimeError where it is the device that failed."""
        self.replays.give_back()
        with self._lock:
            found = [pool.forget() for pool in self._pools]
        self.replays.give_back()
        return any(found)

    def _of_pool(self, pool: KVPool) -> _PoolRounds:
        if self not in pool.handles:
            pool.handles[self] = made = _PoolRounds(self, pool)
            with self._lock:
                self._pools.add(made)
        found: _PoolRounds = pool.handles[self]
        return found


class _PoolRounds:
    """The rounds of one pool's sequences."""

    def __init__(self, rounds: DeviceRounds, pool: KVPool) -> None:
        slots = len(pool.states)
        last_S, length_S = (torch.zeros(slots, dtype=torch.int64, device=pool.device) for _ in range(2))
        #: by a proxy: the pool keeps this object, and its memory must be free as soon as nobody else uses it
        self.pool: KVPool = weakref.proxy(pool)
        self.rounds, self.state = rounds, SlotState(last_S, length_S)
        #: those that were played longest ago first; a thread that is short of memory makes them forget
        self.recorded: OrderedDict[Shape, _Recorded] = OrderedDict()
        self.most_recorded = recorded_rounds(slots)
        self.unrecordable: set[Shape] = set()
        self._lock = threading.Lock()
        self.ahead: _Flight | None = None

    def play(self, calls: Sequence[RoundRows]) -> list[Committed]:
        """Returns what a round of each sequence committed: the one under way, or a new one. Asks for the next."""
        ahead, self.ahead = self.ahead, None
        flights = [] if ahead is None else [ahead]
        new = [call for call in calls if ahead is None or ahead.find(call.cache) is None]
        if new:
            for call in new:
                call.cache.table.reserve(call.most + 1)
            flights.append(self._launch(new))
        places = [_place(flights, call.cache) for call in calls]
        if calls:
            self.ahead = self._launch_ahead(calls, [flights[i].parts[place][1] + 1 for i, place in places])
        committed = [flight.land() for flight in flights]
        return [committed[i][place] for i, place in places]

    def _launch_ahead(self, calls: Sequence[RoundRows], under_way: Sequence[int]) -> _Flight | None:
        """Ask for the round after the one under way, which may commit so many rows of each sequence; None where the
        output of one may end before, or blocks are short: a round without it then costs less than two."""
        if any(call.room < rows + call.most + 1 for call, rows in zip(calls, under_way, strict=True)):
            return None
        try:
            for call, rows in zip(calls, under_way, strict=True):
                call.cache.table.reserve(rows + call.most + 1)
        except OutOfBlocksError:
            return None
        return self._launch(calls, under_way)

    def _launch(self, calls: Sequence[RoundRows], under_way: Sequence[int] | None = None) -> _Flight:
        """Ask for a round; `under_way` as above, or None where the host knows how far the sequences are."""
        shape = self._shape(calls, under_way)
        recorded = self._recorded(shape)
        staging = recorded.spare.pop() if recorded.spare else self._staging(recorded.buffers)
        self._write(staging, calls, fresh=under_way is None)
        buffers = recorded.buffers
        buffers.control_FB.copy_(staging.control_FB, non_blocking=True)
        buffers.tables_NBW.copy_(staging.tables_NBW, non_blocking=True)
        self._play(shape, recorded)
        staging.result_BT.copy_(buffers.result_BT, non_blocking=True)
        parts = [(weakref.ref(call.cache), call.most) for call in calls]
        return _Flight(parts, recorded, staging, self.rounds.replays.mark())

    def _play(self, shape: Shape, recorded: _Recorded) -> None:
        """Play a round that was written to its buffers, by its recording or launch by launch. What fails for lack of
        memory has changed nothing that the round reads (`play_round`), so it can be played again."""
        replay = recorded.replay
        if replay is not None:
            try:
                replay()
                return
            except RuntimeError as error:
                self.unrecordable.add(shape)
                self.rounds.say_unrecorded(shape, error)
            recorded.replay = replay = None
            self.rounds.give_up()
        self.rounds.with_room(recorded.body)
        if shape in self.unrecordable:
            return
        replay = self.rounds.record(shape, recorded.body)
        if replay is None:
            self.unrecordable.add(shape)
        recorded.replay = replay

    def forget(self) -> bool:
        """Give up all recordings, those of rounds under way too: a device plays these to their end. Returns whether
        there were any."""
        with self._lock:
            recorded = list(self.recorded.values())
            self.recorded.clear()
        found = any(one.replay is not None for one in recorded)
        for one in recorded:
            one.replay = None
        return found

    def _shape(self, calls: Sequence[RoundRows], under_way: Sequence[int] | None) -> Shape:
        most = max(call.most for call in calls)
        ahead = under_way or [0] * len(calls)
        end = max(call.cache.table.length + rows + call.most + 1 for call, rows in zip(calls, ahead, strict=True))
        return Shape(
            next(count for count in COUNTS if count >= most),
            min(places_of(len(calls)), len(self.pool.states)),
            _choice(calls),
            max(LEAST_REACH, 1 << (end - 1).bit_length()),
        )

    def _recorded(self, shape: Shape) -> _Recorded:
        with self._lock:
            found = self.recorded.pop(shape, None)
        if found is None:
            rounds, pool, state = self.rounds, self.pool, self.state
            models = rounds.models_for(shape.reach)
            buffers = Buffers(shape, rounds.target, rounds.drafter, pool.device)
            found = _Recorded(buffers, lambda: play_round(models, buffers, state, pool))
        with self._lock:
            while len(self.recorded) >= self.most_recorded:
                self.recorded.popitem(last=False)
            self.recorded[shape] = found
        return found

    def _staging(self, buffers: Buffers) -> _Staging:
        staging = self.rounds.replays.staging
        control, tables, result = buffers.control_FB, buffers.tables_NBW, buffers.result_BT
        return _Staging(*(staging(tuple(one.shape), one.dtype) for one in (control, tables, result)))

    def _write(self, staging: _Staging, calls: Sequence[RoundRows], fresh: bool) -> None:
        """Write what the host says of each place. Places without a sequence take slots of others, and write back what
        they find there."""
        control_FB, count = staging.control_FB, len(calls)
        taken = {call.cache.slot for call in calls}
        others = (slot for slot in range(len(self.pool.states)) if slot not in taken)
        control_FB.zero_()
        control_FB[LIMIT] = -1
        control_FB[SLOT, count:] = torch.tensor([next(others) for _ in range(control_FB.shape[1] - count)])
        lines: list[list[int]] = [[] for _ in range(FIELDS)]
        for call in calls:
            lines[SLOT].append(call.cache.slot)
            lines[FRESH].append(int(fresh))
            lines[LAST].append(call.last_token)
            lines[LENGTH].append(call.cache.table.length)
            lines[LIMIT].append(call.most)
            lines[NOISE].append(signed(call.stream_key))
            lines[TOP_K].append(call.filters.top_k)
        lines[TEMPERATURE] = _bits([call.temperature for call in calls])
        lines[TOP_P] = _bits([call.filters.top_p for call in calls])
        lines[LEAST] = _bits([least_of(call.filters.min_p) for call in calls])
        control_FB[:, :count] = torch.tensor(lines)
        width = staging.tables_NBW.shape[2]
        for kind, of_kind_BW in zip(LAYER_TYPES, staging.tables_NBW, strict=True):
            for table_W, call in zip(of_kind_BW, calls, strict=False):
                own = torch.frombuffer(call.cache.table.tables[kind], dtype=torch.int32)[:width]
                table_W[: len(own)] = own


def _place(flights: Sequence[_Flight], cache: KVCache) -> tuple[int, int]:
    """Returns the flight that a sequence is in, by number, and its place there."""
    return next((i, place) for i, flight in enumerate(flights) if (place := flight.find(cache)) is not None)


def is_short(error: RuntimeError) -> bool:
    """Whether memory was missing, whoever says so: PyTorch, CUDA or Triton."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")


def _choice(calls: Sequence[RoundRows]) -> ChoiceKind:
    """Returns what the most particular of some sequences needs."""
    if any(call.filters.active for call in calls):
        return "filtered"
    return "drawn" if any(call.temperature for call in calls) else "argmax"


def _bits(numbers: Sequence[float]) -> list[int]:
    """Returns the bits of float64 numbers."""
    bits: list[int] = torch.tensor(numbers, dtype=torch.float64).view(torch.int64).tolist()
    return bits
