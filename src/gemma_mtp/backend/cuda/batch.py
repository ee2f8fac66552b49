"""The integers of one call: which rows there are, of which sequences, and where these keep their keys and values."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gemma_mtp.backend.cuda.attention import Seen, Stacks, rows_of_stack
from gemma_mtp.config import LAYER_TYPES, SLIDING, LayerType, TextConfig
from gemma_mtp.kv.blocks import blocks_of
from gemma_mtp.kv.pool import KVCache


@dataclass(frozen=True)
class Batch:
    """Rows of a call, int32 on the device. `most_rows`: no row lies at a position from there on."""

    token_ids_R: Tensor
    stacks: Mapping[LayerType, Stacks]
    seen: Mapping[LayerType, Seen]
    most_rows: int

    def with_tokens(self, token_ids_R: Tensor) -> Batch:
        """Returns the same rows with tokens that lie on the device."""
        return replace(self, token_ids_R=token_ids_R)


@dataclass(frozen=True)
class Part:
    """Rows of one sequence, whose first is at `position`."""

    cache: KVCache
    token_ids: Sequence[int]
    position: int


def stacks_of(counts: Sequence[int], rows: int) -> tuple[list[int], list[int]]:
    """Returns the first row and the row count of each stack of at most `rows` rows, of sequences of so many."""
    first, sizes, begin = [], [], 0
    for count in counts:
        for start in range(0, count, rows):
            first.append(begin + start)
            sizes.append(min(rows, count - start))
        begin += count
    return first, sizes


def make_batch(config: TextConfig, parts: Sequence[Part], device: torch.device, behind: int = 0) -> Batch:
    """Returns the batch of some sequences' rows, in order; `config` is that of the layers which run them.

    All integers go to the device in one piece.
    """
    counts = [len(part.token_ids) for part in parts]
    most = max(part.position + count for part, count in zip(parts, counts, strict=True))
    lists: list[array[int]] = [
        array("i", [token for part in parts for token in part.token_ids]),
        array("i", [part.position + i for part, n in zip(parts, counts, strict=True) for i in range(n)]),
        array("i", [i for i, n in enumerate(counts) for _ in range(n)]),
    ]
    for kind in LAYER_TYPES:
        first, sizes = stacks_of(counts, rows_of_stack(*heads_of(config, kind))[0])
        lists += [array("i", first), array("i", sizes), _table(parts, kind, blocks_of(most))]
    pieces = iter(_on_device(lists, device))
    token_ids, positions, owners = next(pieces), next(pieces), next(pieces)
    stacks, seen = {}, {}
    for kind in LAYER_TYPES:
        stacks[kind] = Stacks(next(pieces), next(pieces))
        window = config.sliding_window if kind == SLIDING else 0
        seen[kind] = Seen(positions, owners, next(pieces).view(len(parts), -1), window, behind)
    return Batch(token_ids, stacks, seen, most)


def _on_device(lists: Sequence[array[int]], device: torch.device) -> list[Tensor]:
    """Returns the lists as int32 on the device, copied at once. Each begins at a multiple of 16 bytes: where a pointer
    does not, Triton compiles the kernel anew."""
    lengths = [len(one) for one in lists]
    for one in lists:
        one.extend([0] * (-len(one) % 4))
    together = torch.cat([torch.frombuffer(one, dtype=torch.int32) for one in lists]).to(device)
    pieces = together.split([len(one) for one in lists])
    return [piece[:length] for piece, length in zip(pieces, lengths, strict=True)]


def _table(parts: Sequence[Part], kind: LayerType, width: int) -> array[int]:
    """Returns the block tables, one sequence after another, each `width` wide."""
    table = array("i")
    for part in parts:
        own = part.cache.table.tables[kind][:width]
        table.extend(own)
        table.extend([-1] * (width - len(own)))
    return table


def heads_of(config: TextConfig, kind: LayerType) -> tuple[int, int]:
    """Returns the query heads and the key-value heads of layers of a kind."""
    groups = config.num_key_value_heads if kind == SLIDING else config.num_global_key_value_heads
    return config.num_attention_heads, groups
