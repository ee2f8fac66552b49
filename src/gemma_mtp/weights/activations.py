"""Static scales that a checkpoint, trained with activations of 8 bits, rounds the activations of linear layers by."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LOWEST, HIGHEST = -128, 127


class ActivationScales(NamedTuple):
    """What the products of so many rows of a matrix are rounded by, before and after; 0 rounds nothing."""

    rows: int
    input: float
    output: float


def rounded(x: Tensor, scale: float) -> Tensor:
    """Returns x as 8 bits hold it: the nearest whole number of steps from -128 to 127, halves to even, times the scale.
    In the dtype of x, the scale too, as transformers does; a scale of 0 leaves x as it is."""
    if scale == 0:
        return x
    step = torch.tensor(scale, dtype=x.dtype, device=x.device)
    return (x / step).round().clamp(LOWEST, HIGHEST) * step
