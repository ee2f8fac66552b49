"""Checkpoint directories in the official Hugging Face layout, their weights in safetensors files."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from gemma_mtp.checkpoint.names import find_tensors
from gemma_mtp.checkpoint.pieces import read_pieces
from gemma_mtp.checkpoint.source import Piece
from gemma_mtp.config.generation import FILE as GENERATION_FILE
from gemma_mtp.errors import CheckpointError
from gemma_mtp.files.headers import StoredTensor
from gemma_mtp.files.safetensors import read_header
from gemma_mtp.json_files import existing, read_json
from gemma_mtp.tokenizer import Tokenizer

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILE = "adapter_config.json"
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
            for name, tensor in read_header(file).tensors.items():
                if name in headers:
                    raise CheckpointError(
                        f"{self.path} holds {name} twice, in {headers[name].file.name} and in {file.name}; copy the"
                        " checkpoint again."
                    )
                headers[name] = tensor
        return headers

    def places(self, needed: Collection[str], optional: Collection[str] = ()) -> dict[str, str]:
        return find_tensors(self.tensors(), needed, optional)

    def read(self, pieces: Iterable[Piece]) -> Iterator[Tensor]:
        return read_pieces(pieces)

    def summary(self) -> list[str]:
        return []

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


def _is_file_name(name: object) -> bool:
    """Whether it is one that a file in the same directory can have."""
    return isinstance(name, str) and name.isprintable() and Path(name).name == name and len(name.encode()) < 256


def _weight_files(directory: Path) -> list[Path]:
    """The single file if there is one, as in transformers, else the shards that the index names."""
    if (directory / ADAPTER_FILE).is_file():  # transformers would add the adapter to the weights beside it
        raise CheckpointError(
            f"{directory} has an {ADAPTER_FILE} beside the weights, which would have to be applied or not; move it to"
            " a directory of its own, and give that as --adapter."
        )
    if (directory / SINGLE_FILE).is_file():
        return [directory / SINGLE_FILE]
    index = directory / INDEX_FILE
    if index.exists():
        raw = read_json(index)
        names = raw.get("weight_map") if isinstance(raw, dict) else None
        if not isinstance(names, dict) or not names:
            raise CheckpointError(f"{index} has no 'weight_map' object; restore it from the source.")
        odd = [name for name in names.values() if not _is_file_name(name)]
        if odd:
            raise CheckpointError(f"{index} names the shard {str(odd[0])[:80]!r}, but a file beside it was expected.")
        files = [directory / name for name in sorted(set(names.values()))]
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
