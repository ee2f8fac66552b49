"""Group-wise symmetric quantisation of weight matrices, in the layout the native operators read.

The columns of a group share a float32 scale. int8: groups of 64, value = data * scale, data in -127 .. 127. int4:
groups of 32, each value as value / scale + 8, in 1 .. 15, two values a byte, in blocks of two groups to 32 bytes. In a
block, place 8 u + 4 g + j holds column 4 u + j of group g; byte i holds place i in its low half and place i + 32 in its
high half: so one vector register holds both groups in turn, four columns at a time.

The native operators round activations too, to 8 bits by row and group, and multiply integers. `linear` here does not:
PyTorch's products depend on how many rows there are in their last bits, and rounding would turn such a bit into a
thousandth, and drafting into other text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma_mtp.weight_types import GROUPS, Quantisation

#: columns of a block, of which a matrix must have a whole number
BLOCK = 64
LARGEST = {"int8": 127, "int4": 7}
#: scales tried for int4, as shares of the one that keeps the largest value: rounding the rest better may be worth more
INT4_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
#: elements of a matrix that are quantised, or made float32 again, at once: bounds what that takes beside the matrix
PIECE_ELEMENTS = 1 << 18


@dataclass(frozen=True)
class QuantisedMatrix:
    """`data` is int8 [..., K] or packed uint8 [..., K / 2]; `scales` float32 [..., K / group]."""

    kind: Quantisation
    data: Tensor
    scales: Tensor

    @classmethod
    def empty(cls, kind: Quantisation, shape: Sequence[int], device: torch.device | None = None) -> QuantisedMatrix:
        """Of `shape` [..., K], not yet filled."""
        *leading, K = shape
        int8 = kind == "int8"
        data = torch.empty(*leading, K if int8 else K // 2, dtype=torch.int8 if int8 else torch.uint8, device=device)
        return cls(kind, data, torch.empty(*leading, K // GROUPS[kind], device=device))

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.data.shape[:-1], self.scales.shape[-1] * GROUPS[self.kind]))

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.scales.nbytes

    def numel(self) -> int:
        return self.shape.numel()

    def is_floating_point(self) -> bool:
        """Its values are, as a tensor's would be."""
        return True

    def __getitem__(self, index: Any) -> QuantisedMatrix:
        """By leading dimensions: views, or copies where the index is a tensor."""
        return QuantisedMatrix(self.kind, self.data[index], self.scales[index])

    def flat(self) -> QuantisedMatrix:
        """As [N, K], the same memory."""
        return QuantisedMatrix(
            self.kind, self.data.view(-1, self.data.shape[-1]), self.scales.view(-1, self.scales.shape[-1])
        )

    @property
    def piece_rows(self) -> int:
        """Rows of a piece."""
        return max(1, PIECE_ELEMENTS // self.shape[-1])

    def pieces(self) -> list[QuantisedMatrix]:
        """Ranges of the rows of [N, K], of at most `PIECE_ELEMENTS` each."""
        step = self.piece_rows
        return [self[i : i + step] for i in range(0, len(self.data), step)]

    def copy_(self, weight: Tensor) -> QuantisedMatrix:
        """Quantise a weight of the same shape into this, piece by piece."""
        start, rows = 0, weight.detach().reshape(-1, weight.shape[-1])
        for piece in self.flat().pieces():
            stop = start + len(piece.data)
            fresh = _quantised(rows[start:stop], self.kind)
            piece.data.copy_(fresh.data)
            piece.scales.copy_(fresh.scales)
            start = stop
        return self

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The whole matrix in `dtype`, made piece by piece."""
        flat = self.flat()
        dense = torch.empty(flat.shape, dtype=dtype, device=self.data.device)
        for rows, piece in zip(dense.split(flat.piece_rows), flat.pieces(), strict=True):
            rows.copy_(piece.dequantise())
        return dense.view(self.shape)

    def dequantise(self) -> Tensor:
        """The values the operators compute with, float32 [..., K]."""
        values = self.data if self.kind == "int8" else _unpack(self.data)
        return (values.view(*self.scales.shape, GROUPS[self.kind]).float() * self.scales[..., None]).view(self.shape)


#: a weight as it is stored
Weight = Tensor | QuantisedMatrix


def can_quantise(weight: Tensor) -> bool:
    """Whether the matrix has a whole number of blocks a row; others stay as they are."""
    return weight.ndim >= 2 and weight.shape[-1] % BLOCK == 0


def quantise(weight: Tensor, kind: Quantisation) -> QuantisedMatrix:
    """Round to the nearest; int4 takes the scale of `INT4_SHARES` with the least squared error, group by group."""
    return QuantisedMatrix.empty(kind, weight.shape, weight.device).copy_(weight)


def linear(x: Tensor, weight: Weight) -> Tensor:
    """x [..., K] times the transpose of a weight [N, K], made float again piece by piece."""
    if isinstance(weight, Tensor):
        return F.linear(x, weight)
    wide = x.float()
    return torch.cat([F.linear(wide, piece.dequantise()) for piece in weight.pieces()], -1).to(x.dtype)


def gathered_linear(x_MK: Tensor, weight: Weight, index: Tensor) -> Tensor:
    """Each row with a matrix of its own, [M, N]; `index` [M, ...] picks those, [N, K] each, from the weight."""
    gathered = weight[index] if isinstance(weight, Tensor) else weight[index].dequantise()
    return torch.bmm(gathered, x_MK.to(gathered.dtype).unsqueeze(-1)).squeeze(-1).to(x_MK.dtype)


def _quantised(weight_NK: Tensor, kind: Quantisation) -> QuantisedMatrix:
    N, K = weight_NK.shape
    groups = weight_NK.float().reshape(N, -1, GROUPS[kind])
    largest = groups.abs().amax(-1)
    if kind == "int8":
        scales = largest / LARGEST[kind]
        return QuantisedMatrix(kind, _rounded(groups, scales, kind).to(torch.int8).view(N, K), scales)
    best = torch.full_like(largest, torch.inf)
    scales = torch.zeros_like(largest)
    for share in INT4_SHARES:
        tried = largest * share / LARGEST[kind]
        error = _rounded(groups, tried, kind).mul_(tried[..., None]).sub_(groups).square_().sum(-1)
        scales = torch.where(error < best, tried, scales)
        best = torch.minimum(error, best)
    return QuantisedMatrix(kind, _pack(_rounded(groups, scales, kind).to(torch.int8).view(N, K)), scales)


def _rounded(groups: Tensor, scales: Tensor, kind: Quantisation) -> Tensor:
    """A new tensor, on which the rest works in place: new memory for every step takes three times as long."""
    safe = torch.where(scales > 0, scales, torch.ones_like(scales))
    return (groups / safe[..., None]).round_().clamp_(-LARGEST[kind], LARGEST[kind])


def _pack(values_NK: Tensor) -> Tensor:
    N = values_NK.shape[0]
    units = (values_NK + 8).to(torch.uint8).view(N, -1, 2, BLOCK // 8, 4)  # block, group, unit, column
    halves = units.transpose(2, 3).reshape(N, -1, 2, BLOCK // 2)
    return (halves[:, :, 0] | (halves[:, :, 1] << 4)).reshape(N, -1)


def _unpack(data: Tensor) -> Tensor:
    """[..., K / 2] to int8 [..., K], in the columns' order."""
    blocks = data.unflatten(-1, (-1, BLOCK // 2))
    halves = torch.stack((blocks & 15, blocks >> 4), -2).to(torch.int8) - 8
    return halves.view(*blocks.shape[:-1], BLOCK // 8, 2, 4).transpose(-3, -2).flatten(-4)
