"""How rows are drawn: temperatures, noise keys and filters on the device, and the counter-based noise.

The noise is that of `decoding.noise`: the hash runs on 64-bit integers and is equal everywhere; its two logarithms are
float64, rounded to float32, and may differ from a CPU's in the last bit of float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemma_mtp.decoding.noise import signed
from gemma_mtp.decoding.params import Filters


class DeviceFilters(NamedTuple):
    """Each row's filters: `top_k_R` int64, 0 for all; `top_p_R` float64, 1 for all; `least_R` float64: the logarithm of
    min_p, -inf for all."""

    top_k_R: Tensor
    top_p_R: Tensor
    least_R: Tensor


class Draws(NamedTuple):
    """How each row is chosen: temperature float64 (0: the largest logit) and noise key int64; filters where some row
    has any."""

    temperatures_R: Tensor
    keys_R: Tensor
    filters: DeviceFilters | None = None

    def repeated(self, count: int) -> Draws:
        """Returns each row's `count` times, but for the keys, which there are already."""
        wide = [tensor.repeat_interleave(count, output_size=len(tensor) * count) for tensor in self.filters or ()]
        temperatures = self.temperatures_R.repeat_interleave(count, output_size=len(self.temperatures_R) * count)
        return Draws(temperatures, self.keys_R, DeviceFilters(*wide) if wide else None)

    def split(self, rows: int) -> list[Draws]:
        """Returns so many rows' at a time, one after another: views."""
        pieces = [tensor.split(rows) for tensor in (self.temperatures_R, self.keys_R, *(self.filters or ()))]
        return [
            Draws(temperatures, keys, DeviceFilters(*of_filters) if of_filters else None)
            for temperatures, keys, *of_filters in zip(*pieces, strict=True)
        ]


def draws_on(
    device: torch.device, temperatures: Sequence[float], keys: Sequence[int], filters: Sequence[Filters]
) -> Draws | None:
    """Returns how rows are drawn, on the device; None where none is. No `filters` are none for any row."""
    if not any(temperatures):
        return None
    floats = torch.tensor(temperatures, dtype=torch.float64).to(device)
    words = torch.tensor([signed(key) for key in keys], dtype=torch.int64).to(device)
    if not any(one.active for one in filters):
        return Draws(floats, words)
    top_k, top_p, min_p = zip(*filters, strict=True)
    return Draws(floats, words, DeviceFilters(
        torch.tensor(top_k).to(device), torch.tensor(top_p, dtype=torch.float64).to(device),
        torch.tensor([least_of(one) for one in min_p], dtype=torch.float64).to(device),
    ))  # fmt: skip


def least_of(min_p: float) -> float:
    """Returns the least log-probability beside the largest that min_p leaves."""
    return math.log(min_p) if min_p > 0 else -math.inf


@triton.jit
def mixed(words):
    """splitmix64's finaliser of uint64 words."""
    words = (words ^ (words >> 30)) * 0xBF58476D1CE4E5B9
    words = (words ^ (words >> 27)) * 0x94D049BB133111EB
    return words ^ (words >> 31)


@triton.jit
def gumbel(keys, token_ids):
    """Gumbel noise of row keys (int64) and token ids, float32 as `noise.keyed_gumbel`."""
    golden = tl.full((1,), 0x9E3779B97F4A7C15, tl.uint64)
    words = mixed(keys.to(tl.uint64, bitcast=True) + (token_ids + 1).to(tl.uint64) * golden)
    odd = ((words >> 12) * 2 + 1).to(tl.int64, bitcast=True)
    uniform = odd.to(tl.float64) * 1.1102230246251565e-16  # 2**-53
    return (-tl.log(-tl.log(uniform))).to(tl.float32)


@triton.jit
def noisy(logits, token_ids, temperatures, keys):
    """What is compared, float64."""
    drawn = temperatures > 0.0
    scores = logits.to(tl.float64) / tl.where(drawn, temperatures, 1.0)
    return tl.where(drawn, scores + gumbel(keys, token_ids).to(tl.float64), scores)
