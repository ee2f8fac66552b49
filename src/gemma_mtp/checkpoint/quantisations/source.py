"""A checkpoint of another tool's quantisation, seen as one that is not quantised."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from typing import Any

from gemma_mtp.checkpoint.derived import rounded_products
from gemma_mtp.checkpoint.experts import ExpertsSource, has_experts
from gemma_mtp.checkpoint.kept import kinds_of
from gemma_mtp.checkpoint.names import find_tensors
from gemma_mtp.checkpoint.quantisations.base import Quantised, Reading
from gemma_mtp.checkpoint.quantisations.known import FIELD, READERS, found_in
from gemma_mtp.checkpoint.source import Source
from gemma_mtp.checkpoint.wrapped import WrappedSource
from gemma_mtp.errors import QuantisationError
from gemma_mtp.files.headers import StoredTensor


class QuantisedSource(WrappedSource):
    """Its matrices are floats, made of what is stored as they are read."""

    def __init__(self, checkpoint: Quantised) -> None:
        super().__init__(checkpoint.source)
        self.quantised = checkpoint

    @functools.cached_property
    def _reading(self) -> Reading:
        """Raises QuantisationError for what can not be read."""
        reading = READERS[self.quantised.method](self.quantised)
        if not reading.tensors:
            raise QuantisationError(
                f"{self.path} says that its weights are quantised by {self.quantised.method!r}, but has none that are"
                " stored so; give the whole checkpoint, or the unquantised checkpoint and its config.json."
            )
        twice = sorted(name for name in reading.tensors if name in self.quantised.stored and name not in reading.used)
        if twice:
            raise QuantisationError(
                f"{self.path} holds {twice[0]} twice, quantised and not; copy the checkpoint again."
            )
        return reading

    def config(self) -> Any:
        """Returns config.json's content as it would be without the quantisation."""
        return {name: value for name, value in self.inner.config().items() if name not in (FIELD, "quantization")}

    @functools.cached_property
    def _tensors(self) -> dict[str, StoredTensor]:
        kept = {name: tensor for name, tensor in self.inner.tensors().items() if name not in self._reading.used}
        return {**kept, **self._reading.tensors}

    def tensors(self) -> Mapping[str, StoredTensor]:
        return self._tensors

    def places(self, needed: Collection[str], optional: Collection[str] = ()) -> dict[str, str]:
        return find_tensors(self.tensors(), needed, optional)

    def notes(self) -> list[str]:
        return [*self.inner.notes(), *self._reading.notes]

    def summary(self) -> list[str]:
        reading, method = self._reading, self.quantised.method
        kinds = ", ".join(f"{count} of {kind}" for kind, count in sorted(reading.kinds.items()))
        kept = any(kinds_of(tensor, fp8=False) for tensor in reading.tensors.values())
        how = "matrices stay as they are stored where the operators can multiply them so, others are" if kept else (
            "matrices are"
        )  # fmt: skip
        facts = [
            f"{method}: {how} read as floats ({kinds}); values are those stored, rounded to the dtype that they are"
            " loaded in"
        ]
        if count := rounded_products(reading.tensors.values()):
            facts.append(f"{method}: products with {count} of them are rounded to 8 bits by static scales")
        return [*self.inner.summary(), *facts]


def readable(source: Source) -> Source:
    """Returns a source of weights that a loader knows: itself, or with another tool's quantisation taken off, and with
    a model's experts put together.

    Raises CheckpointError where config.json is missing or malformed.
    """
    quantised = found_in(source)
    plain = source if quantised is None else QuantisedSource(quantised)
    return ExpertsSource(plain) if has_experts(source.config()) else plain
