"""What a reader of a quantisation is: a function of a configuration and of what is stored."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from gemma_mtp.checkpoint.derived import Decode, DerivedTensor, Part, derived
from gemma_mtp.checkpoint.quantisations.bits import FP8_ROWS, MX, MX_GROUP, fp8_rows
from gemma_mtp.checkpoint.source import FLOAT_DTYPES, Source
from gemma_mtp.errors import QuantisationError
from gemma_mtp.files.headers import StoredTensor

#: tensors that say how others are packed are small; a larger one is no such tensor
FEW_BYTES = 1 << 16


@dataclass
class Reading:
    """What a reader made of a checkpoint, and what it used up.

    `tensors` are by the names that they have in a checkpoint that is not quantised. `used` names what they are made of,
    and what belongs to them. `kinds` counts them by a few words on how they are stored. `notes` are sentences on what
    the format's own tools would do that is not done.
    """

    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    kinds: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Quantised:
    """A checkpoint's stored tensors, and the quantisation that its configuration tells of."""

    source: Source
    method: str
    config: Mapping[str, Any]

    @functools.cached_property
    def stored(self) -> Mapping[str, StoredTensor]:
        return self.source.tensors()

    def named(self, end: str) -> Iterator[tuple[str, StoredTensor]]:
        """Yields stored tensors whose names end so, by what comes before."""
        for name, tensor in self.stored.items():
            if name.endswith(end):
                yield name.removesuffix(end), tensor

    def beside(self, name: str, tensor: StoredTensor, dtypes: Collection[str], *shapes: Sequence[int]) -> StoredTensor:
        """Returns the stored tensor of that name, which belongs to another. Raises QuantisationError where there is
        none, or where it is of another dtype than allowed, or of none of the shapes."""
        found = self.stored.get(name)
        if found is None:
            raise QuantisationError(
                f"{self.source.path} has {tensor.name}, but no {name}, which {self.method} stores beside it; copy the"
                " checkpoint again."
            )
        return self.fitting(found, dtypes, *shapes)

    def fitting(self, tensor: StoredTensor, dtypes: Collection[str], *shapes: Sequence[int]) -> StoredTensor:
        """Returns the tensor. Raises QuantisationError where its dtype or its shape is none of those expected."""
        if tensor.dtype not in dtypes or (shapes and tensor.shape not in [tuple(shape) for shape in shapes]):
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            raise QuantisationError(
                f"{tensor.file.name} has {tensor.name} of {tensor.dtype} {list(tensor.shape)}, but for {self.method}"
                f" {' or '.join(dtypes)}{f' {wanted}' if wanted else ''} was expected; the checkpoint is damaged, or"
                " another tool wrote it."
            )
        return tensor

    def value(self, tensor: StoredTensor) -> Tensor:
        """Returns the values of a small tensor. Raises QuantisationError for a large one."""
        if tensor.nbytes > FEW_BYTES:
            raise self.refused(f"{tensor.name} of {tensor.nbytes} bytes")
        return next(iter(self.source.read([(tensor, None)])))

    def refused(self, what: str) -> QuantisationError:
        """The error that this quantisation has something that can not be read."""
        return QuantisationError(
            f"{self.source.path} is quantised by {self.method} with {what}, which can not be read; give the unquantised"
            " checkpoint, and --quantize to quantise it."
        )

    def only(self, content: Mapping[str, Any], known: Mapping[str, Collection[Any] | None], where: str = "") -> None:
        """Raises QuantisationError for a field that is not known, or whose value is not among those known (None: any).

        A field that is null says nothing.
        """
        for name, value in content.items():
            if value is None:
                continue
            allowed = known.get(name, ())
            if allowed is not None and not any(value == other and type(value) is type(other) for other in allowed):
                raise self.refused(f"{where}{name} {str(value)[:60]!r}")

    def number(self, content: Mapping[str, Any], name: str, allowed: Collection[int] | None = None) -> int:
        """Returns a field that is a whole number above 0, or -1. Raises QuantisationError."""
        value = content.get(name)
        if type(value) is not int or not (value == -1 or 0 < value < 1 << 31) or (allowed and value not in allowed):
            raise self.refused(f"{name} {str(value)[:60]!r}")
        return value

    def block(self, size: Any, name: str) -> tuple[int, int] | None:
        """Returns a block's rows and columns, which a field of that name gives; None where it says nothing. Raises
        QuantisationError."""
        if size is None:
            return None
        if not (isinstance(size, list) and len(size) == 2 and all(type(n) is int and 0 < n < 1 << 31 for n in size)):
            raise self.refused(f"{name} {str(size)[:60]!r}")
        return size[0], size[1]

    def of_modules(self, ends: Collection[str]) -> set[str]:
        """Returns the names of all stored tensors that a module may have under one of these."""
        dotted = tuple(f".{end}" for end in ends)
        return {name for name in self.stored if name.endswith(dotted)}

    @property
    def dtype(self) -> str:
        """Of weights as the format's own tools give them, where scales do not say."""
        config = self.source.config()
        names = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
        return names.get(str(config.get("dtype", config.get("torch_dtype"))), "BF16")

    def fp8_matrix(
        self, weight: StoredTensor, scale: StoredTensor, decode: Decode, dtype: str | None = None
    ) -> StoredTensor:
        """Returns a derived tensor of FP8 with a scale for each row or for all, which a weight can be kept as."""
        parts = [Part(weight), Part(scale, 0 if scale.shape in ((), (1,)) else 1)]
        made = self.matrix(weight.name, weight.shape, parts, decode, dtype)
        return replace(made, undecoded={FP8_ROWS: fp8_rows})

    def mx_matrix(self, name: str, packed: StoredTensor, bits: int) -> DerivedTensor:
        """Returns a derived tensor of MXFP4, MXFP6 or MXFP8: groups with powers of two, stored beside it under the
        weight's name. Raises QuantisationError for what does not fit."""
        *leading, last = packed.shape or (0,)
        columns = 8 * last // bits
        if not leading or columns % MX_GROUP or 8 * last % bits:
            raise self.refused(f"{packed.name} of {list(packed.shape)}")
        scale = self.beside(f"{name}_scale", packed, ("U8", "F8_E8M0"), (*leading, columns // MX_GROUP))
        return self.matrix(name, (*leading, columns), [Part(packed), Part(scale)], MX[bits], self.dtype)

    def matrix(
        self, name: str, shape: Sequence[int], parts: Sequence[Part], decode: Decode, dtype: str | None = None
    ) -> DerivedTensor:
        """Returns a derived tensor, of a dtype that is given, or of its scales' where one of its parts is a float."""
        floats = [part.tensor.dtype for part in parts if part.tensor.dtype in FLOAT_DTYPES]
        return derived(name, shape, dtype or (floats[0] if floats else self.dtype), parts, decode)


Reader = Callable[[Quantised], Reading]
