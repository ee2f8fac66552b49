"""A file read or written a piece at a time, in no more memory than the piece takes, however large the file is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Self

from gemma_mtp.errors import CheckpointError


class PieceFile:
    """A file opened for reading at any place. Plain reads, never a map of the file: a map of a file that is larger than
    memory is refused by the system, and a file that is cut off while it is mapped ends the process."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError where the file can not be opened."""
        self.path = path
        try:
            self._file = path.open("rb", buffering=0)
            self.size = path.stat().st_size
        except OSError as error:
            raise CheckpointError(f"{path} can not be read: {error}.") from None

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a writable buffer of bytes with those from `offset` on. Raises CheckpointError where they are not
        there."""
        done = 0
        try:
            self._file.seek(offset)
            while done < len(buffer):  # one read gives 2 GB at most
                count = self._file.readinto(buffer[done:])
                if not count:
                    raise CheckpointError(
                        f"{self.path} ends at byte {offset + done}, but {len(buffer)} bytes from {offset} on were"
                        " expected; it is truncated or damaged: copy it again."
                    )
                done += count
        except OSError as error:
            raise CheckpointError(f"{self.path} can not be read: {error}.") from None

    def read(self, count: int, offset: int) -> bytes:
        """Returns so many bytes from `offset` on. Raises CheckpointError where they are not there."""
        content = bytearray(count)
        self.read_into(memoryview(content), offset)
        return bytes(content)

    def close(self) -> None:
        self._file.close()


class PieceWriter:
    """Writes tensors into a file that has room for them all, in pieces and in any order."""

    def __init__(self, path: Path, places: Mapping[str, tuple[int, int]]) -> None:
        """`places`: where each tensor begins in the file, and how many bytes it has."""
        self._places = places
        self._missing = {name: nbytes for name, (_, nbytes) in places.items()}
        self._file = path.open("r+b", buffering=0)

    def write(self, name: str, values: memoryview, first_byte: int = 0) -> None:
        """Write some of a tensor's bytes, from `first_byte` of it on. Each is to be written once."""
        offset, nbytes = self._places[name]
        self._missing[name] -= len(values)
        assert self._missing[name] >= 0 and first_byte + len(values) <= nbytes
        self._file.seek(offset + first_byte)
        while values:
            values = values[self._file.write(values) :]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._file.close()
        assert error is not None or not any(self._missing.values()), "tensors are not written whole"
