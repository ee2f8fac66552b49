"""Loads the models of checkpoints, whatever format they are stored in."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from gemma_mtp.checkpoint.blocks import READ
from gemma_mtp.checkpoint.kept import keep_stored_, set_activations_
from gemma_mtp.checkpoint.open import open_source
from gemma_mtp.checkpoint.quantisations.bits import FP8_ROWS
from gemma_mtp.checkpoint.read import (
    Contents,
    check_headers,
    empty_model,
    family_table,
    read_config,
    read_contents,
    read_drafter_config,
    read_target_config,
    report,
)
from gemma_mtp.checkpoint.source import Location, OnBytes, Source
from gemma_mtp.checkpoint.tensors import copy_tensors, nobody, stored_tensors, stored_views
from gemma_mtp.checkpoint.upload import uploads_to
from gemma_mtp.config import DrafterConfig, TargetConfig
from gemma_mtp.errors import CheckpointError
from gemma_mtp.huge_pages import SideBySide, zeros
from gemma_mtp.locate import Role
from gemma_mtp.model.drafter import Drafter
from gemma_mtp.model.target import Target
from gemma_mtp.units import shown_bytes
from gemma_mtp.weight_types import WeightTypes

logger = logging.getLogger("gemma_mtp")

ORDERING = "masked_embedding.token_ordering"


def load_target(
    location: Location,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    types: WeightTypes | None = None,
    strict: bool = False,
    on_bytes: OnBytes = nobody,
    fp8: bool = False,
) -> Target:
    """Load a target's text model in inference mode. Every name and shape is checked before any weight is read.

    `types` says which parts to quantise, piece by piece as they are read; what is stored quantised stays so, blocks and
    rows of a kind that the operators multiply too, and with `fp8`, for kernels that multiply it, FP8 with a scale for
    each row or tensor. Static scales of activations are set on what is loaded. What is not as it should be but can be
    loaded is logged, or refused with `strict`. Peak memory: the weights as they are kept, plus a piece of 32 MB as it
    is stored and as much again where it is quantised; on a card, where both happen, twice 64 MB of the host's beside.
    `on_bytes` is told how many stored bytes are loaded, and of how many. Raises CheckpointError, ConfigError or
    QuantisationError.
    """
    source = open_source(location)
    target = _load(source, read_target_config(source), dtype, device, types, strict, on_bytes, fp8)
    assert isinstance(target, Target)
    return target


def load_drafter(
    location: Location,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    types: WeightTypes | None = None,
    strict: bool = False,
    on_bytes: OnBytes = nobody,
    fp8: bool = False,
) -> Drafter:
    """Load a drafter in inference mode; the rest as in `load_target`."""
    source = open_source(location, "drafter")
    drafter = _load(source, read_drafter_config(source), dtype, device, types, strict, on_bytes, fp8)
    assert isinstance(drafter, Drafter)
    return drafter


def planned_model(
    source: Source, contents: Contents[Any], dtype: torch.dtype, types: WeightTypes | None
) -> Target | Drafter:
    """Returns the model as it is to be loaded, without memory. Raises what `load_target` does for what is stored."""
    model = empty_model(contents.config, contents.types, dtype)
    check_headers(stored_tensors(model.checkpoint_tensors()), contents)
    if isinstance(model, Drafter):
        _check_ordering(source, contents)
    set_activations_(model, contents.headers)
    model.quantise_(types or WeightTypes())
    return model


def held_bytes(
    location: Location, role: Role, dtype: torch.dtype, types: WeightTypes | None = None, fp8: bool = False
) -> int:
    """Returns the bytes of a model's weights once it is loaded so; no weights are read, but for what `read_contents`
    and a drafter's order of tokens need. Raises what loading does."""
    source = open_source(location, role)
    contents: Contents[Any] = read_contents(source, read_config(source))
    model = planned_model(source, contents, dtype, types)
    keep_stored_(model, contents.headers, fp8)
    return sum(weight.nbytes for weight in model.checkpoint_tensors().values())


