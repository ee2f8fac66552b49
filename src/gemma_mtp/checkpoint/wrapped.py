"""A checkpoint seen through another: what only tensors differ in is the other's."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from gemma_mtp.checkpoint.derived import read_derived
from gemma_mtp.checkpoint.source import Piece, Source
from gemma_mtp.files.headers import StoredTensor
from gemma_mtp.tokenizer import Tokenizer


class WrappedSource:
    """Everything as `inner` has it; its methods are those of `Source`. Values may be derived from stored ones."""

    def __init__(self, inner: Source) -> None:
        self.inner = inner

    @property
    def path(self) -> Path:
        return self.inner.path

    def config(self) -> Any:
        return self.inner.config()

    def generation_config(self) -> Any:
        return self.inner.generation_config()

    @property
    def has_tokenizer(self) -> bool:
        return self.inner.has_tokenizer

    def tokenizer(self) -> Tokenizer:
        return self.inner.tokenizer()

    def tensors(self) -> Mapping[str, StoredTensor]:
        return self.inner.tensors()

    def places(self, needed: Collection[str], optional: Collection[str] = ()) -> dict[str, str]:
        return self.inner.places(needed, optional)

    def read(self, pieces: Iterable[Piece]) -> Iterator[Tensor]:
        return read_derived(pieces, self.inner.read)

    def notes(self) -> list[str]:
        return self.inner.notes()

    def summary(self) -> list[str]:
        return self.inner.summary()

    def copy_companions(self, directory: Path) -> None:
        self.inner.copy_companions(directory)
