"""FP8 (E4M3) with a scale for each row: what other tools' checkpoints store, for the GPU's kernels.

The native operators do not read it. Elsewhere than on a card such checkpoints are read as floats.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from gemma_mtp.weights.base import Weight
from gemma_mtp.weights.grouped import Grouped


class Fp8(Grouped):
    """`data` uint8 [..., K], the bits of E4M3, and `scales` float32 [..., 1]: a row is one group."""

    format = "fp8 by rows"
    largest = 448
    data_dtype = torch.uint8
    native_type = ""
    __slots__ = ()

    @classmethod
    def fits(cls, weight: Weight) -> bool:
        return not weight.quantised and weight.ndim >= 2

    @classmethod
    def empty(cls, shape: Sequence[int], dtype: torch.dtype = torch.float32, device: Any = None) -> Self:
        data = torch.empty(*shape, dtype=cls.data_dtype, device=device)
        return cls(data, torch.empty(*shape[:-1], 1, device=device), dtype)

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    @staticmethod
    def packed(values_NK: Tensor) -> Tensor:
        return values_NK.to(torch.float8_e4m3fn).view(torch.uint8)

    @staticmethod
    def unpacked(data: Tensor) -> Tensor:
        """Returns float32 values, in place of integers."""
        return data.view(torch.float8_e4m3fn).float()

    @classmethod
    def fitted(cls, weight_NK: Tensor) -> tuple[Tensor, Tensor]:
        """The largest magnitude of a row becomes the largest of E4M3."""
        values = weight_NK.float()
        scales = cls.best_scales(values)[:, None]
        return values / torch.where(scales > 0, scales, torch.ones_like(scales)), scales

    def values(self) -> Tensor:
        return self.unpacked(self.data) * self.scales

    def saved(self, name: str) -> dict[str, Tensor]:
        """As floats: no file of ours has this format."""
        return {name: self.dense()}

    def native(self) -> None:
        return None