def rounded(model: Target | Drafter, contents: Contents[Any]) -> list[str]:
    """Returns a sentence where blocks of quantised values lose something in the floating-point numbers that they
    become."""
    weights = model.checkpoint_tensors()
    lost = {
        (headers.dtype, str(weights[name].dtype).removeprefix("torch."))
        for name, headers in contents.headers.items()
        if headers.dtype in READ and not weights[name].quantised and weights[name].dtype != torch.float32
    }
    return [
        f"its tensors of {kind} are rounded to {dtype}; float32 keeps their values as they are."
        for kind, dtype in sorted(lost)
    ]


def additions(contents: Contents[Any], names: Iterable[str]) -> dict[str, float]:
    """Returns what the family adds to stored tensors, by name, where it adds something."""
    family = family_table(contents.config)
    return {name: number for name in names if (number := family.added(name))}


def _check_ordering(source: Source, contents: Contents[DrafterConfig]) -> None:
    """Raises CheckpointError where a centroid head's order of tokens is damaged."""
    if not contents.config.use_ordered_embeddings:
        return
    (ordering,) = source.read([(contents.headers[ORDERING], None)])
    if not torch.equal(ordering.long().sort().values, torch.arange(contents.config.text.vocab_size)):
        raise CheckpointError(
            f"{source.path}: {ORDERING} must list every token id once, but does not; the checkpoint is damaged: copy it"
            " again."
        )


def _load(
    source: Source,
    config: TargetConfig | DrafterConfig,
    dtype: torch.dtype,
    device: torch.device | str,
    types: WeightTypes | None,
    strict: bool,
    on_bytes: OnBytes,
    fp8: bool,
) -> Target | Drafter:
    contents: Contents[Any] = read_contents(source, config)
    model = planned_model(source, contents, dtype, types)
    headers = keep_stored_(model, contents.headers, fp8)
    report(source, [*contents.notes, *rounded(model, contents)], strict)
    _log(contents)
    if kept := sum(header.dtype == FP8_ROWS for header in headers.values()):
        logger.info("%d of these matrices stay FP8, with no value rounded", kept)
    model = _with_memory(model, source, device)
    views = stored_views(model.checkpoint_tensors(), headers)
    with torch.no_grad():
        added, upload = additions(contents, views), uploads_to(torch.device(device))
        changes = copy_tensors(source, views, headers, added, on_bytes, upload)
    if changes.values:
        logger.info("%s", changes)
    return model.eval().requires_grad_(False)


def _log(contents: Contents[Any]) -> None:
    for sentence in contents.summary:
        logger.info("%s", sentence)
    skipped = contents.unused
    if skipped:
        size = shown_bytes(sum(header.nbytes for header in skipped))
        logger.info("skipped %d tensors (%s) that text decoding does not use", len(skipped), size)


def _in_huge_pages(model: Target | Drafter) -> Target | Drafter:
    """Returns the model with memory on the CPU.

    Small quantised weights, which PyTorch moves as bytes, share pages: they stay. Others are trained, or given up one
    by one for panels.
    """
    room = SideBySide()

    def made(tensor: Tensor) -> Tensor:
        return (room.zeros if tensor.dtype == torch.uint8 else zeros)(tensor.shape, tensor.dtype)

    moved: Target | Drafter = model._apply(made)  # type: ignore[no-untyped-call]
    return moved


def _with_memory(model: Target | Drafter, source: Source, device: torch.device | str) -> Target | Drafter:
    """Returns the model with memory on a device. Raises CheckpointError where it does not have so much."""
    nbytes = sum(weight.nbytes for weight in model.checkpoint_tensors().values())
    try:
        return model.to_empty(device=device) if torch.device(device).type != "cpu" else _in_huge_pages(model)
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        raise CheckpointError(
            f"{source.path} takes {shown_bytes(nbytes)} of memory, which {device} does not give"
            f" ({str(error).splitlines()[0]}); quantise it while loading, or take a smaller one."
        ) from None
