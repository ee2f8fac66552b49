"""int4 in groups of 32: each value as value / scale + 8, two values a byte, in blocks of two groups to 32 bytes.

In a block, place 8 u + 4 g + j holds column 4 u + j of group g; byte i holds place i in its low half and place i + 32
in its high half: so one vector register holds both groups in turn, four columns at a time. Quantising gives 1 .. 15,
and 0, which is -8, where a group lies on a grid of 16 levels (`grid`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemma_mtp.weight_types import GROUPS
from gemma_mtp.weights.grid import grid_of
from gemma_mtp.weights.grouped import BLOCK, Grouped

#: scales tried, as shares of the one that keeps the largest value: rounding the rest better may be worth more
SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)


class Int4(Grouped):
    """`data` uint8 [..., K / 2]."""

    format = "int4"
    group = GROUPS["int4"]
    largest = 7
    data_dtype = torch.uint8
    data_per_value = 0.5
    native_type = "INT4"
    __slots__ = ()

    @classmethod
    def best_scales(cls, groups: Tensor) -> Tensor:
        """Of `SHARES`, the one with the least squared error, group by group."""
        largest = groups.abs().amax(-1)
        best = torch.full_like(largest, torch.inf)
        scales = torch.zeros_like(largest)
        for share in SHARES:
            tried = largest * share / cls.largest
            error = cls.rounded(groups, tried).mul_(tried[..., None]).sub_(groups).square_().sum(-1)
            scales = torch.where(error < best, tried, scales)
            best = torch.minimum(error, best)
        return scales

    @classmethod
    def fitted(cls, weight_NK: Tensor) -> tuple[Tensor, Tensor]:
        """Groups that lie on a grid of 16 levels stay as they are."""
        grid = grid_of(weight_NK, cls.group)
        if grid is not None and bool(grid.exact.all()):
            return grid.numbers.view(weight_NK.shape), grid.steps
        numbers, scales = super().fitted(weight_NK)
        if grid is None:
            return numbers, scales
        groups = numbers.view(grid.numbers.shape)
        kept = torch.where(grid.exact[..., None], grid.numbers, groups)
        return kept.view(weight_NK.shape), torch.where(grid.exact, grid.steps, scales)

    @staticmethod
    def packed(values_NK: Tensor) -> Tensor:
        N = values_NK.shape[0]
        units = (values_NK + 8).to(torch.uint8).view(N, -1, 2, BLOCK // 8, 4)  # block, group, unit, column
        halves = units.transpose(2, 3).reshape(N, -1, 2, BLOCK // 2)
        return (halves[:, :, 0] | (halves[:, :, 1] << 4)).reshape(N, -1)

    @staticmethod
    def unpacked(data: Tensor) -> Tensor:
        blocks = data.unflatten(-1, (-1, BLOCK // 2))
        halves = torch.stack((blocks & 15, blocks >> 4), -2).to(torch.int8) - 8
        return halves.view(*blocks.shape[:-1], BLOCK // 8, 2, 4).transpose(-3, -2).flatten(-4)
