"""The target's keys and values, in blocks: append rows, commit some, discard the rest.

A `KVPool` holds the blocks of all sequences, apart for full and for sliding layers; the layers of one kind have the
same block ids. A `KVCache` is one sequence's: a table of its blocks for each kind. Full layers keep every row; of
sliding layers, blocks go back to the pool once no later query sees a row of them. Rows after the committed length are
garbage that the next call overwrites, and no attention reaches them.

Blocks may be shared: a block full of committed rows can be named by the tokens up to its end, and is then found by a
later sequence that begins with the same tokens (PagedAttention, Kwon et al. 2023, arXiv:2309.06180). Nobody writes to
it again.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import mmap
from array import array
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gemma_mtp.config import FULL, SLIDING, LayerType, TextConfig
from gemma_mtp.ops import reference as ops

#: rows of a block; `src/native/kernels/kernels.h` has it too
BLOCK_ROWS = 32
HUGE_PAGE_BYTES = 2 << 20


class OutOfBlocksError(Exception):
    """No block of a kind is free. What was taken before it stays with the sequence."""


class Blocks:
    """Which blocks of one kind are free, in use, or kept for what they hold."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = dict.fromkeys(reversed(range(count)))  # the last one freed is the next taken: it is in the caches
        self._users = [0] * count
        self._named: dict[bytes, int] = {}
        self._names: dict[int, bytes] = {}
        self._kept: OrderedDict[bytes, int] = OrderedDict()  # named and nobody's, the oldest first

    @property
    def available(self) -> int:
        """Blocks that may be taken: free ones, and kept ones that would be given up."""
        return len(self._free) + len(self._kept)

    @property
    def kept(self) -> int:
        return len(self._kept)

    def take(self, after: int | None = None) -> int:
        """A block for new rows: the one that lies behind block `after` if it is free. Raises OutOfBlocksError."""
        if after is not None and after + 1 in self._free:
            block = after + 1
            del self._free[block]
        elif self._free:
            block, _ = self._free.popitem()
        elif self._kept:
            name, block = self._kept.popitem(last=False)
            del self._named[name], self._names[block]
        else:
            raise OutOfBlocksError
        self._users[block] = 1
        return block

    def find(self, name: bytes) -> int | None:
        """The block of that name."""
        return self._named.get(name)

    def share(self, block: int) -> None:
        """Use a named block, too."""
        if not self._users[block]:
            del self._kept[self._names[block]]
        self._users[block] += 1

    def name(self, block: int, name: bytes) -> None:
        """Make a full block known; where another has the name already, nothing is gained by a second."""
        if name not in self._named:
            self._named[name], self._names[block] = block, name

    def release(self, block: int) -> None:
        """Use it no more."""
        self._users[block] -= 1
        if self._users[block]:
            return
        name = self._names.get(block)
        if name is None:
            self._free[block] = None
        else:
            self._kept[name] = block


@dataclass
class LayerRows:
    """Buffers of one layer, each [G, blocks, BLOCK_ROWS, d]."""

    keys: Tensor
    values: Tensor


