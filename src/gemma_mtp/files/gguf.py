"""The GGUF format (versions 2 and 3): headers read and held to be sound, of one file or of the parts of a split one.

A file is four bytes of magic, a version, how many tensors and how many values of metadata there are, the metadata, a
record of each tensor, and after that, from the next multiple of the alignment on, the tensors' bytes. All numbers are
little-endian. Shapes are given here in the order of NumPy's and PyTorch's: the columns, which lie together, last.
"""

from __future__ import annotations

import array
import math
import re
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma_mtp.errors import CheckpointError
from gemma_mtp.files.headers import Header, StoredTensor, UnsoundError, end_of_tensors, sound_header
from gemma_mtp.files.pieces import PieceFile

MAGIC = b"GGUF"
VERSIONS = (2, 3)
#: types of tensors by their number: name, values of a block, and bytes of a block
TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip
BLOCKS = {name: (values, nbytes) for name, values, nbytes in TYPES.values()}
#: types of metadata's numbers, as `struct` writes them
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
BOOL, STRING, ARRAY = 7, 8, 9
ALIGNMENT_KEY, DEFAULT_ALIGNMENT = "general.alignment", 32
SPLIT_NUMBER, SPLIT_COUNT, SPLIT_TENSORS = "split.no", "split.count", "split.tensors.count"
#: a longer header is refused: that of a vocabulary of 262144 tokens with its merges has 16 MB
MAX_HEADER_BYTES = 256 << 20
MAX_DIMENSIONS = 4
LARGEST = 2**63
CHUNK_BYTES = 1 << 20
_PART = re.compile(r"^(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")

#: a value of metadata: a number, a flag, a text, or a sequence of one kind of these
Value = Any


def nbytes_of(dtype: str, shape: Sequence[int]) -> int | None:
    """Returns the bytes of a tensor, or None where a row is no whole number of blocks."""
    values, size = BLOCKS[dtype]
    if shape and shape[-1] % values:
        return None
    return math.prod(shape) // values * size if shape else size


def part_of_split(path: Path) -> tuple[str, int, int] | None:
    """Returns the stem, the number (from 1) and the count that a part of a split file has in its name, or None."""
    found = _PART.match(path.name)
    return None if found is None else (found["stem"], int(found["number"]), int(found["count"]))


def read_header(path: Path) -> Header:
    """What a file holds, or a split one of which `path` is any part. No more than headers is read.

    The metadata of a split file is that of its first part. Raises CheckpointError where a file can not be read, a part
    is missing, or a header is not sound: every tensor's bytes must lie in its file and overlap no others, and no key
    and no name may be there twice.
    """
    part = part_of_split(path)
    if part is None:
        header = _read_file(path)
        if header.metadata.get(SPLIT_COUNT, 1) not in (0, 1):
            raise CheckpointError(
                f"{path} is one of {header.metadata[SPLIT_COUNT]} parts, but is not named as one; give it its name"
                " back, such as model-00001-of-00002.gguf."
            )
        return header
    return _joined(path, *part)


