"""The target's keys and values for one sequence: append rows, commit some, discard the rest.

Full layers keep every row. Sliding layers keep the window, the rows of one call and a little slack, in position order:
when the buffer is full its last `window - 1` rows move to the front, so a slice of it is all attention ever needs, with
no wrapped order and no stale row inside the slice. Rows after the committed length are garbage that the next call
overwrites; no slice taken afterwards includes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gemma_mtp.config import FULL, SLIDING, LayerType, TextConfig
from gemma_mtp.ops import reference as ops

#: rows a sliding buffer holds beyond what one call needs; its window moves to the front once in so many rows
SLACK_ROWS = 64


@dataclass
class LayerRows:
    """Buffers of one layer, each [1, G, capacity, d]."""

    keys: Tensor
    values: Tensor

    def write(self, start: int, k_1TGd: Tensor, v_1TGd: Tensor) -> None:
        stop = start + k_1TGd.shape[1]
        self.keys[:, :, start:stop] = k_1TGd.transpose(1, 2)
        self.values[:, :, start:stop] = v_1TGd.transpose(1, 2)

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        return self.keys[:, :, start:stop], self.values[:, :, start:stop]


class KVCache:
    """Keys and values of one sequence of at most `max_length` rows, written at most `max_rows` at a time when decoding.

    One call of the target is `begin(rows)`, its layers' `attend`, then `commit(rows kept)`. A call of more than
    `max_rows` rows is prefill and must be committed whole.
    """

    def __init__(
        self, config: TextConfig, max_length: int, max_rows: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.config = config
        self.device = torch.device(device)
        self.max_length = max_length
        self.max_rows = max_rows
        self.window = config.sliding_window
        self.sliding_capacity = min(max_length, self.window - 1 + max_rows + SLACK_ROWS)
        self.length = 0  # committed rows
        self.rows = 0  # rows of the call under way
        self.sliding_start = 0  # position of the sliding buffers' first row
        self.layers: dict[int, LayerRows] = {}
        for layer in range(config.first_kv_shared_layer):
            capacity = self.sliding_capacity if config.is_sliding(layer) else max_length
            shape = (1, config.layer_kv_heads(layer), capacity, config.layer_head_dim(layer))
            self.layers[layer] = LayerRows(
                torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device)
            )
        self.handle: Any = None  # the native operators' views of these buffers, made when first used
        self.donor_handle: Any = None
        self._masks: dict[tuple[LayerType, int], Tensor] = {}
        self._prefill_masks: dict[tuple[LayerType, int], Tensor] = {}
        self._long: dict[int, tuple[Tensor, Tensor]] = {}

    def begin(self, rows: int) -> None:
        """Announce a call whose rows take the positions length .. length + rows - 1."""
        assert 0 < rows and self.length + rows <= self.max_length, "the caller sizes the cache for its sequence"
        self.rows = rows
        self._prefill_masks.clear()
        self._long.clear()
        if self.length + rows - self.sliding_start > self.sliding_capacity and self._fits_after_move(rows):
            self._move_window_to_front()

    def attend(self, layer: int, q_BTHd: Tensor, k_BTGd: Tensor | None, v_BTGd: Tensor | None) -> Tensor:
        """Attention of the call's last T rows; a layer with keys and values of its own stores them first."""
        owner = self.config.kv_layer(layer)
        if k_BTGd is not None and v_BTGd is not None:
            self._append(layer, k_BTGd, v_BTGd)
        T, end, kind = q_BTHd.shape[1], self.length + self.rows, self.config.layer_types[layer]
        k, v = self._read(owner, self._first_visible(kind, end - T), end)
        if T == 1:
            return ops.attention(q_BTHd, k, v, None)
        if T <= self.max_rows:
            heads_per_group = q_BTHd.shape[2] // k.shape[1]
            return ops.attention(q_BTHd, k, v, self._decode_mask(kind, T, heads_per_group, q_BTHd)[:, -k.shape[2] :])
        return ops.masked_attention(q_BTHd, k, v, self._prefill_mask(kind, T, k))

    def commit(self, rows: int) -> None:
        """Keep the first `rows` rows of the call and discard the others."""
        assert 0 <= rows <= self.rows
        assert rows == self.rows or not self._long, "a prefill longer than the buffers can not be cut"
        if self._long:
            self.sliding_start = self.length + self.rows - self._kept_of_long()
        self.length += rows
        self.rows = 0
        self._long.clear()

    def committed(self, kind: LayerType) -> tuple[Tensor, Tensor]:
        """The donor layer's committed keys and values a query at position `length` sees, each [1, G, S, d]."""
        layer = self.config.donor_layers[kind]
        return self._read(layer, self._first_visible(kind, self.length), self.length)

    def _first_visible(self, kind: LayerType, position: int) -> int:
        """The first row a query at `position` sees."""
        return 0 if kind == FULL else max(0, position - self.window + 1)

    def _fits_after_move(self, rows: int) -> bool:
        return self.length - self._first_visible(SLIDING, self.length) + rows <= self.sliding_capacity

    def _move_window_to_front(self) -> None:
        first = self._first_visible(SLIDING, self.length)
        start, stop = first - self.sliding_start, self.length - self.sliding_start
        for layer, rows in self.layers.items():
            if self.config.is_sliding(layer):
                keys, values = rows.read(start, stop)
                rows.keys[:, :, : stop - start], rows.values[:, :, : stop - start] = keys.clone(), values.clone()
        self.sliding_start = first

    def _append(self, layer: int, k_BTGd: Tensor, v_BTGd: Tensor) -> None:
        if not self.config.is_sliding(layer):
            self.layers[layer].write(self.length, k_BTGd, v_BTGd)
        elif self.length + self.rows - self.sliding_start <= self.sliding_capacity:
            self.layers[layer].write(self.length - self.sliding_start, k_BTGd, v_BTGd)
        else:
            self._append_long(layer, k_BTGd, v_BTGd)

    def _append_long(self, layer: int, k_BTGd: Tensor, v_BTGd: Tensor) -> None:
        """A prefill chunk longer than the buffer: attend to it as it is, keep only what later calls can see."""
        first = self._first_visible(SLIDING, self.length)
        old_k, old_v = self.layers[layer].read(first - self.sliding_start, self.length - self.sliding_start)
        keys = torch.cat((old_k, k_BTGd.transpose(1, 2)), 2)
        values = torch.cat((old_v, v_BTGd.transpose(1, 2)), 2)
        self._long[layer] = keys, values
        kept = self._kept_of_long()
        self.layers[layer].keys[:, :, :kept] = keys[:, :, -kept:]
        self.layers[layer].values[:, :, :kept] = values[:, :, -kept:]

    def _kept_of_long(self) -> int:
        return min(self.window, self.length + self.rows)

    def _read(self, layer: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        if layer in self._long:
            keys, values = self._long[layer]
            return keys[:, :, start - stop :], values[:, :, start - stop :]
        offset = self.sliding_start if self.config.is_sliding(layer) else 0
        return self.layers[layer].read(start - offset, stop - offset)

    def _decode_mask(self, kind: LayerType, T: int, heads_per_group: int, like: Tensor) -> Tensor:
        """Mask of T decode rows over any number of cached rows: take its last S columns. Built once per T."""
        if (kind, T) not in self._masks:
            width = self.max_length if kind == FULL else min(self.max_length, self.window - 1 + T)
            visible = self._visible(kind, T, width, like.device)
            self._masks[kind, T] = ops.stack_mask(visible, heads_per_group, like.dtype)
        return self._masks[kind, T]

    def _prefill_mask(self, kind: LayerType, T: int, keys: Tensor) -> Tensor:
        if (kind, T) not in self._prefill_masks:
            self._prefill_masks[kind, T] = self._visible(kind, T, keys.shape[2], keys.device)
        return self._prefill_masks[kind, T]

    def _visible(self, kind: LayerType, T: int, width: int, device: torch.device) -> Tensor:
        """[T, width] boolean visibility of the last `width` rows to the last T of them."""
        rows = torch.arange(width, device=device)
        return ops.visible_rows(rows[width - T :], rows, None if kind == FULL else self.window)


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
