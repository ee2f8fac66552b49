"""Tensors that are not stored but computed from stored ones, a range of rows at a time.

What reads checkpoints sees them as it sees all others: by name, with the shape and a dtype of their values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from gemma_mtp.checkpoint.source import Piece
from gemma_mtp.files.headers import StoredTensor

#: returns some rows of the values, given what its parts hold of them and which rows these are
Decode = Callable[[Sequence[Tensor], range], Tensor]
Read = Callable[[Iterable[Piece]], Iterator[Tensor]]
#: bytes of a value as it is computed
VALUE_BYTES = 4


@dataclass(frozen=True)
class Part:
    """A stored tensor that values are computed from: `per_row` of its rows for each row, or all of it (0), or all of it
    for the row `only` and nothing for others."""

    tensor: StoredTensor
    per_row: int = 1
    only: int | None = None

    def belongs_to(self, rows: range) -> bool:
        return self.only is None or self.only in rows

    def piece(self, rows: range) -> Piece:
        """What is read of it for these rows."""
        if not self.per_row or self.only is not None:
            return self.tensor, None
        return self.tensor, slice(rows.start * self.per_row, rows.stop * self.per_row)


@dataclass(frozen=True)
class DerivedTensor(StoredTensor):
    """`dtype` is the float that the format's own tools give; `decode` gives float32, or what a part is stored as, of
    those parts that belong to its rows.

    `nbytes` counts what its parts take in the files. `undecoded` gives rows with nothing computed, for a weight that is
    kept as it is stored, by the dtypes that these rows can be read as; the smallest first. `activations`: the scales
    that products with it are rounded by, before and after; 0 for none.
    """

    parts: tuple[Part, ...]
    decode: Decode
    undecoded: Mapping[str, Decode] = field(default_factory=dict)
    activations: tuple[float, float] = (0.0, 0.0)

    @property
    def piece_bytes(self) -> int:
        """Bytes of all values as they are computed."""
        count = VALUE_BYTES
        for size in self.shape:
            count *= size
        return max(count, self.nbytes)

    def as_stored(self, kind: str) -> DerivedTensor:
        """Returns the same tensor, of which `undecoded` rows of that kind are read, from parts that are read so too
        where they are derived themselves."""
        parts = tuple(
            replace(part, tensor=part.tensor.as_stored(kind)) if isinstance(part.tensor, DerivedTensor) else part
            for part in self.parts
        )
        return replace(self, dtype=kind, parts=parts, decode=self.undecoded[kind], undecoded={})


def derived(name: str, shape: Sequence[int], dtype: str, parts: Sequence[Part], decode: Decode) -> DerivedTensor:
    """Returns a tensor that lies where its first part does."""
    first = parts[0].tensor
    nbytes = sum(part.tensor.nbytes for part in parts)
    return DerivedTensor(first.file, name, dtype, tuple(shape), nbytes, first.offset, tuple(parts), decode)


def alias(name: str, tensor: StoredTensor) -> DerivedTensor:
    """Returns the same values under another name."""
    return derived(name, tensor.shape, tensor.dtype, [Part(tensor)], lambda parts, rows: parts[0])


def with_activations(tensor: StoredTensor, activations: tuple[float, float]) -> StoredTensor:
    """Returns the same values, of which products are rounded by these scales."""
    if not any(activations):
        return tensor
    made = tensor if isinstance(tensor, DerivedTensor) else alias(tensor.name, tensor)
    return replace(made, activations=activations)


def activations_of(tensor: StoredTensor) -> tuple[float, float]:
    """Returns the scales that products with a tensor are rounded by, before and after; 0 for none."""
    return tensor.activations if isinstance(tensor, DerivedTensor) else (0.0, 0.0)


def rounded_products(tensors: Iterable[StoredTensor]) -> int:
    """Returns of how many tensors products are rounded."""
    return sum(any(activations_of(tensor)) for tensor in tensors)


def read_derived(pieces: Iterable[Piece], read: Read) -> Iterator[Tensor]:
    """Yields the values of each piece, in order; `read` yields those of stored tensors.

    Beside a piece, what is in memory is what it is computed from. Parts that are read whole are kept from one piece of
    a tensor to the next.
    """
    whole: dict[int, Tensor] = {}
    last: StoredTensor | None = None
    for tensor, rows in pieces:
        if not isinstance(tensor, DerivedTensor):
            yield next(iter(read([(tensor, rows)])))
            continue
        if tensor is not last:
            last, whole = tensor, {}
        yield _computed(tensor, rows, read, whole)


def _computed(tensor: DerivedTensor, rows: slice | None, read: Read, whole: dict[int, Tensor]) -> Tensor:
    wanted = range(*(rows or slice(None)).indices(tensor.shape[0]))
    needed = [i for i, part in enumerate(tensor.parts) if part.belongs_to(wanted)]
    places = [i for i in needed if i not in whole]
    found = dict(zip(places, read_derived([tensor.parts[i].piece(wanted) for i in places], read), strict=True))
    whole |= {i: value for i, value in found.items() if not tensor.parts[i].per_row}
    return tensor.decode([found[i] if i in found else whole[i] for i in needed], wanted)