def _joined(path: Path, stem: str, number: int, count: int) -> Header:
    if not 1 <= number <= count:
        raise CheckpointError(f"{path} is named part {number} of {count}; name the parts from 00001 on.")
    files = [path.with_name(f"{stem}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None:
        raise CheckpointError(f"{path.parent} lacks {missing.name}, one of {count} parts; copy it there.")
    metadata: dict[str, Value] = {}
    tensors: dict[str, StoredTensor] = {}
    for i, file in enumerate(files):
        header = _read_file(file)
        place = header.metadata.get(SPLIT_NUMBER, 0), header.metadata.get(SPLIT_COUNT, 1)
        if place != (i, count):
            raise CheckpointError(
                f"{file} is named part {i + 1} of {count}, but says that it is number {place[0]}, counted from 0, of"
                f" {place[1]}; copy the parts again."
            )
        metadata = metadata or header.metadata
        twice = next((name for name in header.tensors if name in tensors), None)
        if twice is not None:
            raise CheckpointError(f"{file} holds {twice}, as {tensors[twice].file.name} does; copy the parts again.")
        tensors |= header.tensors
    total = metadata.get(SPLIT_TENSORS, len(tensors))
    if total != len(tensors):
        raise CheckpointError(
            f"the {count} parts of {path} hold {len(tensors)} tensors, but say that they are {total}; copy them again."
        )
    return Header(tensors, metadata)


def _read_file(path: Path) -> Header:
    return sound_header(path, "GGUF", _parsed)


class _Cursor:
    """Reads a header from its beginning on, a chunk at a time."""

    def __init__(self, file: PieceFile) -> None:
        self.file = file
        self.place = 0
        self._chunk = b""
        self._begin = 0

    def take(self, count: int) -> bytes:
        """Returns the next bytes. Raises UnsoundError where the file, or what a header may be, ends before."""
        begin, end = self.place, self.place + count
        if end > self.file.size:
            raise UnsoundError(f"its header goes on beyond its end, byte {self.file.size}")
        if end > MAX_HEADER_BYTES:
            raise UnsoundError(f"its header has more than {MAX_HEADER_BYTES} bytes, which are never read")
        if end > self._begin + len(self._chunk):
            self._begin = begin
            self._chunk = self.file.read(min(max(count, CHUNK_BYTES), self.file.size - begin), begin)
        self.place = end
        return self._chunk[begin - self._begin : end - self._begin]

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self) -> str:
        content = self.take(self.number("Q"))
        try:
            return content.decode()
        except UnicodeDecodeError:  # a tokenizer's tokens may be parts of characters
            return content.decode(errors="surrogateescape")

    def require(self, count: int, nbytes: int) -> None:
        """Raises UnsoundError where the rest of the file can not hold `count` things of `nbytes` at least."""
        if count * nbytes > self.file.size - self.place:
            raise UnsoundError(f"it is to hold {count} things at byte {self.place}, but ends at {self.file.size}")


def _parsed(file: PieceFile) -> Header:
    cursor = _Cursor(file)
    if file.size < len(MAGIC) or cursor.take(4) != MAGIC:
        raise UnsoundError(f"it does not begin with {MAGIC.decode()}")
    version = cursor.number("I")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
        raise UnsoundError("it is big-endian" if swapped else f"it is of version {version}, but 2 or 3 was expected")
    tensors, pairs = cursor.number("Q"), cursor.number("Q")
    cursor.require(pairs, 8 + 4 + 1)
    metadata: dict[str, Value] = {}
    for _ in range(pairs):
        key = cursor.text()
        if key in metadata:
            raise UnsoundError(f"its metadata has {key!r} twice")
        metadata[key] = _value(cursor, key, cursor.number("I"))
    cursor.require(tensors, 8 + 4 + 4 + 8)
    infos: dict[str, tuple[str, tuple[int, ...], int]] = {}
    for _ in range(tensors):
        name = cursor.text()
        if name in infos:
            raise UnsoundError(f"it holds the tensor {name} twice")
        infos[name] = _tensor_info(cursor, name)
    return Header(_placed(infos, cursor, _alignment(metadata)), metadata)


def _value(cursor: _Cursor, key: str, kind: int, depth: int = 0) -> Value:
    if kind in NUMBERS:
        return cursor.number(NUMBERS[kind])
    if kind == BOOL:
        return _flags(cursor.take(1), key)[0]
    if kind == STRING:
        return cursor.text()
    if kind != ARRAY:
        raise UnsoundError(f"{key!r} of its metadata is of type {kind}, which the format does not have")
    if depth > 2:
        raise UnsoundError(f"{key!r} of its metadata has arrays inside of arrays")
    inner, count = cursor.number("I"), cursor.number("Q")
    if inner in NUMBERS:
        return _numbers(cursor, NUMBERS[inner], count)
    if inner == BOOL:
        cursor.require(count, 1)
        return _flags(cursor.take(count), key)
    cursor.require(count, 8)
    if count * 8 > MAX_HEADER_BYTES:
        raise UnsoundError(f"{key!r} of its metadata has {count} parts")
    read: Callable[[], Value] = cursor.text if inner == STRING else lambda: _value(cursor, key, inner, depth + 1)
    return [read() for _ in range(count)]


def _flags(content: bytes, key: str) -> list[bool]:
    if content.strip(b"\0\1"):
        raise UnsoundError(f"{key!r} of its metadata is no flag")
    return [byte == 1 for byte in content]


def _numbers(cursor: _Cursor, code: str, count: int) -> array.array[Any]:
    """Kept as they are: a list of them would take many times the memory."""
    size = struct.calcsize(f"<{code}")
    cursor.require(count, size)
    native = next(c for c in (code, code.lower(), *"bBhHiIlLqQfd") if _same_number(c, code))
    values = array.array(native, cursor.take(count * size))
    if sys.byteorder == "big":
        values.byteswap()
    return values


def _same_number(native: str, code: str) -> bool:
    """Whether an array's type holds a number's: its size, whether it is a fraction, and whether it has a sign."""
    size = struct.calcsize(f"<{code}")
    return (
        array.array(native).itemsize == size
        and (native in "fd") == (code in "fd")
        and (native.islower() == code.islower())
    )


def _tensor_info(cursor: _Cursor, name: str) -> tuple[str, tuple[int, ...], int]:
    """Returns the type, the shape, and where the bytes begin, counted from the end of the header."""
    dimensions = cursor.number("I")
    if dimensions > MAX_DIMENSIONS:
        raise UnsoundError(f"{name} has {dimensions} dimensions, but {MAX_DIMENSIONS} at most were expected")
    shape = tuple(reversed([cursor.number("Q") for _ in range(dimensions)]))
    if math.prod(max(size, 1) for size in shape) >= LARGEST:
        raise UnsoundError(f"{name} has the shape {list(shape)}")
    kind = cursor.number("I")
    if kind not in TYPES:
        raise UnsoundError(f"{name} is of type {kind}, which is not known")
    return TYPES[kind][0], shape, cursor.number("Q")


def _alignment(metadata: Mapping[str, Value]) -> int:
    alignment = metadata.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 0 < alignment < 2**31 or alignment & (alignment - 1):
        raise UnsoundError(f"{ALIGNMENT_KEY} is {alignment!r}, but a power of two was expected")
    return alignment


def _placed(
    infos: Mapping[str, tuple[str, tuple[int, ...], int]], cursor: _Cursor, alignment: int
) -> dict[str, StoredTensor]:
    """The tensors with their places in the file. Raises UnsoundError where they overlap, or lie beyond its end."""
    data, path = -(-cursor.place // alignment) * alignment, cursor.file.path
    tensors: dict[str, StoredTensor] = {}
    for name, (dtype, shape, offset) in infos.items():
        nbytes = nbytes_of(dtype, shape)
        if nbytes is None:
            raise UnsoundError(f"{name} of shape {list(shape)} has rows of no whole number of blocks of {dtype}")
        if offset % alignment:
            raise UnsoundError(f"{name} begins at byte {offset}, which is no multiple of {alignment}")
        if data + offset + nbytes > cursor.file.size:
            raise UnsoundError(f"{name} ends at byte {data + offset + nbytes}, but the file at {cursor.file.size}")
        tensors[name] = StoredTensor(path, name, dtype, shape, nbytes, data + offset)
    end_of_tensors(tensors, data, gaps=True)
    return tensors
