"""What a checkpoint is to everything that reads one, whatever format it is stored in."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from gemma_mtp.files.headers import StoredTensor
from gemma_mtp.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

#: names of the dtypes we load, which are safetensors', and their size in bytes
FLOAT_DTYPES = {"F32": 4, "BF16": 2, "F16": 2, "F64": 8}
INTEGER_DTYPES = {"I64": 8, "I32": 4}


#: a tensor, or a range of its rows
Piece = tuple[StoredTensor, slice | None]
#: is told, after every piece of a model's tensors, how many bytes of them are done as they are stored, and of how many
OnBytes = Callable[[int, int], object]


class Source(Protocol):
    """An opened checkpoint of a target or a drafter. Nothing is written to it, and opening it reads no weights.

    Every method raises CheckpointError naming the file that is missing or damaged.
    """

    @property
    def path(self) -> Path:
        """Where it lies, for messages."""
        ...

    def config(self) -> Any:
        """Returns the content of config.json in Hugging Face's form, not checked yet."""
        ...

    def generation_config(self) -> Any:
        """Returns the content of generation_config.json, not checked yet; {} where there is none."""
        ...

    @property
    def has_tokenizer(self) -> bool: ...

    def tokenizer(self) -> Tokenizer:
        """Returns the tokenizer with its chat templates. Raises TokenizerError where it is missing or malformed."""
        ...

    def tensors(self) -> Mapping[str, StoredTensor]:
        """Returns how every tensor is stored, by its stored name."""
        ...

    def places(self, needed: Collection[str], optional: Collection[str] = ()) -> dict[str, str]:
        """Returns the stored name of each official name that is there.

        Official names are those of a text-only checkpoint of the family: `model.layers.0…`, `lm_head.weight`.
        """
        ...

    def read(self, pieces: Iterable[Piece]) -> Iterator[Tensor]:
        """Yields the values of each piece as they are stored, on the CPU, in order; of a type of blocks its bytes,
        uint8 [..., bytes of a row].

        No more is in memory than the pieces that the caller still holds (`pieces.read_pieces`).
        """
        ...

    def summary(self) -> list[str]:
        """Returns a sentence on each thing that is read in another way than it is stored, and on what that loses."""
        ...

    def notes(self) -> list[str]:
        """Returns a sentence on each thing about its files that is not as it should be, though it can be loaded."""
        ...

    def copy_companions(self, directory: Path) -> None:
        """Write what belongs to a copy beside weights and config.json: tokenizer, templates, generation config."""
        ...


#: where a checkpoint lies, or the checkpoint itself as it was opened
Location = str | Path | Source
