"""The native CPU operators (`src/native`): the compiled module, and the memory that is handed to it.

The module takes addresses, typed by what lies there (`_native.pyi`). What is here takes them: it keeps the tensors
alive, checks dtypes, and hands in contiguous memory only. Weights stay where they are, but for bf16 ones that rows are
multiplied with: they are reordered into panels, one after another. Vectors are copied and become float32.
"""

from __future__ import annotations

import functools
import itertools
import os
import warnings
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from gemma_mtp.errors import EngineError
from gemma_mtp.huge_pages import SideBySide
from gemma_mtp.sizes.machine import cores
from gemma_mtp.weights.activations import ActivationScales
from gemma_mtp.weights.base import Weight
from gemma_mtp.weights.matrix import Matrix, matrices
from gemma_mtp.weights.panels import Panels

if TYPE_CHECKING:
    from gemma_mtp import _native
    from gemma_mtp._native import Bytes, Floats, Int32s, Int64s

#: what values of models that run natively are rounded to, whatever their weights are kept as
DTYPES = (torch.float32, torch.bfloat16)


@functools.cache
def native_available() -> bool:
    """Whether the compiled module, `gemma_mtp._native`, can be used. GEMMA_MTP_NATIVE=0 leaves it out; where it was not
    built, one warning says so."""
    if os.environ.get("GEMMA_MTP_NATIVE") == "0":
        return False
    try:
        from gemma_mtp import _native
    except ImportError as error:
        warnings.warn(
            f"gemma-mtp's native operators are not there ({error}); decoding goes on with PyTorch's own, which are"
            " slower. Install a C++ compiler and reinstall gemma-mtp.",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    check_instruction_set(os.environ.get("GEMMA_MTP_ISA"), [*_native.isas(), "portable", "control"])
    _native.set_threads(min(torch.get_num_threads(), cores()))  # PyTorch does not know of a container's share
    return True


def check_instruction_set(wanted: str | None, known: Sequence[str]) -> None:
    """Raise EngineError where GEMMA_MTP_ISA asks for an instruction set that this machine or build does not have."""
    if wanted is not None and wanted not in known:
        names = ", ".join(dict.fromkeys(known))
        raise EngineError(
            f"GEMMA_MTP_ISA is {wanted!r}, but must be one of {names} here; unset it for the best of them."
        )


def set_threads(threads: int) -> None:
    """How many threads decoding uses, PyTorch's included. The output does not depend on it."""
    torch.set_num_threads(threads)
    if native_available():
        from gemma_mtp import _native

        _native.set_threads(threads)


def usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether models there, of such a dtype, run natively."""
    return device.type == "cpu" and dtype in DTYPES and native_available()


def readable(model: nn.Module) -> bool:
    """Whether every matrix of a model is kept in a format that the module reads."""
    return all(matrix.lying.native() is not None for matrix in matrices(model))


@dataclass
class Memory:
    """Tensors whose addresses were handed out."""

    tensors: list[Tensor] = field(default_factory=list)
    room: SideBySide = field(default_factory=SideBySide)  # for what is reordered

    def matrix(self, weight: Weight, activations: Sequence[ActivationScales] = ()) -> _native.Weight:
        """A weight [rows, cols], and what its products are rounded by; experts' [E, rows, cols] lie one below the
        other."""
        from gemma_mtp import _native

        layout = weight.native()
        assert layout is not None, "readable() holds for the model"
        scales = None if layout.scales is None else self._kept(layout.scales)
        data = cast("Bytes", self._kept(layout.data).data_ptr())
        rows, cols = weight.shape[:-1].numel(), weight.shape[-1]
        ends = itertools.accumulate(part.rows for part in activations)
        rounding = [_native.Rounding(end, part.input, part.output) for end, part in zip(ends, activations, strict=True)]
        return _native.Weight(_native.WeightType[layout.type], data, floats(scales), rows, cols, rounding)

    def multiplied(self, matrix: Matrix) -> _native.Weight:
        """The weight of a linear layer or a head, which the model keeps in panels from now on where it fits."""
        if whole_panels(matrix.activations):
            matrix.convert_(Panels, self.room)
        return self.matrix(matrix.stored, matrix.activations)

    def ordered(self, matrix: Matrix, order_V: Tensor) -> _native.Weight:
        """The weight with its rows in this order, which the model keeps them in from now on."""
        matrix.order_rows_(order_V)
        return self.matrix(matrix.lying, matrix.activations)

    def vector(self, tensor: Tensor | None) -> Floats:
        """Address of a float32 vector; 0 for none."""
        return floats(None if tensor is None else self._kept(tensor.detach().float()))

    def _kept(self, tensor: Tensor) -> Tensor:
        self.tensors.append(tensor.contiguous())
        return self.tensors[-1]


def whole_panels(activations: Sequence[ActivationScales]) -> bool:
    """Whether parts of a weight that are multiplied apart, because they round their inputs otherwise, are whole panels
    of rows."""
    from gemma_mtp import _native

    alike = len({part.input for part in activations}) <= 1
    return alike or all(part.rows % _native.PANEL_ROWS == 0 for part in activations)


# Calls take some addresses each: what follows is kept short.


def floats(tensor: Tensor | None) -> Floats:
    """Returns the address of a contiguous float32 tensor; 0 for none."""
    if tensor is None:
        return 0  # type: ignore[return-value]
    assert tensor.dtype is torch.float32 and tensor.is_contiguous() and tensor.is_cpu
    return tensor.data_ptr()  # type: ignore[return-value]


def int64s(tensor: Tensor) -> Int64s:
    """Returns the address of a contiguous int64 tensor."""
    assert tensor.dtype is torch.int64 and tensor.is_contiguous() and tensor.is_cpu
    return tensor.data_ptr()  # type: ignore[return-value]


def floats_in(numbers: array[float]) -> Floats:
    """Returns the address of an array of float32."""
    assert numbers.typecode == "f"
    return numbers.buffer_info()[0]  # type: ignore[return-value]


def int64s_in(numbers: array[int]) -> Int64s:
    """Returns the address of an array of int64."""
    assert numbers.typecode == "q"
    return numbers.buffer_info()[0]  # type: ignore[return-value]


def int32s_in(numbers: array[int]) -> Int32s:
    """Returns the address of an array of int32."""
    assert numbers.typecode == "i"
    return numbers.buffer_info()[0]  # type: ignore[return-value]
