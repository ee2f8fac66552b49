"""Triton's interpreter, with products as tensor cores make them (`tensor_core_model`).

The interpreter's own product multiplies the bit patterns of bf16 and lets a library sum in an order of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import triton.language as tl
from tensor_core_model import HOPPER, Core, narrow, product, wide
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle


class Interpreter:
    """Launches kernels on the CPU. Triton's language is patched once, not once a launch and a call of a function."""

    def __init__(self, core: Core = HOPPER) -> None:
        assert os.environ["TRITON_INTERPRET"] == "1", "kernels are defined as interpreted ones (conftest.py)"
        self.core = core
        self.launches: list[str] = []

    def __call__(
        self, kernel: Any, grid: tuple[int, ...], *args: Any, warps: int = 4, stages: int = 2, **constants: Any
    ) -> None:
        self.launches.append(kernel.__name__)
        with _language(kernel.fn, self.core), np.errstate(all="ignore"):
            names = kernel.arg_names
            values = dict(zip(names, args, strict=False)) | constants
            assert values.keys() == set(names), f"{kernel.__name__} wants {names}"
            constant = _constants(kernel)
            given = {
                name: value if name in constant else interpreter._implicit_cvt(value) for name, value in values.items()
            }
            whole = (*grid, 1, 1)[:3]
            builder = interpreter.interpreter_builder
            builder.set_grid_dim(*whole)
            body = kernel.rewrite()
            for x, y, z in np.ndindex(*whole):
                builder.set_grid_idx(x, y, z)
                body(**given)


@functools.cache
def _constants(kernel: Any) -> frozenset[str]:
    annotations = kernel.fn.__annotations__
    return frozenset(name for name, kind in annotations.items() if "constexpr" in str(kind))


_types: dict[str, Any] = {}  # of NumPy, by the name of Triton's: the interpreter asks several times an operation


def _numpy_type(of: Any, own: Any = interpreter._get_np_dtype) -> Any:
    name = of.scalar.name
    if name not in _types:
        _types[name] = own(of)
    return _types[name]


interpreter._get_np_dtype = _numpy_type
# it would work out for each sum and product of integers whether they overflow, a dozen operations for one, and, as its
# assertions are off, look at none of that
_builder = interpreter.interpreter_builder
_builder.options = dataclasses.replace(_builder.options, sanitize_overflow=False)

_blocks: dict[Any, tuple[Any, Any, str]] = {}  # a block type's shape, size and name, by its elements and sizes
_shapes: dict[Any, tuple[Any, Any]] = {}  # a tensor's shape and size, by those of its type: made for every operation


def _block_type(self: Any, element_ty: Any, shape: Any, own: Any = tl.block_type.__init__) -> None:
    key = element_ty.name, *(size.value if isinstance(size, tl.constexpr) else size for size in shape)
    if key not in _blocks:
        own(self, element_ty, shape)
        _blocks[key] = self.shape, self.numel, self.name
    self.element_ty = element_ty
    self.shape, self.numel, self.name = _blocks[key]


def _tensor(self: Any, handle: Any, of: Any, own: Any = tl.tensor.__init__) -> None:
    key = tuple(of.shape) if of.is_block() else ()
    if key not in _shapes:
        own(self, handle, of)
        _shapes[key] = self.shape, self.numel
    self.handle, self.type, self.dtype = handle, of, of.scalar
    self.shape, self.numel = _shapes[key]


def _alike(self: Any, one: Any, other: Any, own: Any = TritonSemantic.broadcast_impl_value) -> Any:
    same = one.type.is_block() and other.type.is_block() and tuple(one.type.shape) == tuple(other.type.shape)
    return (one, other) if same else own(self, one, other)


tl.block_type.__init__, tl.tensor.__init__, TritonSemantic.broadcast_impl_value = _block_type, _tensor, _alike


@contextmanager
def _language(fn: Any, core: Core) -> Iterator[None]:
    builder = interpreter.InterpreterBuilder
    own = builder.create_dot, builder.cast_impl
    _patched(fn)
    patch, interpreter._patch_lang = interpreter._patch_lang, lambda fn: None
    builder.create_dot, builder.cast_impl = _create_dot(core), _create_cast(own[1])
    try:
        yield
    finally:
        interpreter._patch_lang = patch
        builder.create_dot, builder.cast_impl = own


@functools.cache
def _patched(fn: Any) -> None:
    """The language is interpreted from now on, as a kernel sees it, and as its own functions see its core."""
    interpreter._patch_lang(fn)
    interpreter._patch_lang(tl.zeros.fn)


def _create_dot(core: Core) -> Any:
    def create_dot(builder: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        assert a.dtype.scalar == b.dtype.scalar == tl.bfloat16, "tensor cores are given bf16"
        left, right = wide(a.data).astype(np.float64), wide(b.data).astype(np.float64)
        return TensorHandle(product(left, right, d.data.astype(np.float32), core), d.dtype.scalar)

    return create_dot


def _create_cast(own: Any) -> Any:
    def cast(builder: Any, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.float32 and target == tl.bfloat16:
            return TensorHandle(narrow(src.data), target)
        if source == tl.bfloat16 and target == tl.float32:
            return TensorHandle(wide(src.data), target)
        assert source == target or tl.bfloat16 not in (source, target), "bf16 goes through float32"
        return own(builder, src, dst_type)

    return cast
