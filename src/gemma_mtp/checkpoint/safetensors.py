"""Tensors in safetensors files: what the headers say, and their values, copied or compared a piece at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from gemma_mtp.errors import CheckpointError
from gemma_mtp.json_files import existing, read_json
from gemma_mtp.ops.quantise import Weight

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILE = "adapter_config.json"
#: a file is opened anew after so many bytes, so that the pages mapped for tensors already copied are given back
MAPPED_BYTES = 32 << 20
#: safetensors' names of the dtypes we load, and their size in bytes
FLOAT_DTYPES = {"F32": 4, "BF16": 2, "F16": 2, "F64": 8}
INTEGER_DTYPES = {"I64": 8, "I32": 4}
#: safetensors' names of what quantised matrices are stored as
QUANTISED_DTYPES = {torch.int8: "I8", torch.uint8: "U8"}


@dataclass(frozen=True)
class TensorHeader:
    """What a safetensors header says of one tensor: the file it is in, its name there, dtype and shape."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return int(torch.Size(self.shape).numel())

    @property
    def nbytes(self) -> int:
        return self.numel * {**FLOAT_DTYPES, **INTEGER_DTYPES}.get(self.dtype, 1)


def read_headers(directory: str | Path) -> dict[str, TensorHeader]:
    """Dtypes and shapes of every tensor by its stored name, from the files' headers alone.

    Raises CheckpointError where there are no safetensors files, or a shard is missing or truncated.
    """
    headers: dict[str, TensorHeader] = {}
    for file in _weight_files(existing(directory)):
        headers |= _file_headers(file)
    return headers


def _file_headers(file: Path) -> dict[str, TensorHeader]:
    """Every tensor of a file by its name. Raises CheckpointError where it is truncated or damaged."""
    try:
        with safe_open(file, "pt") as tensors:
            entries = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 (no mapping)
            return {
                name: TensorHeader(file, name, entry.get_dtype(), tuple(entry.get_shape()))
                for name, entry in entries.items()
            }
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} can not be read as safetensors ({error}); it is truncated or damaged: copy it again."
        ) from None


def file_notes(directory: Path) -> list[str]:
    """A sentence where it is not plain which files are loaded."""
    if (directory / SINGLE_FILE).is_file() and (directory / INDEX_FILE).is_file():
        return [f"both {SINGLE_FILE} and {INDEX_FILE} are there; the single file is loaded: remove the other's shards."]
    return []


def allowed_dtypes(dtype: torch.dtype) -> Iterable[str]:
    """safetensors' names of what may be stored for a tensor of `dtype`."""
    if dtype in QUANTISED_DTYPES:
        return [QUANTISED_DTYPES[dtype]]
    return FLOAT_DTYPES if dtype.is_floating_point else INTEGER_DTYPES


def copy_tensors(views: Mapping[str, Weight], headers: Mapping[str, TensorHeader]) -> None:
    """Copy every stored tensor into the view of the same name, converted to its dtype, file by file."""
    for file in sorted({headers[name].file for name in views}):
        names = [name for name in views if headers[name].file == file]
        for batch in _batches(names, headers):
            with safe_open(file, "pt") as tensors:
                for name, rows in batch:
                    stored = tensors.get_slice(headers[name].name)
                    if rows is None:
                        views[name].copy_(stored[...])
                    else:
                        views[name][rows].copy_(stored[rows])


def same_values(one: TensorHeader, other: TensorHeader) -> bool:
    """Whether two stored tensors are equal, number by number, whatever they are stored as."""
    if one.shape != other.shape:
        return False
    wider = max(one, other, key=lambda header: header.nbytes)
    for rows, _ in _pieces(wider):
        with safe_open(one.file, "pt") as first, safe_open(other.file, "pt") as second:
            a, b = (
                tensors.get_slice(header.name)[... if rows is None else rows]
                for tensors, header in ((first, one), (second, other))
            )
            if not torch.equal(a, b) if a.dtype == b.dtype else not torch.equal(a.double(), b.double()):
                return False
    return True


def _batches(names: Iterable[str], headers: Mapping[str, TensorHeader]) -> Iterable[list[tuple[str, slice | None]]]:
    """Tensors, and row ranges of tensors that are larger, in groups of at most `MAPPED_BYTES`."""
    batch: list[tuple[str, slice | None]] = []
    size = 0
    for name in names:
        for rows, nbytes in _pieces(headers[name]):
            if size + nbytes > MAPPED_BYTES and batch:
                yield batch
                batch, size = [], 0
            batch.append((name, rows))
            size += nbytes
    yield batch


def _pieces(header: TensorHeader) -> Iterable[tuple[slice | None, int]]:
    """The whole tensor, or ranges of its rows that fit into `MAPPED_BYTES`, with their bytes."""
    if header.nbytes <= MAPPED_BYTES or not header.shape:
        return [(None, header.nbytes)]
    count, row_bytes = header.shape[0], header.nbytes // header.shape[0]
    step = max(1, MAPPED_BYTES // row_bytes)
    starts = range(0, count, step)
    return [(slice(i, min(i + step, count)), (min(i + step, count) - i) * row_bytes) for i in starts]


def _weight_files(directory: Path) -> list[Path]:
    """The single file if there is one, as in transformers, else the shards that the index names."""
    if (directory / ADAPTER_FILE).is_file():  # transformers would add the adapter to the weights beside it
        raise CheckpointError(
            f"{directory} has an {ADAPTER_FILE}: an adapter, which can not be applied; merge it into the weights"
            " (merge_and_unload), and remove the file."
        )
    if (directory / SINGLE_FILE).is_file():
        return [directory / SINGLE_FILE]
    index = directory / INDEX_FILE
    if index.exists():
        raw = read_json(index)
        names = raw.get("weight_map") if isinstance(raw, dict) else None
        if not isinstance(names, dict) or not names:
            raise CheckpointError(f"{index} has no 'weight_map' object; restore it from the source.")
        files = [directory / name for name in sorted(set(map(str, names.values())))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise CheckpointError(f"{directory} lacks the shard {missing[0]} named in {INDEX_FILE}; copy it there.")
        return files
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in directory.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{directory} holds pickled weights only ({pickles[0]}), which are never loaded because unpickling can run"
            " code; convert them to safetensors."
        )
    raise CheckpointError(f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}; copy the weights there.")
