"""int4 and q8_0 in the order that the GPU's kernels read: group by group. Numbers and scales are those of the formats
that files have.

A card that holds a model has no room for a copy beside it. So a matrix is held in this order in place of its own; it
is looked up, saved and made dense again from here.
"""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from torch import Tensor

from gemma_mtp.weights.base import SCALES, Weight
from gemma_mtp.weights.grouped import Grouped
from gemma_mtp.weights.int4 import Int4
from gemma_mtp.weights.int8x32 import Int8x32


class Reordered(Grouped):
    """Another format's numbers in an order of its own."""

    source: ClassVar[type[Grouped]]
    native_type = ""
    __slots__ = ()

    @classmethod
    def fits(cls, weight: Weight) -> bool:
        return isinstance(weight, cls.source) or super().fits(weight)

    @classmethod
    def of(cls, weight: Weight) -> Self:
        """Made piece by piece, which bounds what is unpacked at once."""
        if not isinstance(weight, cls.source):
            return super().of(weight)
        made = cls(torch.empty_like(weight.data), weight.scales, weight.dtype)
        if weight.device.type != "meta":
            for there, here in zip(made._flat()._pieces(), weight._flat()._pieces(), strict=True):
                there.data.copy_(cls.packed(cls.source.unpacked(here.data)))
        return made

    @classmethod
    def fitted(cls, weight_NK: Tensor) -> tuple[Tensor, Tensor]:
        return cls.source.fitted(weight_NK)

    def saved(self, name: str) -> dict[str, Tensor]:
        data = torch.empty_like(self.data)
        flat = type(self)(data, self.scales, self.dtype)._flat()
        for there, here in zip(flat._pieces(), self._flat()._pieces(), strict=True):
            there.data.copy_(self.source.packed(self.unpacked(here.data)))
        return {name: data, name + SCALES: self.scales}

    def native(self) -> None:
        return None


class Int4Halves(Reordered):
    """`data` uint8 [..., K / 2]: of each group, byte i has column i in its low half and column i + 16 in its high."""

    source = Int4
    format = "int4 by groups"
    group, largest = Int4.group, Int4.largest
    data_dtype = torch.uint8
    data_per_value = 0.5
    __slots__ = ()

    @staticmethod
    def packed(values_NK: Tensor) -> Tensor:
        halves = (values_NK + 8).to(torch.uint8).unflatten(-1, (-1, 2, 16))
        return (halves[..., 0, :] | (halves[..., 1, :] << 4)).flatten(-2)

    @staticmethod
    def unpacked(data: Tensor) -> Tensor:
        groups = data.unflatten(-1, (-1, 16))
        return torch.cat((groups & 15, groups >> 4), -1).to(torch.int8).sub_(8).flatten(-2)


class Int8x32Plain(Reordered):
    """`data` int8 [..., K] in the columns' order."""

    source = Int8x32
    format = "q8_0 by groups"
    group, largest = Int8x32.group, Int8x32.largest
    data_dtype = torch.int8
    __slots__ = ()
