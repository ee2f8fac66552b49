"""What a weight is to everything that uses one, whatever format it is kept in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

#: a quantised matrix is stored under the official name, and its scales under the same with this at its end, which no
#: official name has (a router's per_expert_scale comes near)
SCALES = "_scales"


class NativeLayout(NamedTuple):
    """How the native operators read a weight: its type's name in `_native.WeightType`, and the tensors it lies in."""

    type: str
    data: Tensor
    scales: Tensor | None = None


class Weight(ABC):
    """A matrix [..., out, in], experts' or clusters' with leading dimensions, or a vector.

    A format is a subclass in a file of its own, and a line in `formats.py`. A weight does not know who uses it: what
    the tensors of a model are kept as is up to its `Matrix`.
    """

    #: the format's name
    format: ClassVar[str]
    #: whether making the format rounds values
    quantised: bool = False

    @classmethod
    @abstractmethod
    def fits(cls, weight: Weight) -> bool:
        """Whether a weight can be made one of this format, losing no more than the format's own rounding."""

    @classmethod
    @abstractmethod
    def of(cls, weight: Weight) -> Self:
        """Returns a weight that fits in this format. Of one on "meta", it only makes room."""

    @property
    @abstractmethod
    def shape(self) -> torch.Size: ...

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of rows that are looked up, and of the float matrix."""

    @abstractmethod
    def kept(self) -> dict[str, Tensor]:
        """Returns the tensors in memory, by their names in the format."""

    def saved(self, name: str) -> dict[str, Tensor]:
        """Returns the tensors that a checkpoint stores for the weight of that name."""
        return {name: self.dense()}

    def native(self) -> NativeLayout | None:
        """Returns how the native operators read it; None where they can not."""
        return None

    @abstractmethod
    def __getitem__(self, index: Any) -> Weight:
        """Returns a part, by leading dimensions: a view, or a copy where the index is a tensor or the format's order
        does not allow a view."""

    def split(self, sizes: Sequence[int]) -> list[Weight]:
        """Returns ranges of so many rows each, one after another."""
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        return [self[end - size : end] for end, size in zip(ends, sizes, strict=True)]

    @abstractmethod
    def copy_(self, weight: Tensor) -> None:
        """Take the values of a tensor of the same shape, converted to this format."""

    @abstractmethod
    def like(self, weight: Tensor) -> Weight:
        """Returns what `copy_` would keep of a tensor of any shape that fits the format."""

    @abstractmethod
    def values(self) -> Tensor:
        """Returns the values that products are made with, as a float tensor of this shape."""

    @abstractmethod
    def dense(self) -> Tensor:
        """Returns the values in `dtype`: the tensor itself where it is kept so."""

    @abstractmethod
    def rows(self, indices: Tensor) -> Tensor:
        """Returns rows of a table, [..., in] of int64 [...], in `dtype`."""

    @abstractmethod
    def linear(self, x: Tensor) -> Tensor:
        """Returns x [..., in] times the transpose of the matrix [out, in]: [..., out] of the dtype of x."""

    def gathered_linear(self, x_MK: Tensor, index: Tensor) -> Tensor:
        """Returns each row's product with a matrix of its own, [M, N]; `index` [M, ...] picks those, [N, K] each."""
        gathered = self[index].values()
        return torch.bmm(gathered, x_MK.to(gathered.dtype).unsqueeze(-1)).squeeze(-1).to(x_MK.dtype)

    @property
    def device(self) -> torch.device:
        return next(iter(self.kept().values())).device

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.kept().values())

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return self.shape.numel()
