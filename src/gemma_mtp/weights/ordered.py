"""A table whose rows lie in memory in an order of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gemma_mtp.weights.base import Weight


class Ordered(Weight):
    """What is asked of it is answered as if the rows lay in their usual order.

    The head of a drafter with centroids lies cluster by cluster, so that the tokens of a cluster are one block. A
    second copy beside it would take 134 MB for E2B and E4B in bfloat16.
    """

    format = "ordered"

    def __init__(self, lying: Weight, order_V: Tensor) -> None:
        """Row i of `lying` is row `order_V[i]` of the table; int64 [V], every row once."""
        self.lying, self.order = lying, order_V
        self.quantised = lying.quantised

    @classmethod
    def fits(cls, weight: Weight) -> bool:
        return False  # an order is given, not found

    @classmethod
    def of(cls, weight: Weight) -> Ordered:
        raise TypeError("a weight is ordered by Matrix.order_rows_")

    @property
    def shape(self) -> torch.Size:
        return self.lying.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.lying.dtype

    def kept(self) -> dict[str, Tensor]:
        return self.lying.kept()

    def saved(self, name: str) -> dict[str, Tensor]:
        return self[:].saved(name)

    def __getitem__(self, index: Any) -> Weight:
        return self.lying[self._places[index]]

    def copy_(self, weight: Tensor) -> None:
        self.lying.copy_(weight[self.order])

    def like(self, weight: Tensor) -> Weight:
        return self.lying.like(weight)

    def values(self) -> Tensor:
        return self[:].values()

    def dense(self) -> Tensor:
        return self[:].dense()

    def rows(self, indices: Tensor) -> Tensor:
        return self.lying.rows(self._places[indices])

    def linear(self, x: Tensor) -> Tensor:
        return self.lying.linear(x)[..., self._places]

    @property
    def _places(self) -> Tensor:
        """Where each row lies, int64 [V]."""
        places = torch.empty_like(self.order)
        places[self.order] = torch.arange(len(self.order), device=self.order.device)
        return places
