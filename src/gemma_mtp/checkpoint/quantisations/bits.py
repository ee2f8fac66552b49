"""Numbers of a few bits as tools store them: packed integers, and floats of 4 and 8 bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: the dtype of `fp8_rows`
FP8_ROWS = "FP8 rows"
#: values of FP4 (E2M1), by their four bits
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])

#: values of FP6 (E2M3), by their six bits
E2M3 = torch.tensor([sign * (m / 8 if not e else (1 + m / 8) * 2 ** (e - 1))
                     for sign in (1, -1) for e in range(4) for m in range(8)])  # fmt: skip


def unpacked(packed: Tensor, bits: int, count: int) -> Tensor:
    """Returns `count` numbers [..., count] of `bits` bits, as uint8, of a last dimension of whole words of any width.

    A row's numbers lie one after another, the first in the lowest bits, across words where they do not divide.
    """
    words = packed.contiguous().view(torch.uint8)
    if bits == 8:
        return words[..., :count]
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
        return ((words[..., None] >> shifts) & (1 << bits) - 1).flatten(-2)[..., :count]
    # eight numbers are `bits` bytes
    missing = -words.shape[-1] % bits
    groups = torch.nn.functional.pad(words, (0, missing)).unflatten(-1, (-1, bits)).long()
    joined = (groups << torch.arange(0, 8 * bits, 8)).sum(-1)
    numbers = (joined[..., None] >> torch.arange(0, 8 * bits, bits)) & (1 << bits) - 1
    return numbers.to(torch.uint8).flatten(-2)[..., :count]


def fp4(packed: Tensor, count: int) -> Tensor:
    """Returns float32 values of FP4, two a byte, the first in the low half."""
    return E2M1[unpacked(packed, 4, count).int()]


def fp6(packed: Tensor, count: int) -> Tensor:
    """Returns float32 values of FP6, four in three bytes, the first in the lowest bits."""
    return E2M3[unpacked(packed, 6, count).int()]


def e4m3(stored: Tensor) -> Tensor:
    """Returns float32 values of FP8 (E4M3), whatever bytes they are stored as."""
    return stored.view(torch.float8_e4m3fn).float()


def for_rows(scale: Tensor, values: Tensor) -> Tensor:
    """Returns a scale for all values [..., K], [1], or one for each row, [..., 1], whatever dimensions of 1 it has."""
    return scale.float().reshape(1) if scale.numel() == 1 else scale.float().reshape(*values.shape[:-1], 1)


def fp8_rows(parts: Sequence[Tensor], rows: range) -> Tensor:
    """Returns rows as `weights.fp8` takes them, uint8 [..., 4 + K], of FP8 and of scales for each row or for all."""
    values, scale = parts
    each = for_rows(scale, values).expand(*values.shape[:-1], 1).contiguous()
    return torch.cat((each.view(torch.uint8), values.view(torch.uint8)), -1)


def grid_of(rows: int, columns: int, block: tuple[int, int]) -> tuple[int, int]:
    """Returns how many blocks of rows and of columns a matrix has, the last ones perhaps smaller."""
    return -(-rows // block[0]), -(-columns // block[1])


def in_blocks(values: Tensor, scales: Tensor, block: tuple[int, int], first: int = 0) -> Tensor:
    """Returns values [..., N, K] times the scales of their blocks, [..., blocks of rows, blocks of columns]; `first` is
    the number of the first row."""
    rows = torch.arange(first, first + values.shape[-2]) // block[0]
    return values * scales[..., rows, :].repeat_interleave(block[1], -1)[..., : values.shape[-1]]


def e8m0(stored: Tensor) -> Tensor:
    """Returns powers of two, float32, of exponents stored in bytes with 127 added; 255 is no number."""
    exponents = stored.view(torch.uint8).int()
    powers = torch.where(exponents == 0, 1 << 22, exponents << 23).view(torch.float32)  # 2 ** -127 is subnormal
    return torch.where(exponents == 255, torch.nan, powers)


def grouped(values: Tensor, scales: Tensor) -> Tensor:
    """Returns values [..., K] times the scales [..., K / group] of their groups."""
    return (values.unflatten(-1, (scales.shape[-1], -1)) * scales[..., None]).flatten(-2)


def mxfp4(parts: Sequence[Tensor], rows: range) -> Tensor:
    """Returns values of FP4 in groups with a power of two each, as the two functions below do of FP6 and FP8."""
    packed, scale = parts
    return grouped(fp4(packed, 2 * packed.shape[-1]), e8m0(scale))


def mxfp6(parts: Sequence[Tensor], rows: range) -> Tensor:
    packed, scale = parts
    return grouped(fp6(packed, 8 * packed.shape[-1] // 6), e8m0(scale))


def mxfp8(parts: Sequence[Tensor], rows: range) -> Tensor:
    values, scale = parts
    return grouped(values.float(), e8m0(scale))


#: the MX formats by their bits, and the columns that share a scale
MX, MX_GROUP = {4: mxfp4, 6: mxfp6, 8: mxfp8}, 32
