"""GGUF files written a piece at a time, byte for byte as the `gguf` package writes them (version 3, little-endian)."""

from __future__ import annotations

import array
import struct
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma_mtp.files.gguf import ARRAY, BOOL, DEFAULT_ALIGNMENT, MAGIC, NUMBERS, STRING, TYPES, Value, nbytes_of
from gemma_mtp.files.pieces import PieceWriter

_TENSOR_TYPES = {name: number for number, (name, _, _) in TYPES.items()}
_NUMBER_TYPES = {code: number for number, code in NUMBERS.items()}
WHOLE, FRACTION = "I", "f"
#: type and shape of each tensor that a file is to hold, by name
Layout = Mapping[str, tuple[str, Sequence[int]]]


class GgufWriter(PieceWriter):
    """Writes a file whose tensors' types and shapes are known before their values are, in pieces and in any order.

    Metadata is as `read_header` gives it: a whole number is written as 32 bits without a sign, a fraction as float32,
    and numbers of an `array.array` by its type.
    """

    def __init__(self, path: Path, metadata: Mapping[str, Value], layout: Layout) -> None:
        """Raises ValueError for a tensor whose rows are no whole number of blocks."""
        sizes = {name: _size(name, dtype, shape) for name, (dtype, shape) in layout.items()}
        offsets: dict[str, int] = {}
        end = 0
        for name, size in sizes.items():
            offsets[name] = end
            end += _padded(size)
        with path.open("wb") as file:
            file.write(_header(metadata, layout, offsets))
            data = file.tell()
            file.truncate(data + end)
        super().__init__(path, {name: (data + offsets[name], size) for name, size in sizes.items()})


def _size(name: str, dtype: str, shape: Sequence[int]) -> int:
    size = nbytes_of(dtype, shape)
    if size is None:
        raise ValueError(f"{name} of shape {list(shape)} has rows of no whole number of blocks of {dtype}")
    return size


def _header(metadata: Mapping[str, Value], layout: Layout, offsets: Mapping[str, int]) -> bytes:
    parts = [MAGIC, struct.pack("<IQQ", 3, len(layout), len(metadata))]
    for key, value in metadata.items():
        parts += [_text(key), _value(value)]
    for name, (dtype, shape) in layout.items():
        dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        parts += [_text(name), dimensions, struct.pack("<IQ", _TENSOR_TYPES[dtype], offsets[name])]
    header = b"".join(parts)
    return header + bytes(_padded(len(header)) - len(header))


def _value(value: Value) -> bytes:
    """The type and the value."""
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _text(value)
    if isinstance(value, bool):
        return struct.pack("<I?", BOOL, value)
    if isinstance(value, int | float):
        code = WHOLE if isinstance(value, int) else FRACTION
        return struct.pack(f"<I{code}", _NUMBER_TYPES[code], value)
    kind, content = _parts(value)
    return struct.pack("<IIQ", ARRAY, kind, len(value)) + content


def _parts(values: Sequence[Any]) -> tuple[int, bytes]:
    """The type that all have, and their bytes."""
    if isinstance(values, array.array):
        if sys.byteorder == "big":
            values = array.array(values.typecode, values)
            values.byteswap()
        return _NUMBER_TYPES[values.typecode], values.tobytes()
    if values and isinstance(values[0], bool):
        return BOOL, bytes(values)
    return STRING, b"".join(map(_text, values))


def _text(text: str) -> bytes:
    content = text.encode(errors="surrogateescape")
    return struct.pack("<Q", len(content)) + content


def _padded(size: int) -> int:
    return -(-size // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT
