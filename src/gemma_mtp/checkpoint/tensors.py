"""Values of stored tensors, copied or compared a piece at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from gemma_mtp.checkpoint.source import FLOAT_DTYPES, INTEGER_DTYPES, QUANTISED_DTYPES, Piece, Source, StoredTensor
from gemma_mtp.ops.quantise import QuantisedMatrix, Weight

#: a quantised matrix is stored under the official name, and its scales under the same with this at its end, which no
#: official name has (a router's per_expert_scale comes near)
SCALES = "_scales"
#: what is read of a tensor at once
PIECE_BYTES = 32 << 20


def stored_tensors(weights: Mapping[str, Weight]) -> dict[str, Tensor]:
    """The tensors a file holds of them: of a quantised matrix its data and its scales."""
    tensors: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if isinstance(weight, QuantisedMatrix):
            tensors |= {name: weight.data, name + SCALES: weight.scales}
        else:
            tensors[name] = weight
    return tensors


def allowed_dtypes(dtype: torch.dtype) -> Iterable[str]:
    """Names of what may be stored for a tensor of `dtype`."""
    if dtype in QUANTISED_DTYPES:
        return [QUANTISED_DTYPES[dtype]]
    return FLOAT_DTYPES if dtype.is_floating_point else INTEGER_DTYPES


def copy_tensors(
    source: Source, views: Mapping[str, Weight], headers: Mapping[str, StoredTensor], added: Mapping[str, float]
) -> None:
    """Copy every stored tensor into the view of the same name, converted to its dtype, file by file.

    `added` holds the numbers to be added to some of them, in float32.
    """
    names = sorted(views, key=lambda name: headers[name].file)
    places = [(name, rows) for name in names for rows in _pieces(headers[name])]
    values = source.read((headers[name], rows) for name, rows in places)
    for (name, rows), value in zip(places, values, strict=True):
        view = views[name] if rows is None else views[name][rows]
        view.copy_(value.float() + added[name] if name in added else value)


def same_values(source: Source, one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two stored tensors are equal, number by number, whatever they are stored as."""
    if one.shape != other.shape:
        return False
    wider = max(one, other, key=lambda header: header.nbytes)
    values = source.read(_in_turn(one, other, _pieces(wider)))
    return all(_equal(a, b) for a, b in zip(values, values, strict=True))


def _in_turn(one: StoredTensor, other: StoredTensor, pieces: Iterable[slice | None]) -> Iterator[Piece]:
    for rows in pieces:
        yield one, rows
        yield other, rows


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) if a.dtype == b.dtype else torch.equal(a.double(), b.double())


def _pieces(header: StoredTensor) -> list[slice | None]:
    """The whole tensor (None), or ranges of its rows that fit into `PIECE_BYTES`."""
    if header.nbytes <= PIECE_BYTES or not header.shape:
        return [None]
    count = header.shape[0]
    step = max(1, PIECE_BYTES * count // header.nbytes)
    return [slice(i, min(i + step, count)) for i in range(0, count, step)]
