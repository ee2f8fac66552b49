"""int8 in groups of 64: value = data * scale, data in -127 .. 127, and -128 where a file has it."""

from __future__ import annotations

import torch

from gemma_mtp.weight_types import GROUPS
from gemma_mtp.weights.grouped import Grouped


class Int8(Grouped):
    """`data` int8 [..., K]."""

    format = "int8"
    group = GROUPS["int8"]
    largest = 127
    data_dtype = torch.int8
    native_type = "INT8"
    __slots__ = ()
