"""A weight as one tensor, in any dtype of floating-point numbers, or of integers that list token ids."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma_mtp.weights.base import NativeLayout, Weight

NATIVE_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}


class Dense(Weight):
    """A tensor in its usual order; what is computed with it is differentiable."""

    format = "dense"
    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    @classmethod
    def fits(cls, weight: Weight) -> bool:
        return True

    @classmethod
    def of(cls, weight: Weight) -> Dense:
        return cls(weight.dense())

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def kept(self) -> dict[str, Tensor]:
        return {"weight": self.tensor}

    def native(self) -> NativeLayout | None:
        name = NATIVE_TYPES.get(self.tensor.dtype)
        return None if name is None else NativeLayout(name, self.tensor.detach())

    def __getitem__(self, index: Any) -> Dense:
        return Dense(self.tensor[index])

    def copy_(self, weight: Tensor) -> None:
        self.tensor.copy_(weight)

    def like(self, weight: Tensor) -> Dense:
        return Dense(weight.to(self.dtype))

    def values(self) -> Tensor:
        return self.tensor

    def dense(self) -> Tensor:
        return self.tensor

    def rows(self, indices: Tensor) -> Tensor:
        return F.embedding(indices, self.tensor)

    def linear(self, x: Tensor) -> Tensor:
        return F.linear(x, self.tensor)
