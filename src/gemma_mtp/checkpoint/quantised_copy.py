"""Writes a quantised copy of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gemma_mtp.checkpoint.derived import rounded_products
from gemma_mtp.checkpoint.load import planned_model
from gemma_mtp.checkpoint.open import open_source
from gemma_mtp.checkpoint.read import Contents, read_config, read_contents, report, stored_dtypes
from gemma_mtp.checkpoint.save import stored_name, write_shards
from gemma_mtp.checkpoint.source import Location, OnBytes, Source
from gemma_mtp.checkpoint.tensors import Int4Changes, converted_tensors, nobody, stored_tensors, stored_views
from gemma_mtp.config import TargetConfig, config_to_hf
from gemma_mtp.errors import QuantisationError
from gemma_mtp.files.replace import new_directory
from gemma_mtp.json_files import write_json
from gemma_mtp.model.drafter import Drafter
from gemma_mtp.model.target import Target
from gemma_mtp.weight_types import WeightTypes, weight_types_to_hf


def write_quantised_copy(
    location: Location,
    out: str | Path,
    types: WeightTypes,
    strict: bool = False,
    on_bytes: OnBytes = nobody,
    changes: Int4Changes | None = None,
) -> WeightTypes:
    """Write a target's text model, or a drafter, to the new directory `out`, quantised, with its tokenizer's files.

    `config.json` is the source's, with a `quantization_config`. Returns how the parts of the copy are quantised. The
    copy gives bit for bit what quantising the source while loading gives. Nothing is left where it fails. The model is
    never in memory: weights are read, quantised and written piece by piece, and peak memory is some hundred MB however
    large they are. `strict` and `on_bytes` as in `load_target`; `changes` is added to. Raises CheckpointError,
    ConfigError or
    QuantisationError.
    """
    source = open_source(location)
    config = read_config(source)
    kind = "target" if isinstance(config, TargetConfig) else "drafter"
    wanted = types.of_target() if isinstance(config, TargetConfig) else types.of_drafter()
    if not wanted:
        raise QuantisationError(f"{source.path} is a {kind}, and no part of a {kind} was asked to be quantised.")
    dtype = _dtype(stored_dtypes(source))
    with new_directory(Path(out)) as directory:
        contents = read_contents(source, config)
        report(location, contents.notes, strict)
        config_to_hf(contents.config)  # or refused
        _check_scales(source, contents)
        model = planned_model(source, contents, dtype, wanted)
        _write_weights(source, model, contents, directory, on_bytes, Int4Changes() if changes is None else changes)
        written: dict[str, Any] = {
            "quantization_config": weight_types_to_hf(model.weight_types), "dtype": str(dtype).removeprefix("torch."),
        }  # fmt: skip
        tied = model.lm_head is None
        if tied != config.text.tie_word_embeddings:  # the weights decided otherwise
            written["tie_word_embeddings"] = tied
        write_json(directory / "config.json", {**source.config(), **written})
        source.copy_companions(directory)
    return model.weight_types


def _write_weights(
    source: Source,
    model: Target | Drafter,
    contents: Contents[Any],
    directory: Path,
    on_bytes: OnBytes,
    changes: Int4Changes,
) -> None:
    """Write what loading would keep in memory, under the official names, without what it adds to norms."""
    weights = model.checkpoint_tensors()
    views = stored_views(weights, contents.headers)
    layout = {
        stored_name(name, contents.config): (tensor.dtype, tensor.shape)
        for name, tensor in stored_tensors(weights).items()
    }
    values = converted_tensors(source, views, contents.headers, {}, on_bytes, changes)
    named = ((stored_name(name, contents.config), first, rows) for name, first, rows in values)
    write_shards(directory, layout, named)


def _check_scales(source: Source, contents: Contents[Any]) -> None:
    """Raises QuantisationError for a checkpoint whose copy would be another model."""
    if rounded_products(contents.headers.values()):
        raise QuantisationError(
            f"{source.path} rounds activations by static scales (input_activation_scale), for which a copy has no"
            " place; quantise it while loading (generate --quantize), or copy the unquantised checkpoint."
        )


def _dtype(stored: set[str]) -> torch.dtype:
    """One that holds every stored one's values."""
    dtypes = {"BF16": torch.bfloat16, "F16": torch.float16}
    return dtypes.get(next(iter(stored)), torch.float32) if len(stored) == 1 else torch.float32
