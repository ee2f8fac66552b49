"""Experts that a checkpoint stores one by one, seen as the model has them: in one tensor of all experts.

llm-compressor, ModelOpt and what packs for vLLM take Gemma 4's experts apart, as their quantisers know linear layers
alone (llm-compressor's modeling/gemma4.py): `layers.0.experts.3.gate_proj.weight`, or `layers.0.moe.experts.3…`.
"""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gemma_mtp.checkpoint.derived import DerivedTensor, Part, derived
from gemma_mtp.checkpoint.names import find_tensors
from gemma_mtp.checkpoint.source import FLOAT_DTYPES, Piece
from gemma_mtp.checkpoint.wrapped import WrappedSource
from gemma_mtp.errors import CheckpointError
from gemma_mtp.files.headers import StoredTensor

#: what the model has of all experts of a layer, and what tools have of each: gates before the rest of the same product
PRODUCTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
SEPARATE = re.compile(
    r"(?P<layer>.*\blayers\.\d+\.)(?:moe\.)?experts\.(?P<expert>[0-9]{1,6})\.(?P<part>(gate|up|down)_proj)\.weight"
)


def has_experts(config: Any) -> bool:
    """Whether config.json's content, not checked yet, is of a model of experts."""
    text = config.get("text_config", config) if isinstance(config, dict) else None
    return isinstance(text, dict) and bool(text.get("num_experts"))


def separate_modules(module: str, expert: int) -> list[str]:
    """Returns what the matrices of one expert are called, of those that `module` (`….experts.gate_up_proj`) has of
    all, in the order of its rows."""
    experts, _, product = module.rpartition(".")
    return [f"{experts}.{expert}.{part}" for part in PRODUCTS[product]]


class ExpertsSource(WrappedSource):
    """Experts that are stored one by one are put together as they are read."""

    @functools.cached_property
    def _joined(self) -> tuple[dict[str, StoredTensor], set[str]]:
        """What is put together, and the names of what it is made of. Raises CheckpointError where a part is missing."""
        return joined_experts(self.inner.tensors(), str(self.path))

    @functools.cached_property
    def _tensors(self) -> Mapping[str, StoredTensor]:
        made, parts = self._joined
        stored = self.inner.tensors()
        for name in made:
            if name in stored:
                raise CheckpointError(
                    f"{self.path} holds {name} twice, whole and one by one; copy the checkpoint again."
                )
        return {**{name: tensor for name, tensor in stored.items() if name not in parts}, **made}

    def tensors(self) -> Mapping[str, StoredTensor]:
        return self._tensors

    def places(self, needed: Collection[str], optional: Collection[str] = ()) -> dict[str, str]:
        return find_tensors(self.tensors(), needed, optional)

    def read(self, pieces: Iterable[Piece]) -> Iterator[Tensor]:
        return super().read(pieces) if self._joined[0] else self.inner.read(pieces)

    def summary(self) -> list[str]:
        one_by_one = "experts are stored one by one, and put together as they are read"
        return [*self.inner.summary(), *([one_by_one] if self._joined[0] else [])]


def joined_experts(stored: Mapping[str, StoredTensor], where: str) -> tuple[dict[str, StoredTensor], set[str]]:
    """Returns tensors of all experts of a layer, by the names that the model has for them, and the names of what they
    are made of.

    Raises CheckpointError where `where` lacks one of them, or has two of different shapes.
    """
    layers: dict[str, dict[tuple[int, str], StoredTensor]] = defaultdict(dict)
    for name, tensor in stored.items():
        match = SEPARATE.fullmatch(name)
        if match is None:
            continue
        found, place = layers[match["layer"]], (int(match["expert"]), match["part"])
        if place in found:
            raise CheckpointError(
                f"{where} holds {found[place].name} twice, also as {name}; copy the checkpoint again."
            )
        found[place] = tensor
    made: dict[str, StoredTensor] = {}
    for layer, found in layers.items():
        count = 1 + max(expert for expert, _ in found)
        for product, parts in PRODUCTS.items():
            name = f"{layer}experts.{product}"
            rows = [[_part(found, expert, part, layer, where) for part in parts] for expert in range(count)]
            made[name] = _joined(name, rows, where)
    return made, {tensor.name for found in layers.values() for tensor in found.values()}


def _part(
    found: Mapping[tuple[int, str], StoredTensor], expert: int, part: str, layer: str, where: str
) -> StoredTensor:
    tensor = found.get((expert, part))
    if tensor is None:
        raise CheckpointError(
            f"{where} stores the experts of {layer.rstrip('.')} one by one, but lacks {part} of expert {expert}; copy"
            " the checkpoint again."
        )
    return tensor


def _joined(name: str, rows: Sequence[Sequence[StoredTensor]], where: str) -> DerivedTensor:
    """One tensor [experts, rows of all parts, columns]."""
    first = rows[0][0]
    for tensor in (tensor for row in rows for tensor in row):
        if tensor.shape != first.shape or len(first.shape) != 2:
            raise CheckpointError(
                f"{where} has {tensor.name} of shape {list(tensor.shape)} and {first.name} of {list(first.shape)}, but"
                " two matrices alike were expected; copy the checkpoint again."
            )
    parts = [Part(tensor, only=expert) for expert, row in enumerate(rows) for tensor in row]
    shape = (len(rows), len(rows[0]) * first.shape[0], first.shape[1])
    dtypes = {part.tensor.dtype for part in parts}
    dtype = first.dtype if len(dtypes) == 1 or not dtypes <= FLOAT_DTYPES.keys() else "F32"
    stack = functools.partial(_stacked, len(rows[0]))
    return replace(derived(name, shape, dtype, parts, stack), undecoded=dict.fromkeys(_kinds(parts), stack))


def _kinds(parts: Sequence[Part]) -> list[str]:
    """What all of them can be read as with nothing computed."""
    each = [part.tensor.undecoded if isinstance(part.tensor, DerivedTensor) else {} for part in parts]
    return [kind for kind in each[0] if all(kind in other for other in each)]


def _stacked(each: int, parts: Sequence[Tensor], rows: range) -> Tensor:
    """What is read of some experts, of which each has so many parts."""
    return torch.cat(list(parts)).unflatten(0, (len(parts) // each, -1))
