"""Checkpoint directories in the official Hugging Face layout, their weights in safetensors files."""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from gemma_mtp.checkpoint.names import find_tensors
from gemma_mtp.checkpoint.source import FLOAT_DTYPES, INTEGER_DTYPES, Piece, StoredTensor
from gemma_mtp.config.generation import FILE as GENERATION_FILE
from gemma_mtp.errors import CheckpointError
from gemma_mtp.json_files import existing, read_json
from gemma_mtp.tokenizer import Tokenizer

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILE = "adapter_config.json"
#: a file is opened anew after so many bytes, so that the pages mapped for tensors already copied are given back
MAPPED_BYTES = 32 << 20
#: files that a copy takes along, where the checkpoint has them
KEPT_FILES = (
    GENERATION_FILE, "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
#: files that a copy takes along from a directory of templates
KEPT_TEMPLATES = "additional_chat_templates/*.jinja"


class SafetensorsSource:
    """A directory in the Hugging Face layout; its methods are those of `Source`."""

    def __init__(self, directory: Path) -> None:
        """Raises CheckpointError where there is no such directory."""
        self._directory = existing(directory)

    @property
    def path(self) -> Path:
        return self._directory

    def config(self) -> Any:
        return read_json(self.path / "config.json")

    def generation_config(self) -> Any:
        file = self.path / GENERATION_FILE
        return read_json(file) if file.exists() else {}

    @property
    def has_tokenizer(self) -> bool:
        return (self.path / "tokenizer.json").exists()

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_dir(self.path)

    def tensors(self) -> dict[str, StoredTensor]:
        """Returns what the files' headers say; a missing, truncated or damaged file raises CheckpointError."""
        return self._tensors

    @functools.cached_property
    def _tensors(self) -> dict[str, StoredTensor]:
        headers: dict[str, StoredTensor] = {}
        for file in _weight_files(self.path):
            headers |= _file_headers(file)
        return headers

    def places(self, needed: Collection[str], optional: Collection[str] = ()) -> dict[str, str]:
        return find_tensors(self.tensors(), needed, optional)

    def read(self, pieces: Iterable[Piece]) -> Iterator[Tensor]:
        for batch in _batches(pieces):
            with safe_open(batch[0][0].file, "pt") as tensors:
                for tensor, rows in batch:
                    yield tensors.get_slice(tensor.name)[... if rows is None else rows]

    def notes(self) -> list[str]:
        """Returns a sentence where it is not plain which files are loaded."""
        if not ((self.path / SINGLE_FILE).is_file() and (self.path / INDEX_FILE).is_file()):
            return []
        return [f"both {SINGLE_FILE} and {INDEX_FILE} are there; the single file is loaded: remove the other's shards."]

    def copy_companions(self, directory: Path) -> None:
        for path in (*(self.path / name for name in KEPT_FILES), *self.path.glob(KEPT_TEMPLATES)):
            if path.is_file():
                kept = directory / path.relative_to(self.path)
                kept.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, kept)


def _file_headers(file: Path) -> dict[str, StoredTensor]:
    """Every tensor of a file by its name. Raises CheckpointError where it is truncated or damaged."""
    try:
        with safe_open(file, "pt") as tensors:
            entries = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 (no mapping)
            return {name: _stored(file, name, entry.get_dtype(), entry.get_shape()) for name, entry in entries.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} can not be read as safetensors ({error}); it is truncated or damaged: copy it again."
        ) from None


def _stored(file: Path, name: str, dtype: str, shape: Iterable[int]) -> StoredTensor:
    sizes = tuple(shape)
    return StoredTensor(file, name, dtype, sizes, math.prod(sizes) * {**FLOAT_DTYPES, **INTEGER_DTYPES}.get(dtype, 1))


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces that follow each other, of one file and of at most `MAPPED_BYTES` together; a larger one is alone."""
    batch: list[Piece] = []
    size = 0
    for tensor, rows in pieces:
        nbytes = _piece_bytes(tensor, rows)
        if batch and (size + nbytes > MAPPED_BYTES or tensor.file != batch[0][0].file):
            yield batch
            batch, size = [], 0
        batch.append((tensor, rows))
        size += nbytes
    if batch:
        yield batch


def _piece_bytes(tensor: StoredTensor, rows: slice | None) -> int:
    if rows is None:
        return tensor.nbytes
    return len(range(*rows.indices(tensor.shape[0]))) * tensor.nbytes // tensor.shape[0]


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
