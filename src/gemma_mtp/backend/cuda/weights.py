"""Weights as the kernels read them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gemma_mtp.backend.cuda.dots import DENSE, FP8, INT4, INT8
from gemma_mtp.errors import DeviceError
from gemma_mtp.weights.base import Weight
from gemma_mtp.weights.dense import Dense
from gemma_mtp.weights.device_order import Int4Halves, Int8x32Plain, Reordered
from gemma_mtp.weights.fp8 import Fp8
from gemma_mtp.weights.grouped import Grouped
from gemma_mtp.weights.int4 import Int4
from gemma_mtp.weights.int8 import Int8
from gemma_mtp.weights.int8x32 import Int8x32
from gemma_mtp.weights.matrix import Matrix


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


#: columns that share a scale where a row has one: no row has more, and kernels are compiled for each number
WHOLE_ROW = 1 << 30
#: formats that are held in another order for the kernels
REORDERED: dict[type[Weight], type[Reordered]] = {Int4: Int4Halves, Int8x32: Int8x32Plain}
KINDS: dict[type[Weight], int] = {Int8: INT8, Int8x32Plain: INT8, Int4Halves: INT4}


def device_weight(weight: Weight) -> DeviceWeight:
    """Returns a weight for the kernels: the same memory where its order is theirs, else reordered. Experts' lie one
    below the other. Raises DeviceError for a dense weight that is not bf16, and for a format that the kernels do not
    read."""
    rows, columns = weight.shape[:-1].numel(), weight.shape[-1]
    if isinstance(weight, Dense) and weight.dtype is torch.bfloat16:
        data = weight.tensor.detach().contiguous()
        return DeviceWeight(DENSE, data, data, rows, columns)
    if isinstance(weight, Fp8):
        return fp8_weight(weight.data.flatten(0, -2), weight.scales.flatten(0, -2))
    if type(weight) in REORDERED:
        weight = REORDERED[type(weight)].of(weight)
    if isinstance(weight, Grouped) and type(weight) in KINDS:
        data, scales = weight.data.contiguous(), weight.scales.contiguous()
        return DeviceWeight(KINDS[type(weight)], data, scales, rows, columns, weight.group)
    found = str(weight.dtype)[6:] if isinstance(weight, Dense) else weight.format
    raise DeviceError(
        f"the weights are {found}, but the GPU kernels multiply bfloat16, fp8, int8, int4 and q8_0; load them as"
        " bfloat16, or use the reference backend."
    )


def reorder_(matrix: Matrix) -> None:
    """Let a module hold its weight in the kernels' order from now on: there is no room for both."""
    if (form := REORDERED.get(type(matrix.stored))) is not None:
        matrix.convert_(form)


def of_module(matrix: Matrix) -> DeviceWeight:
    """Returns the weight of a module, which holds it in the kernels' order from now on."""
    reorder_(matrix)
    return device_weight(matrix.stored)


def fp8_weight(values_NK: Tensor, scales: Tensor) -> DeviceWeight:
    """Returns a weight of e4m3 values [N, K], or their bits in uint8, and float32 scales [N, K / 128], or [N, 1]: one a
    row."""
    rows, columns = values_NK.shape
    whole = scales.shape[1] == 1
    group = WHOLE_ROW if whole else 128
    return DeviceWeight(FP8, values_NK.contiguous().view(torch.uint8), scales.contiguous(), rows, columns, group)
