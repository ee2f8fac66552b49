"""GGUF's blocks of quantised values, made float32 and made from float32, bit for bit as the `gguf` package does it.

A row of a matrix is a whole number of blocks. A block's float16 scale d times a small integer is a value; the K types
divide 256 values into groups with small integer scales of their own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gemma_mtp.files.gguf import BLOCKS


def dequantised(kind: str, data: Tensor) -> Tensor:
    """Returns float32 values [..., K] of rows of blocks, uint8 [..., bytes of a row]. `kind` is one of `READ`."""
    values, size = BLOCKS[kind]
    blocks = data.reshape(-1, size)
    made = READ[kind](blocks).reshape(-1, values)
    return made.reshape(*data.shape[:-1], data.shape[-1] // size * values)


def quantised(kind: str, weight: Tensor) -> Tensor:
    """Returns rows of blocks, uint8 [..., bytes of a row], of float32 [..., K]. `kind` is one of `WRITTEN`."""
    values, size = BLOCKS[kind]
    made = WRITTEN[kind](weight.reshape(-1, values))
    return made.reshape(*weight.shape[:-1], weight.shape[-1] // values * size)


def _float16(data: Tensor) -> Tensor:
    """Float32 [n, 1] of two bytes a block, [n, 2]."""
    return data.contiguous().view(torch.float16).float()


def _halves(data: Tensor) -> Tensor:
    """The low halves of the bytes [n, g, w], then their high halves: [n, g, 2, w]."""
    return torch.stack((data & 15, data >> 4), -2)


def _high_bits(data: Tensor, shifts: int, width: int) -> Tensor:
    """Bits of the bytes [n, g, w], `width` at a time from the lowest on: [n, g, shifts, w]."""
    mask = (1 << width) - 1
    return torch.stack([(data >> (width * i)) & mask for i in range(shifts)], -2)


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].contiguous().view(torch.int8).float() * _float16(blocks[:, :2])


def _q4_0(blocks: Tensor) -> Tensor:
    values = _halves(blocks[:, None, 2:]).flatten(1).to(torch.int8) - 8
    return _float16(blocks[:, :2]) * values.float()


def _q5_0(blocks: Tensor) -> Tensor:
    fifth = _high_bits(blocks[:, 2:6, None], 8, 1).flatten(1)  # bit i of the 32 is value i's
    values = (_halves(blocks[:, None, 6:]).flatten(1) | (fifth << 4)).to(torch.int8) - 16
    return _float16(blocks[:, :2]) * values.float()


def _group_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima of eight groups, six bits each, float32 [n, 8], of twelve bytes [n, 12]."""
    scale, least, both = packed.view(-1, 3, 4).unbind(1)
    scales = torch.cat((scale & 0x3F, (both & 0x0F) | ((scale >> 2) & 0x30)), -1)
    minima = torch.cat((least & 0x3F, (both >> 4) | ((least >> 2) & 0x30)), -1)
    return scales.float(), minima.float()


def _of_groups(blocks: Tensor, values: Tensor) -> Tensor:
    """Of integers [n, 8, 32]: their group's scale times each, less its minimum."""
    scales, minima = _group_scales(blocks[:, 4:16].contiguous())
    d, least = _float16(blocks[:, :2]) * scales, _float16(blocks[:, 2:4]) * minima
    return d[..., None] * values.float() - least[..., None]


def _q4_k(blocks: Tensor) -> Tensor:
    return _of_groups(blocks, _halves(blocks[:, 16:].view(-1, 4, 32)).flatten(1, 2))


def _q5_k(blocks: Tensor) -> Tensor:
    fifth = _high_bits(blocks[:, None, 16:48], 8, 1).flatten(1, 2)
    return _of_groups(blocks, _halves(blocks[:, 48:].view(-1, 4, 32)).flatten(1, 2) | (fifth << 4))


def _q6_k(blocks: Tensor) -> Tensor:
    low = _halves(blocks[:, :128].view(-1, 2, 64)).reshape(-1, 8, 32)
    high = _high_bits(blocks[:, 128:192].view(-1, 2, 32), 4, 2).reshape(-1, 8, 32)
    values = ((low | (high << 4)).to(torch.int8) - 32).view(-1, 16, 16).float()
    scales = _float16(blocks[:, 208:]) * blocks[:, 192:208].contiguous().view(torch.int8).float()
    return scales[..., None] * values


def _to_q8_0(groups: Tensor) -> Tensor:
    d = groups.abs().amax(-1, keepdim=True) / 127
    scaled = groups * _inverse(d)
    whole = scaled.abs().floor()
    rounded = (whole + ((scaled.abs() - whole) >= 0.5)) * scaled.sign()  # halves away from zero
    return torch.cat((_bytes_of_float16(d), rounded.to(torch.int8).view(torch.uint8)), -1)


def _to_q4_0(groups: Tensor) -> Tensor:
    """The value that is largest in magnitude becomes -8."""
    d = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)) / -8
    values = (groups * _inverse(d) + 8.5).trunc().clamp(0, 15).to(torch.uint8)
    return torch.cat((_bytes_of_float16(d), values[:, :16] | (values[:, 16:] << 4)), -1)


def _inverse(scales: Tensor) -> Tensor:
    return torch.where(scales == 0, 0, 1 / scales)


def _bytes_of_float16(scales: Tensor) -> Tensor:
    return scales.half().view(torch.uint8)


#: the types that are read, and those that are written
READ: dict[str, Callable[[Tensor], Tensor]] = {
    "Q8_0": _q8_0, "Q4_0": _q4_0, "Q5_0": _q5_0, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
}  # fmt: skip
WRITTEN: dict[str, Callable[[Tensor], Tensor]] = {"Q8_0": _to_q8_0, "Q4_0": _to_q4_0}
