"""Values of stored tensors, copied or compared a piece at a time."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gemma_mtp.checkpoint.blocks import READ, dequantised
from gemma_mtp.checkpoint.kept import holds_stored, take_stored
from gemma_mtp.checkpoint.pieces import NAMES
from gemma_mtp.checkpoint.source import FLOAT_DTYPES, INTEGER_DTYPES, OnBytes, Source
from gemma_mtp.checkpoint.upload import Upload, as_it_is
from gemma_mtp.files.headers import StoredTensor
from gemma_mtp.weights.base import SCALES, Weight
from gemma_mtp.weights.dense import Dense
from gemma_mtp.weights.in_threads import in_threads

#: what is read of a tensor at once
PIECE_BYTES = 32 << 20


def stored_tensors(weights: Mapping[str, Weight]) -> dict[str, Tensor]:
    """The tensors a file holds of them: of a quantised matrix its data and its scales."""
    return {stored: tensor for name, weight in weights.items() for stored, tensor in weight.saved(name).items()}


def allowed_dtypes(dtype: torch.dtype) -> Iterable[str]:
    """Names of what may be stored for a tensor of `dtype`."""
    if dtype in (torch.int8, torch.uint8):  # what quantised matrices are stored as
        return [NAMES[dtype]]
    return [*FLOAT_DTYPES, *READ] if dtype.is_floating_point else INTEGER_DTYPES


def stored_views(weights: Mapping[str, Weight], stored: Collection[str]) -> dict[str, Weight]:
    """What stored tensors are copied into, by their names: a matrix that is stored quantised has two."""
    views: dict[str, Weight] = {}
    for name, weight in weights.items():
        if name + SCALES in stored:
            views.update((part, Dense(tensor)) for part, tensor in weight.saved(name).items())
        else:
            views[name] = weight
    return views


def nobody(done: int, of: int) -> None:
    """An `OnBytes` for work that nobody watches."""


#: values that are compared at once with what they became
COUNTED_VALUES = 1 << 20


@dataclass
class Int4Changes:
    """How many values became int4, and how many of them are not what they were, rounded to the dtype they were in."""

    values: int = 0
    changed: int = 0

    def count(self, before: Tensor, after: Weight) -> None:
        if after.format == "int4":
            self.values += before.numel()
            rows = max(1, COUNTED_VALUES // max(1, before[0].numel())) if before.dim() > 1 else len(before)
            # a few rows at a time: a second copy of a piece would be felt
            parts = [slice(first, min(first + rows, len(before))) for first in range(0, len(before), rows)]
            self.changed += sum(in_threads(lambda part: _differing(before[part], after[part]), parts, after.device))

    def __str__(self) -> str:
        return f"{self.changed:,} of {self.values:,} values changed in becoming int4"


def _differing(before: Tensor, after: Weight) -> int:
    return int((after.values().to(before.dtype) != before.to(after.device)).sum())


def copy_tensors(
    source: Source,
    views: Mapping[str, Weight],
    headers: Mapping[str, StoredTensor],
    added: Mapping[str, float],
    on_bytes: OnBytes = nobody,
    upload: Upload = as_it_is,
) -> Int4Changes:
    """Copy every stored tensor into the view of the same name, piece by piece: converted to its dtype, quantised, or
    quantised values as they are. All of that happens where `upload` brings a piece."""
    changes = Int4Changes()
    for name, rows, read in _read_stored(source, views, headers, on_bytes):
        stored = upload(read)
        del read
        view = views[name] if rows is None else views[name][rows]
        if holds_stored(view, headers[name]):
            take_stored(view, headers[name], stored)
        else:
            value = _value(headers[name], stored, added.get(name))
            view.copy_(value)
            changes.count(value, view)
            del value
        del stored  # before the next one is read
    return changes


def converted_tensors(
    source: Source,
    views: Mapping[str, Weight],
    headers: Mapping[str, StoredTensor],
    added: Mapping[str, float],
    on_bytes: OnBytes,
    changes: Int4Changes,
) -> Iterator[tuple[str, int, Tensor]]:
    """Yields what `copy_tensors` would make of every stored tensor, piece by piece, without memory for the whole.

    `views` may be on "meta". Each piece comes with the name of a tensor of `stored_tensors(views)` and the first of the
    rows that it has of it. `changes` is added to.
    """
    for name, rows, value in read_values(source, views, headers, added, on_bytes):
        view, first = views[name], 0 if rows is None else rows.start
        made = view.like(value)
        changes.count(value, made)
        for part, tensor in made.saved(name).items():
            yield part, first, tensor


def read_values(
    source: Source,
    names: Iterable[str],
    headers: Mapping[str, StoredTensor],
    added: Mapping[str, float],
    on_bytes: OnBytes = nobody,
) -> Iterator[tuple[str, slice | None, Tensor]]:
    """Yields every stored tensor by its name, file by file as it lies there, in pieces: all of it (None) or rows of it.

    `added` holds the numbers to be added to some of them, in float32. A piece counts as done once the next is asked
    for.
    """
    for name, rows, stored in _read_stored(source, names, headers, on_bytes):
        yield name, rows, _value(headers[name], stored, added.get(name))
        del stored


def _read_stored(
    source: Source, names: Iterable[str], headers: Mapping[str, StoredTensor], on_bytes: OnBytes
) -> Iterator[tuple[str, slice | None, Tensor]]:
    in_order = sorted(names, key=lambda name: (headers[name].file, headers[name].offset))
    places = [(name, rows) for name in in_order for rows in _ranges(headers[name])]
    values = source.read((headers[name], rows) for name, rows in places)
    done, total = 0, sum(headers[name].nbytes for name in in_order)
    for name, rows in places:
        stored = next(values)  # in a zip it would live until the next one is read
        yield name, rows, stored
        del stored
        done += _stored_bytes(headers[name], rows)
        on_bytes(done, total)


def _stored_bytes(tensor: StoredTensor, rows: slice | None) -> int:
    return tensor.nbytes if rows is None else (rows.stop - rows.start) * (tensor.nbytes // tensor.shape[0])


def _value(header: StoredTensor, stored: Tensor, added: float | None = None) -> Tensor:
    """What is stored as numbers, with `added` to each."""
    value = dequantised(header.dtype, stored) if header.dtype in READ else stored
    return value if added is None else value.float() + added


def _ranges(header: StoredTensor) -> list[slice | None]:
    """The whole of a stored tensor (None), or ranges of its rows, whose values fit into `PIECE_BYTES`."""
    if header.dtype not in READ:
        return pieces(header.shape, header.piece_bytes)
    return [None] if len(header.shape) < 2 else pieces(header.shape, 4 * math.prod(header.shape))


def same_values(source: Source, one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two stored tensors are equal, number by number, whatever they are stored as."""
    return one.shape == other.shape and all(_equal(a, b) for a, b in values_of_both(source, one, source, other))


def values_of_both(
    source: Source, one: StoredTensor, other_source: Source, other: StoredTensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the values of two stored tensors of one shape, the same rows of both at a time."""
    finer = max(_ranges(one), _ranges(other), key=len)
    both = zip(
        source.read((one, rows) for rows in finer), other_source.read((other, rows) for rows in finer), strict=True
    )
    for a, b in both:
        yield _value(one, a), _value(other, b)


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) if a.dtype == b.dtype else torch.equal(a.double(), b.double())


def pieces(shape: Sequence[int], nbytes: int) -> list[slice | None]:
    """The whole of a tensor (None), or ranges of its rows that fit into `PIECE_BYTES`."""
    if nbytes <= PIECE_BYTES or not shape:
        return [None]
    step = max(1, PIECE_BYTES * shape[0] // nbytes)
    return [slice(i, min(i + step, shape[0])) for i in range(0, shape[0], step)]