class KVPool:
    """The blocks of all sequences, so many of each kind."""

    def __init__(
        self, config: TextConfig, counts: Mapping[LayerType, int], dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.config = config
        self.device = torch.device(device)
        self.blocks = {kind: Blocks(counts[kind]) for kind in (SLIDING, FULL)}
        shapes = [
            (config.layer_kv_heads(layer), counts[config.layer_types[layer]], BLOCK_ROWS, config.layer_head_dim(layer))
            for layer in range(config.first_kv_shared_layer)
        ]
        sizes = [math.prod(shape) for shape in shapes for _ in ("keys", "values")]
        parts = iter(_zeros(sum(sizes), dtype, self.device).split(sizes))
        self.layers = {i: LayerRows(next(parts).view(s), next(parts).view(s)) for i, s in enumerate(shapes)}
        self.handles: dict[tuple[int, ...], Any] = {}  # the native operators' views of some layers, in that order


def _zeros(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """On a CPU in huge pages where the system has them: blocks lie far apart, and the addresses of many small ones
    take time to look up."""
    size = count * dtype.itemsize
    if device.type != "cpu" or size < HUGE_PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(count, dtype=dtype, device=device)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype)  # keeps the memory alive


def block_counts(config: TextConfig, max_length: int, max_rows: int) -> dict[LayerType, int]:
    """Blocks that one sequence needs at most, of `max_length` rows written at most `max_rows` at a time."""
    full = _blocks_of(max_length)
    # any so many rows in a row may begin anywhere in their first block
    return {FULL: full, SLIDING: min(full, _blocks_of(config.sliding_window - 1 + max_rows - 1) + 1)}


def block_bytes(config: TextConfig, kind: LayerType, element_bytes: int) -> int:
    """Bytes of one block of a kind, in all of its layers."""
    layers = [i for i in range(config.first_kv_shared_layer) if config.layer_types[i] == kind]
    return sum(2 * config.layer_kv_heads(i) * BLOCK_ROWS * config.layer_head_dim(i) for i in layers) * element_bytes


class KVCache:
    """Keys and values of one sequence of at most `max_length` rows, written at most `max_rows` at a time when decoding
    and `chunk_rows` when the prompt is read. Without `pool`, it has blocks enough of its own.

    One call of the target is `begin(rows)`, its layers' `attend`, then `commit(rows kept)`.
    """

    def __init__(
        self, config: TextConfig, max_length: int, max_rows: int, dtype: torch.dtype, device: torch.device | str,
        chunk_rows: int = 0, pool: KVPool | None = None,
    ) -> None:  # fmt: skip
        self.config = config
        self.max_length = max_length
        self.max_rows = max_rows
        self.chunk_rows = max(max_rows, chunk_rows)
        self.window = config.sliding_window
        self.pool = pool or KVPool(config, block_counts(config, max_length, self.chunk_rows), dtype, device)
        self.device = self.pool.device
        self.length = 0  # committed rows
        self.rows = 0  # rows of the call under way
        self.tables = {kind: array("i", [-1]) * _blocks_of(max_length) for kind in (SLIDING, FULL)}
        self._held = {kind: [0, 0] for kind in (SLIDING, FULL)}  # first block held, first one not held yet
        self._room = 0  # rows that the blocks held so far have places for
        self._named = 0  # leading blocks whose names are known
        self._name = b""  # of the last of them
        self.handle: Any = None  # the native operators' view of the tables
        self._call_masks: dict[tuple[LayerType, int], Tensor] = {}  # as wide as what the call under way sees

    def reserve(self, rows: int) -> None:
        """Take the blocks that the next `rows` rows need. Raises OutOfBlocksError."""
        assert 0 < rows and self.length + rows <= self.max_length, "the caller sizes the cache for its sequence"
        if self.length + rows <= self._room:
            return
        self._let_slide()
        end = _blocks_of(self.length + rows)
        for kind, table in self.tables.items():
            held = self._held[kind]
            while held[1] < end:
                after = table[held[1] - 1] if held[1] > held[0] else None
                table[held[1]] = self.pool.blocks[kind].take(after)
                held[1] += 1
        self._room = end * BLOCK_ROWS

    def begin(self, rows: int) -> None:
        """Announce a call whose rows take the positions length .. length + rows - 1."""
        self.reserve(rows)
        self.rows = rows
        self._call_masks.clear()

    def commit(self, rows: int) -> None:
        """Keep the first `rows` rows of the call and discard the others."""
        assert 0 <= rows <= self.rows
        self.length += rows
        self.rows = 0

    def release(self) -> None:
        """Give all blocks back and forget every row; the last ones are the first to be given up by the pool."""
        for kind, (first, end) in self._held.items():
            for i in reversed(range(first, end)):
                self.pool.blocks[kind].release(self.tables[kind][i])
            self._held[kind] = [0, 0]
        self.length, self._room, self._named, self._name = 0, 0, 0, b""

    def adopt(self, token_ids: Sequence[int]) -> int:
        """Share the blocks of an earlier sequence that began with the same tokens; returns the rows that it gives.

        For an empty cache. At least one row is left to compute: its hidden state is nowhere kept.
        """
        assert not self.length
        names, blocks = [], self.pool.blocks
        for name in _names(token_ids[: (len(token_ids) - 1) // BLOCK_ROWS * BLOCK_ROWS]):
            if blocks[FULL].find(name) is None:
                break
            names.append(name)
        count = len(names)
        while count:  # the longest beginning whose window is there, too
            first = self._first_visible(SLIDING, count * BLOCK_ROWS) // BLOCK_ROWS
            lost = [i for i in range(first, count) if blocks[SLIDING].find(names[i]) is None]
            if not lost:
                break
            count = lost[0]
        if not count:
            return 0
        for kind, begin in ((SLIDING, first), (FULL, 0)):
            for i in range(begin, count):
                block = blocks[kind].find(names[i])
                assert block is not None
                blocks[kind].share(block)
                self.tables[kind][i] = block
            self._held[kind] = [begin, count]
        self._named, self._name = count, names[count - 1]
        self.length = self._room = count * BLOCK_ROWS
        return self.length

    def name(self, token_ids: Sequence[int]) -> None:
        """Make the blocks full of committed rows known by `token_ids`, the sequence's tokens."""
        count = self.length // BLOCK_ROWS
        if count == self._named:
            return
        for name in _names(token_ids[self._named * BLOCK_ROWS : count * BLOCK_ROWS], self._name):
            for kind, (first, _) in self._held.items():
                if self._named >= first:
                    self.pool.blocks[kind].name(self.tables[kind][self._named], name)
            self._named, self._name = self._named + 1, name

    def attend(self, layer: int, q_BTHd: Tensor, k_BTGd: Tensor | None, v_BTGd: Tensor | None) -> Tensor:
        """Attention of the call's last T rows; a layer with keys and values of its own stores them first."""
        owner = self.config.kv_layer(layer)
        if k_BTGd is not None and v_BTGd is not None:
            self._append(layer, k_BTGd, v_BTGd)
        T, end, kind = q_BTHd.shape[1], self.length + self.rows, self.config.layer_types[layer]
        k, v = self._read(owner, self._first_visible(kind, end - T), end)
        if T == 1:
            return ops.attention(q_BTHd, k, v, None)
        mask = self._mask(kind, q_BTHd, k)
        return ops.attention(q_BTHd, k, v, mask) if T <= self.max_rows else ops.masked_attention(q_BTHd, k, v, mask)

    def committed(self, kind: LayerType) -> tuple[Tensor, Tensor]:
        """The donor layer's committed keys and values a query at position `length` sees, each [1, G, S, d]."""
        layer = self.config.donor_layers[kind]
        return self._read(layer, self._first_visible(kind, self.length), self.length)

    def _first_visible(self, kind: LayerType, position: int) -> int:
        """The first row a query at `position` sees."""
        return 0 if kind == FULL else max(0, position - self.window + 1)

    def _let_slide(self) -> None:
        """Give back the sliding blocks that no query from `length` on sees."""
        held, seen = self._held[SLIDING], self._first_visible(SLIDING, self.length) // BLOCK_ROWS
        while held[0] < min(seen, held[1]):
            self.pool.blocks[SLIDING].release(self.tables[SLIDING][held[0]])
            held[0] += 1

    def _append(self, layer: int, k_BTGd: Tensor, v_BTGd: Tensor) -> None:
        """Store the call's rows, block by block."""
        rows, table = self.pool.layers[layer], self.tables[self.config.layer_types[layer]]
        keys, values = k_BTGd[0].transpose(0, 1), v_BTGd[0].transpose(0, 1)
        at, end = self.length, self.length + self.rows
        while at < end:
            block, offset = table[at // BLOCK_ROWS], at % BLOCK_ROWS
            count = min(BLOCK_ROWS - offset, end - at)
            taken = slice(at - self.length, at - self.length + count)
            rows.keys[:, block, offset : offset + count] = keys[:, taken]
            rows.values[:, block, offset : offset + count] = values[:, taken]
            at += count

    def _read(self, layer: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Rows start .. stop-1, each [1, G, S, d]: a view where their blocks lie side by side, else a copy."""
        first, rows = start // BLOCK_ROWS, self.pool.layers[layer]
        ids = self.tables[self.config.layer_types[layer]][first : _blocks_of(stop)]
        if all(ids[i] == ids[0] + i for i in range(len(ids))):
            parts = [buffer[:, ids[0] : ids[0] + len(ids)] for buffer in (rows.keys, rows.values)]
        else:
            index = torch.tensor(ids, device=self.device)
            parts = [buffer.index_select(1, index) for buffer in (rows.keys, rows.values)]
        begin = start - first * BLOCK_ROWS
        k, v = (part.flatten(1, 2)[None, :, begin : begin + stop - start] for part in parts)
        return k, v

    def _mask(self, kind: LayerType, q_BTHd: Tensor, k_BGSd: Tensor) -> Tensor:
        """What the call's last T rows see of the S rows read, for the attention that so many rows take: built once a
        call for all layers of a kind."""
        T, S = q_BTHd.shape[1], k_BGSd.shape[2]
        if (kind, T) not in self._call_masks:
            # a whole tensor: a view that begins in the middle of one is a misaligned address on CUDA
            visible = self._visible(kind, T, S, k_BGSd.device)
            decoding, heads_per_group = T <= self.max_rows, q_BTHd.shape[2] // k_BGSd.shape[1]
            self._call_masks[kind, T] = ops.stack_mask(visible, heads_per_group, q_BTHd.dtype) if decoding else visible
        return self._call_masks[kind, T]

    def _visible(self, kind: LayerType, T: int, width: int, device: torch.device) -> Tensor:
        """[T, width] boolean visibility of the last `width` rows to the last T of them."""
        rows = torch.arange(width, device=device)
        return ops.visible_rows(rows[width - T :], rows, None if kind == FULL else self.window)


def _blocks_of(rows: int) -> int:
    return -(-rows // BLOCK_ROWS)


def _names(token_ids: Sequence[int], before: bytes = b"") -> list[bytes]:
    """Names of the blocks that the tokens fill: a digest of all tokens up to a block's end, `before` being the last
    block's before these."""
    names = []
    for start in range(0, len(token_ids), BLOCK_ROWS):
        before = hashlib.blake2b(
            before + array("q", token_ids[start : start + BLOCK_ROWS]).tobytes(), digest_size=32
        ).digest()
        names.append(before)
    return names


class CommittedKeyValues:
    """What a drafter attends to: exactly the committed rows of the target's donor layers, in its own layers' order."""

    def __init__(self, cache: KVCache, layer_types: tuple[LayerType, ...]) -> None:
        self.cache = cache
        self.layer_types = layer_types
        self._rows: dict[LayerType, tuple[Tensor, Tensor]] = {}

    def rows(self, kind: LayerType) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer type, each [1, G, S, d]; read when first asked for, as the native operators need
        none."""
        if kind not in self._rows:
            self._rows[kind] = self.cache.committed(kind)
        return self._rows[kind]

    def attend(self, layer: int, q_BTHd: Tensor, k_BTGd: Tensor | None, v_BTGd: Tensor | None) -> Tensor:
        return ops.attention(q_BTHd, *self.rows(self.layer_types[layer]), None)
