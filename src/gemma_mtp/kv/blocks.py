"""Which blocks of a pool a sequence has: integers only, no tensors.

A pool keeps blocks of full and of sliding layers apart; the layers of one kind have the same block ids. A `BlockTable`
is one sequence's list of them. Full layers keep every row. A sliding layer's block goes back to the pool once no later
query sees a row of it. Rows after the committed length are garbage: the next call overwrites them, and no attention
reaches them.

Blocks may be shared. A block full of committed rows can be registered under a name, a digest of all tokens up to the
block's end; a later sequence that begins with the same tokens finds it (PagedAttention, Kwon et al. 2023,
arXiv:2309.06180). Nobody writes to a registered block again.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gemma_mtp.config import FULL, LAYER_TYPES, SLIDING, LayerType, TextConfig

#: rows of a block; the native operators export theirs, and a test holds both equal
BLOCK_ROWS = 32


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
        """Blocks that no sequence uses and that are kept for prompts to come."""
        return len(self._kept)

    def take(self, after: int | None = None) -> int:
        """Returns a block for new rows, the one behind block `after` if that is free. Raises OutOfBlocksError."""
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
        """Returns the block registered under a name, or None."""
        return self._named.get(name)

    def share(self, block: int) -> None:
        """Add a user to a registered block."""
        if not self._users[block]:
            del self._kept[self._names[block]]
        self._users[block] += 1

    def register(self, block: int, name: bytes) -> None:
        """Register a full block under a name. A name that is taken stays with its block: a second one gains nothing."""
        if name not in self._named:
            self._named[name], self._names[block] = block, name

    def release(self, block: int) -> None:
        """Take a user away. A block without users is free, or kept where it has a name."""
        self._users[block] -= 1
        if self._users[block]:
            return
        name = self._names.get(block)
        if name is None:
            self._free[block] = None
        else:
            self._kept[name] = block


@dataclass(frozen=True)
class Window:
    """What queries see of the layers of one kind: the last `size` rows, their own included; None is all."""

    size: int | None

    def first_visible(self, position: int) -> int:
        """Returns the first row that a query at `position` sees."""
        return 0 if self.size is None else max(0, position - self.size + 1)


class BlockTable:
    """The blocks of one sequence of at most `max_length` rows, and how far it has come.

    One call of the target is `reserve(rows)`, the call itself, then `commit(rows kept)`.
    """

    __slots__ = (
        "_held", "_name", "_registered", "_room", "blocks", "length", "max_length", "tables", "windows",
    )  # fmt: skip

    def __init__(self, blocks: Mapping[LayerType, Blocks], sliding_window: int, max_length: int) -> None:
        self.blocks = blocks
        self.windows = {SLIDING: Window(sliding_window), FULL: Window(None)}
        self.max_length = max_length
        self.length = 0  # committed rows
        self.tables = {kind: array("i", [-1]) * blocks_of(max_length) for kind in LAYER_TYPES}
        self._held = {kind: [0, 0] for kind in LAYER_TYPES}  # first block held, first one not held yet
        self._room = 0  # rows that the blocks held so far have places for
        self._registered = 0  # leading blocks whose names are known
        self._name = b""  # of the last of them

    def reserve(self, rows: int) -> None:
        """Take the blocks of a call's rows, at the positions length .. length + rows - 1. Raises OutOfBlocksError."""
        assert 0 < rows and self.length + rows <= self.max_length, "the caller sizes the table for its sequence"
        if self.length + rows <= self._room:
            return
        self._let_slide()
        end = blocks_of(self.length + rows)
        for kind, table in self.tables.items():
            held = self._held[kind]
            while held[1] < end:
                after = table[held[1] - 1] if held[1] > held[0] else None
                table[held[1]] = self.blocks[kind].take(after)
                held[1] += 1
        self._room = end * BLOCK_ROWS

    def commit(self, rows: int) -> None:
        """Keep the first `rows` rows of the call and discard the others."""
        self.length += rows
        assert 0 <= rows and self.length <= self._room, "the rows were reserved"

    def release(self) -> None:
        """Give all blocks back and forget every row. Of them, the pool gives up the last ones first."""
        for kind, (first, end) in self._held.items():
            for i in reversed(range(first, end)):
                self.blocks[kind].release(self.tables[kind][i])
            self._held[kind] = [0, 0]
        self.length, self._room, self._registered, self._name = 0, 0, 0, b""

    def adopt(self, token_ids: Sequence[int]) -> int:
        """Share the blocks of an earlier sequence that began with the same tokens; returns the rows that they hold.

        For an empty table. At least one row is left to compute, because its hidden state is kept nowhere.
        """
        assert not self.length
        names, blocks = [], self.blocks
        for name in block_names(token_ids[: (len(token_ids) - 1) // BLOCK_ROWS * BLOCK_ROWS]):
            if blocks[FULL].find(name) is None:
                break
            names.append(name)
        count = len(names)
        while count:  # the longest beginning whose window is there, too
            first = self.windows[SLIDING].first_visible(count * BLOCK_ROWS) // BLOCK_ROWS
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
        self._registered, self._name = count, names[count - 1]
        self.length = self._room = count * BLOCK_ROWS
        return self.length

    def register(self, token_ids: Sequence[int]) -> None:
        """Register the blocks that are full of committed rows for prefix reuse. `token_ids`: the sequence's tokens."""
        count = self.length // BLOCK_ROWS
        if count == self._registered:
            return
        for name in block_names(token_ids[self._registered * BLOCK_ROWS : count * BLOCK_ROWS], self._name):
            for kind, (first, _) in self._held.items():
                if self._registered >= first:
                    self.blocks[kind].register(self.tables[kind][self._registered], name)
            self._registered, self._name = self._registered + 1, name

    def _let_slide(self) -> None:
        """Give back the sliding blocks that no query from `length` on sees."""
        held, seen = self._held[SLIDING], self.windows[SLIDING].first_visible(self.length) // BLOCK_ROWS
        while held[0] < min(seen, held[1]):
            self.blocks[SLIDING].release(self.tables[SLIDING][held[0]])
            held[0] += 1


def blocks_of(rows: int) -> int:
    """Returns how many blocks so many rows fill, the last perhaps in part."""
    return -(-rows // BLOCK_ROWS)


def block_counts(sliding_window: int, max_length: int, max_rows: int) -> dict[LayerType, int]:
    """Returns how many blocks a sequence of `max_length` rows, written at most `max_rows` at a time, needs at most."""
    full = blocks_of(max_length)
    # any so many rows in a row may begin anywhere in their first block
    return {FULL: full, SLIDING: min(full, blocks_of(sliding_window - 1 + max_rows - 1) + 1)}


def block_bytes(config: TextConfig, kind: LayerType, element_bytes: int) -> int:
    """Returns the bytes of one block of a kind, in all of its layers."""
    return BLOCK_ROWS * row_bytes(config, kind, element_bytes)


def row_bytes(config: TextConfig, kind: LayerType, element_bytes: int) -> int:
    """Returns the bytes of one token's keys and values in all layers of a kind that have their own."""
    layers = [i for i in range(config.first_kv_shared_layer) if config.layer_types[i] == kind]
    return sum(layer_row_bytes(config, i, element_bytes) for i in layers)


def layer_row_bytes(config: TextConfig, layer: int, element_bytes: int) -> int:
    """Returns the bytes of one token's keys and values in one layer."""
    return 2 * config.layer_kv_heads(layer) * config.layer_head_dim(layer) * element_bytes


def block_names(token_ids: Sequence[int], before: bytes = b"") -> list[bytes]:
    """Returns the names of the blocks that the tokens fill, each a digest of all tokens up to the block's end.

    `before`: the name of the block before these.
    """
    names = []
    for first in range(0, len(token_ids), BLOCK_ROWS):
        content = before + array("q", token_ids[first : first + BLOCK_ROWS]).tobytes()
        before = hashlib.blake2b(content, digest_size=32).digest()
        names.append(before)
    return names
