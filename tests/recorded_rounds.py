"""Rounds on the device without a device: what stands for CUDA's graphs, and a pair of plain operators.

The pair's next token follows from all tokens before it, read through the block tables, so that a wrong table, length,
state or key shows. Its drafter is right in seven of ten cases.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from models import TINY, VOCAB, random_drafter, random_target
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gemma_mtp.backend.cuda.backend import CudaBackend
from gemma_mtp.backend.cuda.batch import Batch
from gemma_mtp.backend.cuda.draws import DeviceFilters, Draws
from gemma_mtp.backend.cuda.launch import Launch
from gemma_mtp.config import FULL, SLIDING, LayerType
from gemma_mtp.decoding.noise import keyed_gumbel
from gemma_mtp.kv.blocks import BLOCK_ROWS
from gemma_mtp.kv.pool import KVPool

#: one call: what runs it again, into the same memory
Call = Callable[[], None]
MODULUS = 1 << 16
_generator = torch.Generator().manual_seed(7)
WEIGHTS = torch.randint(1, MODULUS, (4096,), generator=_generator)
LOGITS = 3 * torch.randn(997, VOCAB, generator=_generator)


class Recorder(TorchDispatchMode):
    """Stands for CUDA's graphs: keeps the calls of a function on tensors, and makes them again into the same memory.

    Capturing changes nothing that was there before. `waits`: how often the host waited. `recordings`: those that
    somebody holds. `refusal` is asked at each capture, and at each replay, for the error that ends it; a capture ends
    in the middle."""

    def __init__(self, launch: Launch | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._launch = launch
        self._calls: list[Call] | None = None
        self._error: Exception | None = None
        self.captured = self.replayed = self.waits = self.attempts = self.given_back = 0
        self.recordings: weakref.WeakSet[Any] = weakref.WeakSet()
        self.refusal: Callable[[str], Exception | None] = lambda what: None

    def launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        """Launches kernels, as part of what is recorded."""
        assert self._launch is not None
        run = self._launch
        if self._calls is None:
            run(kernel, grid, *args, **options)
        else:
            self._calls.append(lambda: run(kernel, grid, *args, **options))

    def capture(self, body: Call) -> Call:
        calls: list[Call] = []
        self._calls, self._error = calls, self.refusal("capture")
        self.attempts += 1
        try:
            with self:
                body()
        finally:
            self._calls = self._error = None
        self.captured += 1

        def replay() -> None:
            if (error := self.refusal("replay")) is not None:
                try:
                    raise error
                finally:
                    del error  # its traceback has this frame, which would hold it, and this recording, in a circle
            self.replayed += 1
            for call in calls:
                call()

        self.recordings.add(replay)
        return replay

    def give_back(self) -> None:
        self.given_back += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        assert self._calls is not None
        if self._error is not None and len(self._calls) == 20:
            raise self._error
        assert func.name() not in ("aten::item", "aten::_local_scalar_dense"), "the host reads the device"
        if func._schema.is_mutable:
            self._calls.append(lambda: func(*args, **kwargs))
            return args[0]
        made = func(*args, **kwargs)
        self._calls.append(lambda: _again(made, func(*args, **kwargs)))
        return made

    def staging(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    def mark(self) -> Call:
        def wait() -> None:
            self.waits += 1

        return wait


def _again(before: Any, now: Any) -> None:
    """Put what a call made into the memory of what it made when it was recorded; a view is there already."""
    if isinstance(before, Tensor):
        if before.data_ptr() != now.data_ptr():
            before.copy_(now)
    else:
        for one, other in zip(before, now, strict=True):
            _again(one, other)


class PlainTarget:
    """In place of a `DeviceTarget`. Hidden states: a hash of all tokens so far in two bytes, how many drafts follow it,
    and whether sliding layers see the same."""

    def __init__(self) -> None:
        self.table = self  # whose data says where it is
        self.data = torch.zeros(1)
        self._stored: dict[int, tuple[Tensor, dict[LayerType, Tensor]]] = {}

    def forward(self, launch: Launch, batch: Batch, pool: KVPool, ropes: object) -> Tensor:
        stored = self.stored(pool)
        for kind, seen in batch.seen.items():
            places = seen.positions_R.long()
            blocks = seen.tables[seen.owners_R.long(), (places // BLOCK_ROWS).clamp(min=0)]
            at = torch.where(places >= 0, blocks * BLOCK_ROWS + places % BLOCK_ROWS, len(stored[kind]) - 1)
            stored[kind].index_copy_(0, at, batch.token_ids_R.long())
        whole, sliding = hashes(batch, stored, 1)
        return encoded(whole, sliding)

    def stored(self, pool: KVPool) -> dict[LayerType, Tensor]:
        """Tokens by block and row, and a last place for padding."""
        states = pool.states
        if id(states) not in self._stored:
            rows = {kind: torch.zeros(pool.blocks[kind].count * BLOCK_ROWS + 1).long() for kind in (FULL, SLIDING)}
            self._stored[id(states)] = states, rows
        return self._stored[id(states)][1]

    def logits(self, launch: Launch, hidden_RD: Tensor) -> Tensor:
        whole, sliding, _ = decoded(hidden_RD)
        return LOGITS[(whole + sliding) % len(LOGITS)]

    def choose(self, launch: Launch, hidden_RD: Tensor, rows_N: Tensor, draws: Draws | None) -> Tensor:
        return best(self.logits(launch, hidden_RD[rows_N.long()]), draws)


class PlainDrafter:
    """In place of a `DeviceDrafter`: goes on with the hash of the state, and errs where the sequence's own rows do not
    give it, or by chance."""

    def __init__(self, target: PlainTarget, config: Any) -> None:
        self.target, self.config = target, config

    def step(
        self, launch: Launch, batch: Batch, pool: KVPool, hidden_RD: Tensor, ropes: object
    ) -> tuple[Tensor, Tensor]:
        whole, _, step = decoded(hidden_RD)
        read, sliding = hashes(batch, self.target.stored(pool), 0)
        places = batch.seen[FULL].positions_R.long().clamp(min=0)
        own = WEIGHTS[places + step] * batch.token_ids_R.long()
        wrong = sliding + ((step == 0) & (read != whole)) + ((whole * 7919) % 10 < 3)
        following = (whole + own) % MODULUS
        return encoded((following + wrong) % MODULUS, wrong * 0), encoded(following, wrong * 0, step + 1)

    def candidates(self, launch: Launch, state_RH: Tensor) -> tuple[Tensor, None]:
        return self.target.logits(launch, state_RH), None

    def choose(self, launch: Launch, state_RH: Tensor, draws: Draws | None) -> Tensor:
        return best(self.target.logits(launch, state_RH), draws)


def hashes(batch: Batch, stored: dict[LayerType, Tensor], own: int) -> tuple[Tensor, Tensor]:
    """A hash of the rows that each row sees, `own` included or not; and what sliding layers see differently."""
    seen = batch.seen[FULL]
    width = seen.tables.shape[1] * BLOCK_ROWS
    at, positions = torch.arange(width), seen.positions_R.long()[:, None]
    visible = at < positions + own
    tokens = {kind: _read(batch, stored[kind], kind, at) for kind in (FULL, SLIDING)}
    whole = torch.where(visible, tokens[FULL] * WEIGHTS[at], 0).sum(1) % MODULUS
    near = visible & (at > positions - batch.seen[SLIDING].window)
    return whole, (near & (tokens[FULL] != tokens[SLIDING])).any(1).long()


def _read(batch: Batch, stored: Tensor, kind: LayerType, at: Tensor) -> Tensor:
    seen = batch.seen[kind]
    blocks = seen.tables[seen.owners_R.long()][:, at // BLOCK_ROWS].clamp(min=0)
    return stored[blocks * BLOCK_ROWS + at % BLOCK_ROWS]


def encoded(whole: Tensor, sliding: Tensor, step: Tensor | None = None) -> Tensor:
    numbers = torch.stack((whole // 256, whole % 256, sliding, sliding * 0 if step is None else step), 1)
    padding = torch.zeros(len(whole), TINY.hidden_size - numbers.shape[1])
    return torch.cat((numbers, padding), 1).bfloat16()


def decoded(hidden_RD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    numbers = hidden_RD[:, :4].long()
    return numbers[:, 0] * 256 + numbers[:, 1], numbers[:, 2], numbers[:, 3]


def best(logits_RV: Tensor, draws: Draws | None) -> Tensor:
    if draws is None:
        return logits_RV.argmax(-1)
    drawn = draws.temperatures_R > 0
    temperatures_R1 = torch.where(drawn, draws.temperatures_R, 1.0)[:, None]
    if draws.filters is not None:
        logits_RV = kept(logits_RV, temperatures_R1.float(), draws.filters)
    scores = logits_RV.double() / temperatures_R1
    noise = keyed_gumbel(draws.keys_R, torch.arange(logits_RV.shape[1]))
    return torch.where(drawn[:, None], scores + noise, scores).argmax(-1)


def kept(logits_RV: Tensor, temperatures_R1: Tensor, filters: DeviceFilters) -> Tensor:
    """What each row's filters leave, by a sorted row; all else is -inf. Sums are those of `sampling`."""
    top_k_R1, top_p_R1, least_R1 = (one[:, None] for one in filters)
    places = logits_RV.sort(dim=1, descending=True, stable=True).indices
    shares = ((logits_RV - logits_RV.amax(1, keepdim=True)) / temperatures_R1).gather(1, places)
    left = (top_k_R1 == 0) | (torch.arange(shares.shape[1]) < top_k_R1)
    masses = torch.where(left, (shares.exp() * 2.0**40).long(), 0)
    before = masses.cumsum(1) - masses
    left &= (top_p_R1 == 1) | (before.double() < top_p_R1 * masses.sum(1, keepdim=True).double())
    left &= shares >= least_R1.float()
    return torch.where(torch.zeros_like(left).scatter(1, places, left), logits_RV, -torch.inf)


def plain_backend(recorder: Recorder | None) -> CudaBackend:
    """The GPU's backend over the plain pair; with whole rounds where there is a recorder."""
    target, drafter = random_target(1).bfloat16(), random_drafter().bfloat16()
    plain = PlainTarget()
    backend = CudaBackend(target, None, cast(Launch, print), cast(Any, plain))
    backend.drafter, backend.drafts = drafter, cast(Any, PlainDrafter(plain, drafter.config))
    backend.replays = recorder
    backend.rounds = None if recorder is None else backend._rounds(recorder)
    return backend
