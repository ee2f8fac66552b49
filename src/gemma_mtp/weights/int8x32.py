"""int8 in groups of 32, as GGUF's Q8_0: value = data * scale, data in -128 .. 127, scales of float16's values.

In a block of two groups, place 8 u + 4 g + j holds column 4 u + j of group g: so one vector register holds both groups
in turn, four columns at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemma_mtp.weight_types import GROUPS
from gemma_mtp.weights.grouped import BLOCK, Grouped


class Int8x32(Grouped):
    """`data` int8 [..., K] in that order."""

    format = "q8_0"
    group = GROUPS["q8_0"]
    largest = 127
    data_dtype = torch.int8
    native_type = "INT8_32"
    __slots__ = ()

    @classmethod
    def best_scales(cls, groups: Tensor) -> Tensor:
        """Those of float16 that a file of that format can hold; at the ends of its range the nearest there is."""
        top = torch.finfo(torch.float16).max
        return super().best_scales(groups).clamp(max=top).half().float()

    @staticmethod
    def packed(values_NK: Tensor) -> Tensor:
        return values_NK.view(len(values_NK), -1, 2, BLOCK // 8, 4).transpose(2, 3).reshape(values_NK.shape)

    @staticmethod
    def unpacked(data: Tensor) -> Tensor:
        return data.unflatten(-1, (-1, BLOCK // 8, 2, 4)).transpose(-3, -2).flatten(-4)
