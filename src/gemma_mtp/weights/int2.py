"""2 bits: each value as value / scale + 2, four a byte, -2 .. 1, as Google's mobile checkpoints have them.

64 columns are 16 bytes; byte i holds columns i, i + 16, i + 32 and i + 48, the first in its lowest bits. Files have a
scale for each row, or for blocks of a table's row: it is kept once for each 64 columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemma_mtp.weights.grouped import BLOCK, Grouped

_SHIFTS = range(0, 8, 2)


class Int2(Grouped):
    """`data` uint8 [..., K / 4]. Making it of floats gives -1, 0 and 1; what is stored has -2 too."""

    format = "int2"
    group = BLOCK
    largest = 1
    data_dtype = torch.uint8
    data_per_value = 0.25
    native_type = "INT2"
    __slots__ = ()

    @staticmethod
    def packed(values_NK: Tensor) -> Tensor:
        quarters = (values_NK + 2).to(torch.uint8).unflatten(-1, (-1, 4, BLOCK // 4)).unbind(-2)
        joined = torch.stack([quarter << shift for quarter, shift in zip(quarters, _SHIFTS, strict=True)])
        return joined.sum(0, dtype=torch.uint8).flatten(-2)

    @staticmethod
    def unpacked(data: Tensor) -> Tensor:
        bytes_ = data.unflatten(-1, (-1, BLOCK // 4))
        return torch.stack([bytes_ >> shift & 3 for shift in _SHIFTS], -2).to(torch.int8).sub_(2).flatten(-3)

    def saved(self, name: str) -> dict[str, Tensor]:
        """As floats: no file of ours has this format."""
        return {name: self.dense()}
