"""Weights as the kernels read them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gemma_mtp.backend.cuda.dots import DENSE, FP8, INT4, INT8
from gemma_mtp.errors import DeviceError
from gemma_mtp.weights.base import Weight
from gemma_mtp.weights.dense import Dense
from gemma_mtp.weights.grouped import Grouped
from gemma_mtp.weights.int4 import Int4
from gemma_mtp.weights.int8 import Int8
from gemma_mtp.weights.int8x32 import Int8x32
from gemma_mtp.weights.matrix import Matrix

#: elements of a matrix that are reordered at once
PIECE_ELEMENTS = 1 << 26


@dataclass(frozen=True)
class DeviceWeight:
    """A weight [rows, columns]: `data` of a kind of `dots`, and float32 `scales`, which are `data` where there are
    none."""

    kind: int
    data: Tensor
    scales: Tensor
    rows: int
    columns: int
    group: int = 1


def device_weight(weight: Weight) -> DeviceWeight:
    """Returns a weight for the kernels: the same memory where its order is theirs, else reordered. Experts' lie one
    below the other. Raises DeviceError for a dense weight that is not bf16, and for a format that the kernels do not
    read."""
    rows, columns = weight.shape[:-1].numel(), weight.shape[-1]
    if isinstance(weight, Dense) and weight.dtype is torch.bfloat16:
        data = weight.tensor.detach().contiguous()
        return DeviceWeight(DENSE, data, data, rows, columns)
    if isinstance(weight, Int8):
        return DeviceWeight(INT8, weight.data.contiguous(), weight.scales.contiguous(), rows, columns, weight.group)
    if isinstance(weight, Int8x32 | Int4):
        pack, kind = (weight.unpacked, INT8) if isinstance(weight, Int8x32) else (_int4, INT4)
        return DeviceWeight(kind, _reordered(weight, pack), weight.scales.contiguous(), rows, columns, weight.group)
    found = str(weight.dtype)[6:] if isinstance(weight, Dense) else weight.format
    raise DeviceError(
        f"the weights are {found}, but the GPU kernels multiply bfloat16, int8 and int4; load them as bfloat16, or use"
        " the reference backend."
    )


def of_module(matrix: Matrix) -> DeviceWeight:
    """Returns the weight of a module."""
    return device_weight(matrix.stored)


def _reordered(weight: Grouped, pack: Callable[[Tensor], Tensor]) -> Tensor:
    """Returns all data in another order, made in pieces, which bound what is unpacked at once."""
    old = weight.data.view(-1, weight.data.shape[-1])
    step, data = max(1, PIECE_ELEMENTS // weight.shape[-1]), torch.empty_like(old)
    for begin in range(0, len(old), step):
        data[begin : begin + step] = pack(old[begin : begin + step])
    return data


def _int4(data: Tensor) -> Tensor:
    """Returns int4 values, uint8 [N, K / 2], with column c of each group of 32 in the low half of its byte c and column
    c + 16 in the high one."""
    values = (Int4.unpacked(data) + 8).to(torch.uint8).unflatten(-1, (-1, 2, 16))
    return (values[..., 0, :] | (values[..., 1, :] << 4)).flatten(-2)


def fp8_weight(values_NK: Tensor, scales: Tensor) -> DeviceWeight:
    """Returns a weight of e4m3 values [N, K] and float32 scales [N, K / 128], or [N, 1]: one a row."""
    rows, columns = values_NK.shape
    whole = scales.shape[1] == 1
    group = -(-columns // 128) * 128 if whole else 128
    return DeviceWeight(FP8, values_NK.contiguous().view(torch.uint8), scales.contiguous(), rows, columns, group)
