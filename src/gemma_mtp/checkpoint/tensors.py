"""Values of stored tensors, copied or compared a piece at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from gemma_mtp.checkpoint.pieces import NAMES
from gemma_mtp.checkpoint.source import FLOAT_DTYPES, INTEGER_DTYPES, OnBytes, Piece, Source, StoredTensor
from gemma_mtp.weights.base import SCALES, Weight
from gemma_mtp.weights.dense import Dense

#: what is read of a tensor at once
PIECE_BYTES = 32 << 20


def stored_tensors(weights: Mapping[str, Weight]) -> dict[str, Tensor]:
    """The tensors a file holds of them: of a quantised matrix its data and its scales."""
    return {stored: tensor for name, weight in weights.items() for stored, tensor in weight.saved(name).items()}


def allowed_dtypes(dtype: torch.dtype) -> Iterable[str]:
    """Names of what may be stored for a tensor of `dtype`."""
    if dtype in (torch.int8, torch.uint8):  # what quantised matrices are stored as
        return [NAMES[dtype]]
    return FLOAT_DTYPES if dtype.is_floating_point else INTEGER_DTYPES


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


def copy_tensors(
    source: Source,
    views: Mapping[str, Weight],
    headers: Mapping[str, StoredTensor],
    added: Mapping[str, float],
    on_bytes: OnBytes = nobody,
) -> None:
    """Copy every stored tensor into the view of the same name, converted to its dtype or quantised, piece by piece."""
    for name, rows, value in read_values(source, views, headers, added, on_bytes):
        view = views[name] if rows is None else views[name][rows]
        view.copy_(value)
        del value  # before the next one is read


def converted_tensors(
    source: Source,
    views: Mapping[str, Weight],
    headers: Mapping[str, StoredTensor],
    added: Mapping[str, float],
    on_bytes: OnBytes = nobody,
) -> Iterator[tuple[str, int, Tensor]]:
    """Yields what `copy_tensors` would make of every stored tensor, piece by piece, without memory for the whole.

    `views` may be on "meta". Each piece comes with the name of a tensor of `stored_tensors(views)` and the first of the
    rows that it has of it.
    """
    for name, rows, value in read_values(source, views, headers, added, on_bytes):
        view, first = views[name], 0 if rows is None else rows.start
        for part, tensor in view.like(value).saved(name).items():
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
    in_order = sorted(names, key=lambda name: (headers[name].file, headers[name].offset))
    places = [(name, rows) for name in in_order for rows in pieces(headers[name].shape, headers[name].nbytes)]
    values = source.read((headers[name], rows) for name, rows in places)
    done, total = 0, sum(headers[name].nbytes for name in in_order)
    for name, rows in places:
        value = next(values)  # in a zip it would live until the next one is read
        yield name, rows, value.float() + added[name] if name in added else value
        del value
        done += _stored_bytes(headers[name], rows)
        on_bytes(done, total)


def _stored_bytes(tensor: StoredTensor, rows: slice | None) -> int:
    return tensor.nbytes if rows is None else (rows.stop - rows.start) * (tensor.nbytes // tensor.shape[0])


def same_values(source: Source, one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two stored tensors are equal, number by number, whatever they are stored as."""
    if one.shape != other.shape:
        return False
    wider = max(one, other, key=lambda header: header.nbytes)
    values = source.read(_in_turn(one, other, pieces(wider.shape, wider.nbytes)))
    return all(_equal(a, b) for a, b in zip(values, values, strict=True))


def _in_turn(one: StoredTensor, other: StoredTensor, ranges: Iterable[slice | None]) -> Iterator[Piece]:
    for rows in ranges:
        yield one, rows
        yield other, rows


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) if a.dtype == b.dtype else torch.equal(a.double(), b.double())


def pieces(shape: Sequence[int], nbytes: int) -> list[slice | None]:
    """The whole of a tensor (None), or ranges of its rows that fit into `PIECE_BYTES`."""
    if nbytes <= PIECE_BYTES or not shape:
        return [None]
    step = max(1, PIECE_BYTES * shape[0] // nbytes)
    return [slice(i, min(i + step, shape[0])) for i in range(0, shape[0], step)]
