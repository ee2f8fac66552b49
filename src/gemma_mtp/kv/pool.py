"""The tensors behind the blocks: keys and values of every layer that stores them, and one hidden state a sequence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gemma_mtp.config import LAYER_TYPES, LayerType, TextConfig
from gemma_mtp.huge_pages import zeros
from gemma_mtp.kv.blocks import BLOCK_ROWS, Blocks, BlockTable


@dataclass
class LayerRows:
    """Keys and values of one layer, each [G, blocks, BLOCK_ROWS, d]."""

    keys: Tensor
    values: Tensor


class KVPool:
    """The blocks of all sequences, so many of each kind, and `slots` hidden states, [slots, D].

    A sequence's slot holds the target's state that produced its last token. Addresses do not change.
    """

    def __init__(
        self, config: TextConfig, counts: Mapping[LayerType, int], slots: int, dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:  # fmt: skip
        self.config = config
        self.device = torch.device(device)
        self.blocks = {kind: Blocks(counts[kind]) for kind in LAYER_TYPES}
        shapes = [
            (config.layer_kv_heads(layer), counts[config.layer_types[layer]], BLOCK_ROWS, config.layer_head_dim(layer))
            for layer in range(config.first_kv_shared_layer)
        ]
        sizes = [math.prod(shape) for shape in shapes for _ in ("keys", "values")]
        # blocks lie far apart; and what attention masks must be finite, so nothing is left uninitialised
        on_cpu = self.device.type == "cpu"
        whole = zeros([sum(sizes)], dtype) if on_cpu else torch.zeros(sum(sizes), dtype=dtype, device=self.device)
        parts = iter(whole.split(sizes))
        self.layers = {i: LayerRows(next(parts).view(s), next(parts).view(s)) for i, s in enumerate(shapes)}
        self.states = torch.zeros(slots, config.hidden_size, dtype=dtype, device=self.device)
        self.free_slots = list(reversed(range(slots)))
        self.handles: dict[Any, Any] = {}  # what backends keep with it, by keys of their own

    def cache(self, max_length: int) -> KVCache:
        """Returns an empty cache, not open yet, for a sequence of at most so many rows."""
        return KVCache(self, BlockTable(self.blocks, self.config.sliding_window, max_length))


@dataclass(eq=False, slots=True, weakref_slot=True)
class KVCache:
    """One sequence's part of a pool: its blocks, and the slot of its state while it is open (else -1).

    `handle`: what the backend keeps with it, such as addresses.
    """

    pool: KVPool
    table: BlockTable
    slot: int = -1
    handle: Any = None

    def open(self) -> None:
        """Take a slot. The pool has one for each sequence that may be open."""
        assert self.slot < 0
        self.slot = self.pool.free_slots.pop()

    def close(self) -> None:
        """Give the slot and all blocks back, and forget every row."""
        self.table.release()
        if self.slot >= 0:
            self.pool.free_slots.append(self.slot)
            self.slot = -1

    @property
    def state(self) -> Tensor:
        """The target's hidden state after the final norm that produced the last token, [D]: a view of the slot."""
        return self.pool.states[self.slot]
