"""LoRA adapters of PEFT, merged into a checkpoint's weights as they are read: nothing is written.

A matrix W [out, in] becomes W + s B A, with A [rank, in] and B [out, rank] of the adapter; with DoRA each row is then
brought to a stored length. All of it in float32, row by row, before the result is rounded to what the model is kept in:
so no more is in memory than a piece of rows and the adapter's matrices of one module.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from gemma_mtp.checkpoint.adapter_config import FILE, AdapterConfig, parse_adapter_config
from gemma_mtp.checkpoint.derived import DerivedTensor, Part, activations_of, alias, derived, read_derived
from gemma_mtp.checkpoint.names import EMBEDDING, HEAD, MODEL, OUTSIDE_TEXT, PEFT
from gemma_mtp.checkpoint.pieces import read_pieces
from gemma_mtp.checkpoint.source import FLOAT_DTYPES, Piece, Source
from gemma_mtp.checkpoint.wrapped import WrappedSource
from gemma_mtp.errors import CheckpointError
from gemma_mtp.files.headers import StoredTensor
from gemma_mtp.files.safetensors import read_header
from gemma_mtp.json_files import existing, read_json

WEIGHTS, PICKLED = "adapter_model.safetensors", "adapter_model.bin"
#: what an adapter's tensor is to its module, by the end of its name; the longest that fits
ROLES = {
    ".lora_A.weight": "A", ".lora_B.weight": "B", ".lora_embedding_A": "table A", ".lora_embedding_B": "table B",
    ".lora_magnitude_vector": "lengths", ".lora_magnitude_vector.weight": "lengths", ".base_layer.weight": "saved",
    ".weight": "saved",
}  # fmt: skip
#: the roles that a module's tensors may have together, but for a saved weight that they adapt
KINDS = ({"A", "B"}, {"A", "B", "lengths"}, {"table A", "table B"}, set[str]())
#: of a tensor; patterns are matched with it
LONGEST_NAME = 1000
#: the part of a name that says which tensor of the text model it is
_TEXT = re.compile(
    r"(?:^|\.)(layers\.\d+\..+|(?:norm|lm_head|embed_tokens\w*|per_layer_model_projection\w*)(?:\..+)?)$"
)


@dataclass
class Module:
    """One module of the adapter: its name there, and its tensors by their roles."""

    name: str
    roles: dict[str, StoredTensor] = field(default_factory=dict)


class Adapter:
    """An adapter's directory, opened: no weights are read."""

    def __init__(self, directory: str | Path) -> None:
        """Raises CheckpointError where it is missing, damaged, or holds what can not be merged exactly."""
        self.path = existing(directory)
        if not (self.path / FILE).is_file():
            raise CheckpointError(f"{self.path} has no {FILE}; give the directory of a PEFT adapter.")
        self.config: AdapterConfig = parse_adapter_config(read_json(self.path / FILE))
        self.file = self.path / WEIGHTS
        if not self.file.is_file():
            pickled = f" ({PICKLED} is pickled, and is never loaded)" if (self.path / PICKLED).exists() else ""
            raise CheckpointError(f"{self.path} has no {WEIGHTS}{pickled}; save the adapter as safetensors.")
        stored = read_header(self.file).tensors
        self.outside = sorted(name for name in stored if OUTSIDE_TEXT & set(name.split(".")))
        self.modules = _modules(self.file, [stored[name] for name in stored if name not in set(self.outside)])
        self.scales = self.config.of_modules({module.name for module in self.modules.values()})

    @property
    def files(self) -> tuple[Path, ...]:
        """Everything that the merged weights depend on."""
        return self.path / FILE, self.file

    def notes(self) -> list[str]:
        if not self.outside:
            return list(self.config.notes)
        return [
            *self.config.notes,
            f"the adapter has {len(self.outside)} tensors of vision or audio towers, such as {self.outside[0]}; text"
            " decoding does not use them.",
        ]


class AdaptedSource(WrappedSource):
    """A checkpoint of a target with an adapter merged into it."""

    def __init__(self, inner: Source, adapter: Adapter) -> None:
        super().__init__(inner)
        self.adapter = adapter

    @functools.cached_property
    def _adapted(self) -> dict[str, StoredTensor]:
        """What the adapter changes, by stored name. Raises CheckpointError where it does not fit the checkpoint."""
        modules, stored = self.adapter.modules, self.inner.tensors()
        places = self.inner.places([name for name in modules if name != HEAD], (EMBEDDING, HEAD))
        tied = _ties(self.inner.config()) and HEAD not in places
        made: dict[str, StoredTensor] = {}
        for official, module in modules.items():
            place = places.get(official) or (places.get(EMBEDDING) if official == HEAD and tied else None)
            if place is None:
                raise CheckpointError(
                    f"{self.adapter.path} adapts {module.name}, which {self.path} does not have; give the adapter of"
                    " this checkpoint."
                )
            name = HEAD if official == HEAD and tied else place
            made[name] = _merged(name, stored[place], module, self.adapter)
        if tied and places.get(EMBEDDING) in made and HEAD not in made:  # the head stays what it was trained beside
            made[HEAD] = alias(HEAD, stored[places[EMBEDDING]])
        return made

    def tensors(self) -> Mapping[str, StoredTensor]:
        return self._tensors

    @functools.cached_property
    def _tensors(self) -> dict[str, StoredTensor]:
        return {**self.inner.tensors(), **self._adapted}

    def places(self, needed: Collection[str], optional: Collection[str] = ()) -> dict[str, str]:
        found = self.inner.places(needed, optional)
        if HEAD not in found and HEAD in self._adapted and (HEAD in needed or HEAD in optional):
            found[HEAD] = HEAD
        return found

    def read(self, pieces: Iterable[Piece]) -> Iterator[Tensor]:
        return read_derived(pieces, self._read_stored)

    def _read_stored(self, pieces: Iterable[Piece]) -> Iterator[Tensor]:
        for tensor, rows in pieces:
            read = read_pieces if tensor.file == self.adapter.file else self.inner.read
            yield from read([(tensor, rows)])

    def notes(self) -> list[str]:
        return [*self.inner.notes(), *self.adapter.notes()]

    def summary(self) -> list[str]:
        saved = sum(not module.roles.keys() - {"saved"} for module in self.adapter.modules.values())
        kept = f", {saved} tensors replaced" if saved else ""
        kind = "DoRA" if self.adapter.config.dora else "LoRA"
        count = len(self.adapter.modules) - saved
        return [*self.inner.summary(), f"{kind} adapter {self.adapter.path.name}: {count} matrices merged{kept}"]


