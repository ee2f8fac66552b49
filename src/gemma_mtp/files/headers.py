"""What the header of a file of tensors says, whatever its format is, and how a header is read and held to be sound."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_mtp.errors import CheckpointError
from gemma_mtp.files.pieces import PieceFile


@dataclass(frozen=True)
class StoredTensor:
    """How one tensor is stored: the file it is in, its name there, dtype, shape, bytes, and where they begin."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int

    @property
    def piece_bytes(self) -> int:
        """Bytes of all of it as it is read."""
        return self.nbytes


@dataclass(frozen=True)
class Header:
    """The tensors of a file by name, in the file's order, and its metadata by key."""

    tensors: dict[str, StoredTensor]
    metadata: dict[str, Any]


class UnsoundError(ValueError):
    """Why a header is not sound."""


def sound_header(path: Path, kind: str, parse: Callable[[PieceFile], Header]) -> Header:
    """Returns what `parse` reads, which raises UnsoundError where the file is no sound one of its kind.

    Raises CheckpointError for that, and where the file can not be read.
    """
    with closing(PieceFile(path)) as file:
        try:
            return parse(file)
        except UnsoundError as reason:
            raise CheckpointError(
                f"{path} can not be read as {kind} ({reason}); it is truncated or damaged: copy it again."
            ) from None


def end_of_tensors(tensors: Mapping[str, StoredTensor], begin: int, gaps: bool) -> int:
    """Returns where the last tensor ends, of those that lie behind byte `begin`.

    Raises UnsoundError where two overlap, and where bytes lie between two unless the format may have such `gaps`.
    """
    end, before = begin, "the header"
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset < end:
            raise UnsoundError(f"{name} overlaps {before}")
        if tensor.offset > end and not gaps:
            raise UnsoundError(f"{name} leaves a gap after {before}")
        end, before = tensor.offset + tensor.nbytes, name
    return end
