"""The native CPU operators (`src/native`): the compiled module, and the memory that is handed to it.

The module takes addresses; what is here keeps the tensors alive, checks dtypes, and hands in contiguous memory only.
Weights stay where they are, but for bf16 ones that rows are multiplied with: they are reordered into panels, one after
another. Vectors are copied and become float32.
"""

from __future__ import annotations

import functools
import os
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gemma_mtp.ops.linear import Matrix, Panels
from gemma_mtp.ops.quantise import QuantisedMatrix, Weight
from gemma_mtp.weight_types import Quantisation

#: the module's numbers of the weight types
WEIGHT_TYPES = {torch.float32: 0, torch.bfloat16: 1}
QUANTISED_TYPES: dict[Quantisation, int] = {"int8": 2, "int4": 3}
PANELS = 4


@functools.cache
def module() -> Any:
    """The compiled module, or None, with one warning, where it was not built. GEMMA_MTP_NATIVE=0 leaves it out."""
    if os.environ.get("GEMMA_MTP_NATIVE") == "0":
        return None
    try:
        from gemma_mtp import _native
    except ImportError as error:
        warnings.warn(
            f"gemma-mtp's native operators are not there ({error}); decoding goes on with PyTorch's own, which are"
            " slower. Install a C++ compiler and reinstall gemma-mtp.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    _native.set_threads(torch.get_num_threads())
    return _native


def set_threads(threads: int) -> None:
    """How many threads decoding uses, PyTorch's included. The output does not depend on it."""
    torch.set_num_threads(threads)
    if module() is not None:
        module().set_threads(threads)


def usable(weight: Tensor) -> bool:
    """Whether models with such weights run natively."""
    return weight.device.type == "cpu" and weight.dtype in WEIGHT_TYPES and module() is not None


@dataclass
class Memory:
    """Tensors whose addresses were handed out."""

    tensors: list[Tensor] = field(default_factory=list)

    def matrix(self, weight: Weight) -> Any:
        """A weight [rows, cols]; experts' [E, rows, cols] lie one below the other."""
        rows, cols = weight.shape[:-1].numel(), weight.shape[-1]
        if isinstance(weight, QuantisedMatrix):
            data, scales, number = weight.data.contiguous(), weight.scales.contiguous(), QUANTISED_TYPES[weight.kind]
            self.tensors += [data, scales]
            return module().Weight(number, data.data_ptr(), scales.data_ptr(), rows, cols)
        data = weight.detach().contiguous()
        self.tensors.append(data)
        return module().Weight(WEIGHT_TYPES[data.dtype], data.data_ptr(), 0, rows, cols)

    def multiplied(self, matrix: Matrix) -> Any:
        """The weight of a linear layer or a head, in panels from now on where it fits."""
        panels = matrix.to_panels_()
        return self.matrix(matrix.stored) if panels is None else self.panels(panels)

    def panels(self, panels: Panels) -> Any:
        """A weight in panels."""
        self.tensors.append(panels.data)
        return module().Weight(PANELS, panels.data.data_ptr(), 0, *panels.data.shape)

    def vector(self, tensor: Tensor | None) -> int:
        """Address of a float32 vector; 0 for none."""
        if tensor is None:
            return 0
        self.tensors.append(tensor.detach().float().contiguous())
        return self.tensors[-1].data_ptr()
