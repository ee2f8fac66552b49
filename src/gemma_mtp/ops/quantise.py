"""Group-wise symmetric quantisation of weight matrices, in the layout the native operators read.

The columns of a group share a float32 scale. int8: groups of 64, value = data * scale, data in -127 .. 127. int4:
groups of 32, each value as value / scale + 8, in 1 .. 15, two values a byte, in blocks of two groups to 32 bytes. In a
block, place 8 u + 4 g + j holds column 4 u + j of group g; byte i holds place i in its low half and place i + 32 in its
high half: so one vector register holds both groups in turn, four columns at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Quantisation = Literal["int8", "int4"]
QUANTISATIONS: tuple[Quantisation, ...] = ("int8", "int4")
#: columns that share a scale
GROUPS: dict[Quantisation, int] = {"int8": 64, "int4": 32}
#: columns of a block, of which a matrix must have a whole number
BLOCK = 64
LARGEST = {"int8": 127, "int4": 7}
#: scales tried for int4, as shares of the one that keeps the largest value: rounding the rest better may be worth more
INT4_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)


@dataclass(frozen=True)
class QuantisedMatrix:
    """`data` is int8 [N, K] or packed uint8 [N, K / 2]; `scales` float32 [N, K / group]."""

    kind: Quantisation
    data: Tensor
    scales: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.data.shape[0], self.scales.shape[1] * GROUPS[self.kind]

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.scales.nbytes

    def dequantise(self) -> Tensor:
        """The values the operators compute with, float32 [N, K]."""
        N, K = self.shape
        values = self.data if self.kind == "int8" else _unpack(self.data).reshape(N, K)
        return (values.view(N, -1, GROUPS[self.kind]).float() * self.scales[..., None]).view(N, K)


def can_quantise(weight_NK: Tensor) -> bool:
    """Whether the matrix has a whole number of blocks a row; others stay as they are."""
    return weight_NK.ndim == 2 and weight_NK.shape[1] % BLOCK == 0


def quantise(weight_NK: Tensor, kind: Quantisation) -> QuantisedMatrix:
    """Round to the nearest; int4 takes the scale of `INT4_SHARES` with the least squared error, group by group."""
    N, K = weight_NK.shape
    groups = weight_NK.detach().float().reshape(N, -1, GROUPS[kind])
    largest = groups.abs().amax(-1)
    if kind == "int8":
        scales = largest / LARGEST[kind]
        return QuantisedMatrix(kind, _rounded(groups, scales, kind).to(torch.int8).view(N, K), scales)
    best = torch.full_like(largest, torch.inf)
    scales = torch.zeros_like(largest)
    for share in INT4_SHARES:
        tried = largest * share / LARGEST[kind]
        error = (_rounded(groups, tried, kind) * tried[..., None] - groups).square().sum(-1)
        scales = torch.where(error < best, tried, scales)
        best = torch.minimum(error, best)
    return QuantisedMatrix(kind, _pack(_rounded(groups, scales, kind).to(torch.int8).view(N, K)), scales)


def _rounded(groups: Tensor, scales: Tensor, kind: Quantisation) -> Tensor:
    safe = torch.where(scales > 0, scales, torch.ones_like(scales))
    return (groups / safe[..., None]).round().clamp(-LARGEST[kind], LARGEST[kind])


def _pack(values_NK: Tensor) -> Tensor:
    N = values_NK.shape[0]
    units = (values_NK + 8).to(torch.uint8).view(N, -1, 2, BLOCK // 8, 4)  # block, group, unit, column
    halves = units.transpose(2, 3).reshape(N, -1, 2, BLOCK // 2)
    return (halves[:, :, 0] | (halves[:, :, 1] << 4)).reshape(N, -1)


def _unpack(data: Tensor) -> Tensor:
    blocks = data.view(data.shape[0], -1, BLOCK // 2)
    halves = torch.stack((blocks & 15, blocks >> 4), 2).to(torch.int8) - 8
    return halves.view(*blocks.shape[:2], BLOCK // 8, 2, 4).transpose(2, 3)