def _ties(config: object) -> bool:
    """Whether config.json ties the head to the embedding, as far as it says so; Gemma does without saying."""
    found: object = config.get("tie_word_embeddings") if isinstance(config, dict) else None
    return found is not False


def _modules(file: Path, stored: Sequence[StoredTensor]) -> dict[str, Module]:
    """An adapter's modules by the official name of the weight that each changes."""
    modules: dict[str, Module] = {}
    for tensor in stored:
        if len(tensor.name) > LONGEST_NAME:
            raise CheckpointError(
                f"{file} has a tensor whose name is {len(tensor.name)} characters long; it is damaged."
            )
        end = max((end for end in ROLES if tensor.name.endswith(end)), key=len, default=None)
        name = tensor.name.removesuffix(end or "").removeprefix(PEFT)
        found = _TEXT.search(name)
        if end is None or found is None or ".base_layer" in name or ".token_adapter" in name:
            raise CheckpointError(
                f"{file} has the tensor {tensor.name}, which is not known how to merge; merge the adapter with PEFT"
                " (merge_and_unload) and give the merged checkpoint."
            )
        if tensor.dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{file} stores {tensor.name} as {tensor.dtype}, but {' or '.join(FLOAT_DTYPES)} was expected."
            )
        key = f"{found[1]}.weight"
        module = modules.setdefault(key if key == HEAD else MODEL + key, Module(name))
        if ROLES[end] in module.roles or module.name != name:
            raise CheckpointError(f"{file} has two tensors for one of {module.name}: {tensor.name} is the second.")
        module.roles[ROLES[end]] = tensor
    if not modules:
        raise CheckpointError(f"{file} adapts nothing of a text model; give another adapter.")
    return modules


def _merged(name: str, base: StoredTensor, module: Module, adapter: Adapter) -> DerivedTensor:
    """The weight of a module with the adapter merged in. Raises CheckpointError where shapes do not fit."""
    if base.dtype not in FLOAT_DTYPES:
        raise CheckpointError(
            f"the checkpoint stores {base.name} as {base.dtype}, into which an adapter can not be merged; give the"
            " checkpoint before it was quantised, and --quantize."
        )
    if any(activations_of(base)):
        raise CheckpointError(
            f"the checkpoint rounds the activations of {base.name} by static scales, which do not hold for merged"
            " weights; give the unquantised checkpoint that the adapter was trained on."
        )
    roles, file, config = dict(module.roles), adapter.file, adapter.config
    saved = roles.pop("saved", base)
    _check_shape(file, saved, base.shape)
    if roles.keys() not in KINDS or (roles.keys() == {"A", "B"} and config.dora):
        raise CheckpointError(
            f"{file} has {', '.join(tensor.name for tensor in roles.values())}, but the two matrices of"
            f" {module.name}{', and its lengths (use_dora),' if config.dora else ''} were expected; it is damaged, or"
            " can not be merged exactly: merge it with PEFT (merge_and_unload)."
        )
    if not roles:
        return alias(name, saved)
    if len(base.shape) != 2:
        raise CheckpointError(f"{file} adapts {module.name}, which is no matrix and can not be merged.")
    out, columns = base.shape
    scale, rank = adapter.scales.scales[module.name], adapter.scales.ranks[module.name]
    if "table A" in roles:
        _check_shape(file, roles["table A"], (rank, out))
        _check_shape(file, roles["table B"], (columns, rank))
        parts = [Part(saved), Part(roles["table A"], 0), Part(roles["table B"], 0)]
        return derived(name, base.shape, base.dtype, parts, functools.partial(_table_rows, scale))
    _check_shape(file, roles["A"], (rank, columns))
    _check_shape(file, roles["B"], (out, rank))
    parts = [Part(saved), Part(roles["A"], 0), Part(roles["B"])]
    if "lengths" in roles:
        _check_shape(file, roles["lengths"], (out,))
        parts.append(Part(roles["lengths"]))
    return derived(name, base.shape, base.dtype, parts, functools.partial(_matrix_rows, scale))


def _matrix_rows(scale: float, parts: Sequence[Tensor], rows: range) -> Tensor:
    weight, a, b, *lengths = (part.float() for part in parts)
    merged = weight + (b @ a) * scale
    return merged * (lengths[0] / torch.linalg.norm(merged, dim=1))[:, None] if lengths else merged


def _table_rows(scale: float, parts: Sequence[Tensor], rows: range) -> Tensor:
    weight, a, b = (part.float() for part in parts)
    return weight + (a[:, rows.start : rows.stop].T @ b.T) * scale


def _check_shape(file: Path, tensor: StoredTensor, expected: tuple[int, ...]) -> None:
    if tensor.shape != expected:
        raise CheckpointError(
            f"{file} has {tensor.name} of shape {list(tensor.shape)}, but {list(expected)} was expected: the adapter is"
            " of another checkpoint, or its adapter_config.json does not belong to it."
        )
