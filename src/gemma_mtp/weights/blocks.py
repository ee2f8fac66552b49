"""GGUF's blocks of 32 columns, rearranged into formats of ours without changing a value.

A block is a little-endian float16 scale d and its 32 values. Q8_0: 34 bytes, int8 values, each times d. Q4_0: 18 bytes;
byte j of sixteen holds value j in its low half and value j + 16 in its high half, each less 8 and then times d.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gemma_mtp.weights.base import Weight
from gemma_mtp.weights.dense import Dense
from gemma_mtp.weights.grouped import BLOCK, Grouped
from gemma_mtp.weights.int4 import Int4
from gemma_mtp.weights.int8x32 import Int8x32

BLOCK_COLUMNS = 32


def from_blocks(kind: str, data: Tensor, dtype: torch.dtype = torch.float32) -> Weight:
    """Returns the weight [..., K] of rows of blocks, uint8 [..., K / 32 * bytes of a block], given out in `dtype`.

    `kind` is one of `KINDS`. A row that is no whole number of two blocks, which the operators read together, becomes a
    float tensor of `dtype`.
    """
    size, values_of, form = KINDS[kind]
    blocks = data.unflatten(-1, (-1, size))
    scales = blocks[..., :2].contiguous().view(torch.float16)[..., 0].float()
    values = values_of(blocks[..., 2:])
    leading, columns = data.shape[:-1], values.shape[-2] * BLOCK_COLUMNS
    if columns % BLOCK:
        return Dense((values * scales[..., None]).flatten(-2).to(dtype))
    packed = form.packed(values.reshape(-1, columns))
    return form(packed.view(*leading, packed.shape[-1]), scales, dtype)


def _eight_bits(data: Tensor) -> Tensor:
    return data.contiguous().view(torch.int8)


def _four_bits(data: Tensor) -> Tensor:
    return torch.cat((data & 15, data >> 4), -1).to(torch.int8) - 8


#: bytes of a block, what its bytes after the scale hold as int8 [..., 32], and the format that holds the same values
KINDS: dict[str, tuple[int, Callable[[Tensor], Tensor], type[Grouped]]] = {
    "Q8_0": (34, _eight_bits, Int8x32),
    "Q4_0": (18, _four_bits, Int4),
}
