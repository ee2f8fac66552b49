"""Group-wise symmetric quantisation of weights, in the layouts that the native operators read.

The columns of a group share a float32 scale; a value is a small integer times its group's scale. The native operators
round activations too, to 8 bits by row and group, and multiply integers. `linear` here does not: PyTorch's products
depend on how many rows there are in their last bits, and rounding would turn such a bit into a thousandth, and drafting
into other text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma_mtp.weights.base import SCALES, NativeLayout, Weight
from gemma_mtp.weights.in_threads import in_threads

#: columns of a block, of which a matrix must have a whole number
BLOCK = 64
#: elements of a matrix that are quantised, or made float32 again, at once: bounds what that takes beside the matrix
PIECE_ELEMENTS = 1 << 18
#: the same elsewhere than on a CPU, where each operator is a launch and no cache is to be kept
DEVICE_PIECE_ELEMENTS = 1 << 23


class Grouped(Weight):
    """`data` [..., its columns] and `scales` float32 [..., K / group], of a matrix [..., K]."""

    quantised = True
    #: columns that share a scale
    group: ClassVar[int]
    #: the largest magnitude that a value is rounded to
    largest: ClassVar[int]
    #: of `data`, and how many of its numbers hold a value
    data_dtype: ClassVar[torch.dtype]
    data_per_value: ClassVar[float] = 1
    #: the name of the layout among the native types
    native_type: ClassVar[str]
    __slots__ = ("_dtype", "data", "scales")

    def __init__(self, data: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> None:
        """`dtype`: of the values as they are given out."""
        self.data, self.scales, self._dtype = data, scales, dtype

    @staticmethod
    def packed(values_NK: Tensor) -> Tensor:
        """Returns `data` of int8 values [N, K]: themselves, unless a format has another order."""
        return values_NK

    @staticmethod
    def unpacked(data: Tensor) -> Tensor:
        """Returns the int8 values [..., K] in the columns' order."""
        return data

    @classmethod
    def best_scales(cls, groups: Tensor) -> Tensor:
        """Returns the scales [N, G] to round float32 values [N, G, group] with: the largest value stays as it is."""
        return groups.abs().amax(-1) / cls.largest

    @classmethod
    def fits(cls, weight: Weight) -> bool:
        """Whether the matrix has a whole number of blocks a row and was not rounded before; others stay as they are."""
        return not weight.quantised and weight.ndim >= 2 and weight.shape[-1] % BLOCK == 0

    @classmethod
    def of(cls, weight: Weight) -> Self:
        made = cls.empty(weight.shape, weight.dtype, weight.device)
        if weight.device.type != "meta":
            made.copy_(weight.dense())
        return made

    @classmethod
    def empty(cls, shape: Sequence[int], dtype: torch.dtype = torch.float32, device: Any = None) -> Self:
        """Returns one of `shape` [..., K], not yet filled."""
        *leading, K = shape
        data = torch.empty(*leading, int(K * cls.data_per_value), dtype=cls.data_dtype, device=device)
        return cls(data, torch.empty(*leading, K // cls.group, device=device), dtype)

    @classmethod
    def of_rows(cls, rows: Tensor, groups: int, dtype: torch.dtype) -> Self:
        """Returns the weight of rows as they are read: uint8 [..., 4 groups + bytes of data], the float32 scales of so
        many groups and then the data."""
        size = groups * torch.float32.itemsize
        scales = rows[..., :size].contiguous().view(torch.float32)
        return cls(rows[..., size:].contiguous().view(cls.data_dtype), scales, dtype)

    @classmethod
    def as_rows(cls, numbers_NK: Tensor, scales: Tensor) -> Tensor:
        """Returns rows as `of_rows` takes them, of int8 numbers [N, K] that the format holds and float32 scales [N, G]
        of their groups."""
        return torch.cat([part.contiguous().view(torch.uint8) for part in (scales, cls.packed(numbers_NK))], -1)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.scales.shape[:-1], self.scales.shape[-1] * self.group))

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def kept(self) -> dict[str, Tensor]:
        return {"data": self.data, "scales": self.scales}

    def saved(self, name: str) -> dict[str, Tensor]:
        return {name: self.data, name + SCALES: self.scales}

    def native(self) -> NativeLayout | None:
        return NativeLayout(self.native_type, self.data, self.scales)

    def __getitem__(self, index: Any) -> Self:
        return type(self)(self.data[index], self.scales[index], self._dtype)

    def copy_(self, weight: Tensor) -> None:
        """Round piece by piece."""
        flat, rows = self._flat(), weight.detach().reshape(-1, weight.shape[-1])
        pieces = zip(flat._pieces(), rows.split(flat._piece_rows), strict=True)
        in_threads(lambda pair: pair[0]._round(pair[1]), pieces, self.device)

    def like(self, weight: Tensor) -> Self:
        made = type(self).empty(weight.shape, self._dtype, weight.device)
        made.copy_(weight)
        return made

    def values(self) -> Tensor:
        values = self.unpacked(self.data)
        return (values.view(*self.scales.shape, self.group).float() * self.scales[..., None]).view(self.shape)

    def dense(self) -> Tensor:
        """Made piece by piece."""
        flat = self._flat()
        dense = torch.empty(flat.shape, dtype=self._dtype, device=self.device)
        for rows, piece in zip(dense.split(flat._piece_rows), flat._pieces(), strict=True):
            rows.copy_(piece.values())
        return dense.view(self.shape)

    def rows(self, indices: Tensor) -> Tensor:
        return self[indices].values().to(self._dtype)

    def linear(self, x: Tensor) -> Tensor:
        """The matrix is made float again piece by piece."""
        wide = x.float()
        return torch.cat([F.linear(wide, piece.values()) for piece in self._pieces()], -1).to(x.dtype)

    def _flat(self) -> Self:
        """As [N, K], the same memory."""
        data, scales = (tensor.view(-1, tensor.shape[-1]) for tensor in (self.data, self.scales))
        return type(self)(data, scales, self._dtype)

    @property
    def _piece_rows(self) -> int:
        most = PIECE_ELEMENTS if self.data.device.type == "cpu" else DEVICE_PIECE_ELEMENTS
        return max(1, most // self.shape[-1])

    def _pieces(self) -> list[Self]:
        """Ranges of the rows of [N, K], of at most so many elements each."""
        step = self._piece_rows
        return [self[i : i + step] for i in range(0, max(1, len(self.data)), step)]

    def _round(self, weight_NK: Tensor) -> None:
        numbers, scales = self.fitted(weight_NK)
        self.data.copy_(self.packed(numbers))
        self.scales.copy_(scales)

    @classmethod
    def fitted(cls, weight_NK: Tensor) -> tuple[Tensor, Tensor]:
        """Returns int8 numbers [N, K] and scales [N, G] that stand for a matrix's values."""
        groups = weight_NK.float().reshape(len(weight_NK), -1, cls.group)
        scales = cls.best_scales(groups)
        return cls.rounded(groups, scales).to(torch.int8).view(weight_NK.shape), scales

    @classmethod
    def rounded(cls, groups: Tensor, scales: Tensor) -> Tensor:
        """Returns whole numbers, the nearest within `largest`, of values [N, G, group] over their scales [N, G].

        They are a new tensor, on which callers work in place: new memory for every step takes three times as long.
        """
        safe = torch.where(scales > 0, scales, torch.ones_like(scales))
        return (groups / safe[..., None]).round_().clamp_(-cls.largest, cls.largest)
