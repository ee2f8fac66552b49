"""The safetensors format: headers read and held to be sound, and files written a piece at a time.

A file is a length of 8 bytes, a header of JSON, and the tensors' bytes, one after another without gaps. The header says
of each tensor its dtype, its shape, and where its bytes begin and end, counted from the end of the header.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from gemma_mtp.files.headers import Header, StoredTensor, UnsoundError, end_of_tensors, sound_header
from gemma_mtp.files.pieces import PieceFile, PieceWriter

#: bits of an element by the name of its dtype, in the order of safetensors' own list: by alignment
BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
#: a longer header is refused, as the safetensors library does
MAX_HEADER_BYTES = 100_000_000
LENGTH_BYTES = 8
METADATA = "__metadata__"
LARGEST_DIMENSION = 2**63


def read_header(path: Path) -> Header:
    """What a file holds, of which no more than its header is read.

    Raises CheckpointError where the file can not be read, or where its header is not sound: every tensor's bytes must
    lie in the file, be as many as dtype and shape say, and overlap no others.
    """
    return sound_header(path, "safetensors", _parsed)


def _parsed(file: PieceFile) -> Header:
    if file.size < LENGTH_BYTES:
        raise UnsoundError(f"it has {file.size} bytes")
    length = int.from_bytes(file.read(LENGTH_BYTES, 0), "little")
    if length > file.size - LENGTH_BYTES:
        raise UnsoundError(f"its header has {length} bytes, but the file {file.size}")
    if length > MAX_HEADER_BYTES:
        raise UnsoundError(f"its header has {length} bytes, and more than {MAX_HEADER_BYTES} are never read")
    raw = _json(file.read(length, LENGTH_BYTES))
    metadata = raw.pop(METADATA, None) or {}
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        raise UnsoundError("its metadata is no object of strings")
    data = LENGTH_BYTES + length
    tensors = {name: _stored(file.path, name, entry, data) for name, entry in raw.items()}
    end = end_of_tensors(tensors, data, gaps=False)
    if end != file.size:
        raise UnsoundError(f"its tensors end at byte {end}, but the file at {file.size}")
    return Header(tensors, metadata)


def _json(content: bytes) -> dict[str, Any]:
    try:
        raw = json.loads(content.decode(), object_pairs_hook=_unique)
    except UnsoundError:
        raise
    except (ValueError, RecursionError) as error:
        raise UnsoundError(f"its header is not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise UnsoundError("its header is no JSON object")
    return raw


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise UnsoundError(f"its header has {next(name for name in names if names.count(name) > 1)!r} twice")
    return found


def _stored(path: Path, name: str, raw: Any, data: int) -> StoredTensor:
    """Of a header's JSON. `data`: where the tensors' bytes begin in the file."""
    dtype, shape, places = (
        raw.get(key) if isinstance(raw, dict) else None for key in ("dtype", "shape", "data_offsets")
    )
    if not (isinstance(dtype, str) and dtype in BITS):
        raise UnsoundError(f"{name} is of dtype {dtype!r}, which the format does not have")
    if not (_numbers(shape) and _numbers(places)) or len(places) != 2:
        raise UnsoundError(f"{name} has shape {shape!r} and data_offsets {places!r}")
    begin, end = places
    bits = math.prod(shape) * BITS[dtype]
    if bits != 8 * (end - begin):
        raise UnsoundError(f"{name} of {dtype} {shape} takes {bits / 8:g} bytes, but has those from {begin} to {end}")
    return StoredTensor(path, name, dtype, tuple(shape), end - begin, data + begin)


def _numbers(values: Any) -> TypeGuard[list[int]]:
    """Whether it is a list of whole numbers that the format can hold."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < LARGEST_DIMENSION for value in values)


#: dtype and shape of each tensor that a file is to hold, by name
Layout = Mapping[str, tuple[str, Sequence[int]]]


def lay_out(path: Path, layout: Layout, metadata: Mapping[str, str] | None = None) -> dict[str, StoredTensor]:
    """Write a file's header, with room for all tensors, and return where they are to be.

    The order is that of the safetensors library: by dtype, so that every tensor is aligned, then by name.
    """
    order = list(BITS)
    names = sorted(layout, key=lambda name: (-order.index(layout[name][0]), name))
    begin = 0
    raw: dict[str, Any] = {} if metadata is None else {METADATA: dict(metadata)}
    for name in names:
        dtype, shape = layout[name]
        end = begin + math.prod(shape) * BITS[dtype] // 8
        raw[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    content = json.dumps(raw, ensure_ascii=False, separators=(",", ":")).encode()
    content += b" " * (-len(content) % LENGTH_BYTES)
    with path.open("wb") as file:
        file.write(len(content).to_bytes(LENGTH_BYTES, "little") + content)
        data = file.tell()
        file.truncate(data + begin)
    return {name: _stored(path, name, raw[name], data) for name in names}


class SafetensorsWriter(PieceWriter):
    """Writes a file whose tensors' dtypes and shapes are known before their values are, in pieces and in any order."""

    def __init__(self, path: Path, layout: Layout, metadata: Mapping[str, str] | None = None) -> None:
        places = lay_out(path, layout, metadata)
        super().__init__(path, {name: (place.offset, place.nbytes) for name, place in places.items()})


def shards(layout: Layout, limit: int) -> Iterator[dict[str, tuple[str, Sequence[int]]]]:
    """The tensors of a layout in order, dealt out to files of at most `limit` bytes; a larger tensor has its own."""
    shard: dict[str, tuple[str, Sequence[int]]] = {}
    size = 0
    for name, (dtype, shape) in layout.items():
        nbytes = math.prod(shape) * BITS[dtype] // 8
        if shard and size + nbytes > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = (dtype, shape)
        size += nbytes
    if shard:
        yield shard
