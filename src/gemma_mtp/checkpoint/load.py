"""Loads the models of checkpoints, whatever format they are stored in."""

from __future__ import annotations

import logging
from typing import Any, TypeVar

import torch

from gemma_mtp.checkpoint.open import open_source
from gemma_mtp.checkpoint.read import (
    Contents,
    check_headers,
    family_table,
    read_contents,
    read_drafter_config,
    read_target_config,
    report,
)
from gemma_mtp.checkpoint.source import Location, Source
from gemma_mtp.checkpoint.tensors import SCALES, copy_tensors, stored_tensors
from gemma_mtp.errors import CheckpointError
from gemma_mtp.model.drafter import Drafter
from gemma_mtp.model.target import Target
from gemma_mtp.ops.quantise import Weight
from gemma_mtp.weight_types import WeightTypes

logger = logging.getLogger("gemma_mtp")

_Model = TypeVar("_Model", Target, Drafter)


def load_target(
    location: Location,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    types: WeightTypes | None = None,
    strict: bool = False,
) -> Target:
    """Load a target's text model in inference mode. Every name and shape is checked before any weight is read.

    `types` says which parts to quantise, piece by piece as they are read; what is stored quantised stays so. What is
    not as it should be but can be loaded is logged, or refused with `strict`. Peak memory: the weights as they are
    kept, plus 32 MB of mapped file and as much again where it is quantised. Raises CheckpointError, ConfigError or
    QuantisationError.
    """
    source = open_source(location)
    contents = read_contents(source, read_target_config(source))
    report(location, contents.notes, strict)
    with torch.device("meta"):
        model = Target(contents.config.text)
    return _load(source, model, contents, dtype, device, types or WeightTypes())


def load_drafter(
    location: Location,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    types: WeightTypes | None = None,
    strict: bool = False,
) -> Drafter:
    """Load a drafter in inference mode; the rest as in `load_target`."""
    source = open_source(location, "drafter")
    contents = read_contents(source, read_drafter_config(source))
    report(location, contents.notes, strict)
    with torch.device("meta"):
        model = Drafter(contents.config)
    drafter = _load(source, model, contents, dtype, device, types or WeightTypes())
    head = drafter.masked_embedding
    if head is not None:
        expected = torch.arange(contents.config.text.vocab_size, device=head.token_ordering.device)
        if not torch.equal(head.token_ordering.sort().values, expected):
            raise CheckpointError(
                f"{source.path}: masked_embedding.token_ordering must list every token id once, but does not;"
                " the checkpoint is damaged: copy it again."
            )
    return drafter


def _load(
    source: Source,
    model: _Model,
    contents: Contents[Any],
    dtype: torch.dtype,
    device: torch.device | str,
    types: WeightTypes,
) -> _Model:
    skipped = contents.unused
    if skipped:
        size = sum(header.nbytes for header in skipped) / 1e6
        logger.info("skipped %d tensors (%.1f MB) that text decoding does not use", len(skipped), size)
    model = model.to(dtype)
    model.quantise_(contents.types)
    stored = stored_tensors(model.checkpoint_tensors())
    check_headers(stored, contents)
    model.quantise_(types)
    model = model.to_empty(device=device)
    views: dict[str, Weight] = {}
    for name, weight in model.checkpoint_tensors().items():
        views |= stored_tensors({name: weight}) if name + SCALES in stored else {name: weight}
    family = family_table(contents.config)
    added = {name: number for name in views if (number := family.added(name))}
    with torch.no_grad():
        copy_tensors(source, views, contents.headers, added)
    return model.eval().requires_grad_(False)
