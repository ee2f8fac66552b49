"""Writes models as checkpoints in the official Hugging Face layout."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma_mtp.checkpoint.pieces import NAMES, bytes_of
from gemma_mtp.checkpoint.read import empty_model, family_table
from gemma_mtp.checkpoint.safetensors import INDEX_FILE, SINGLE_FILE
from gemma_mtp.checkpoint.tensors import pieces, stored_tensors
from gemma_mtp.config import DrafterConfig, TargetConfig, TextConfig, drafter_config_to_hf, target_config_to_hf
from gemma_mtp.errors import CheckpointError
from gemma_mtp.files.replace import replace_file
from gemma_mtp.files.safetensors import SafetensorsWriter, shards
from gemma_mtp.json_files import write_json
from gemma_mtp.model.drafter import Drafter
from gemma_mtp.model.target import Target
from gemma_mtp.weight_types import WeightTypes, weight_types_to_hf
from gemma_mtp.weights.base import SCALES
from gemma_mtp.weights.matrix import matrices

#: a new directory's weights are dealt out to files of so many bytes, as transformers long did
SHARD_BYTES = 5_000_000_000
METADATA = {"format": "pt"}
#: dtype and shape of each tensor to be written, by name
Layout = Mapping[str, tuple[torch.dtype, torch.Size]]
#: a tensor's name, the first of the rows that follow, and these rows
Values = Iterable[tuple[str, int, Tensor]]


def save_target(
    model: Target, config: TargetConfig, directory: str | Path, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write a target in the official layout: `model.safetensors` and `config.json`, each renamed into place.

    Raises CheckpointError where the model is not what the configuration and its weight types say.
    """
    config = replace(config, text=_tied_as(config.text, model))
    added = family_table(config).added
    named = {
        stored_name(name, config): tensor.float() - added(name) if added(name) else tensor
        for name, tensor in _tensors_of(model, config).items()
    }
    _save(named, target_config_to_hf(config), model.weight_types, directory, dtype)


def save_drafter(
    model: Drafter, config: DrafterConfig, directory: str | Path, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write a drafter in the official layout: `model.safetensors` and `config.json`, each renamed into place.

    Raises CheckpointError where the model is not what the configuration and its weight types say.
    """
    config = replace(config, text=_tied_as(config.text, model))
    _save(_tensors_of(model, config), drafter_config_to_hf(config), model.weight_types, directory, dtype)


def stored_name(official: str, config: TargetConfig | DrafterConfig) -> str:
    """Returns the name that a tensor has in the official layout: beside towers, the text model has a prefix."""
    multimodal = isinstance(config, TargetConfig) and family_table(config).targets[config.model_type] is not None
    return official.replace("model.", "model.language_model.", 1) if multimodal else official


def write_shards(directory: Path, layout: Layout, values: Values) -> None:
    """Write tensors into a new directory as their values come: `model.safetensors`, or shards of at most `SHARD_BYTES`
    and their index. Raises OSError."""
    parts = list(shards(_in_file(layout), SHARD_BYTES))
    files = [SINGLE_FILE]
    if len(parts) > 1:
        files = [f"model-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1)]
    _write_files({directory / file: part for file, part in zip(files, parts, strict=True)}, layout, values)
    if len(parts) > 1:
        total = sum(shape.numel() * dtype.itemsize for dtype, shape in layout.values())
        weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        write_json(directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _tied_as(config: TextConfig, model: Target | Drafter) -> TextConfig:
    return replace(config, tie_word_embeddings=model.lm_head is None)


def _tensors_of(model: Target | Drafter, config: TargetConfig | DrafterConfig) -> dict[str, Tensor]:
    """Returns what a file holds of a model, by official names.

    Raises CheckpointError where it is not what a loader would look for by the config.json beside it.
    """
    if any(matrix.activations for matrix in matrices(model)):
        raise CheckpointError(
            "the model can not be saved: it rounds activations by static scales, which the layout has no place for."
        )
    tensors = stored_tensors(model.checkpoint_tensors())
    planned = stored_tensors(empty_model(config, model.weight_types).checkpoint_tensors())
    for name in {**planned, **tensors}:
        found, expected = (_described(of.get(name)) for of in (tensors, planned))
        if found != expected:
            raise CheckpointError(
                f"the model can not be saved: of {name} it has {found}, but its configuration and weight types call for"
                f" {expected}; save it with the configuration that it was made of."
            )
    return tensors


def _described(tensor: Tensor | None) -> str:
    if tensor is None:
        return "nothing"
    kind = "float" if tensor.is_floating_point() else str(tensor.dtype).removeprefix("torch.")
    return f"{kind} {list(tensor.shape)}"


def _save(
    tensors: Mapping[str, Tensor], config: dict[str, Any], types: WeightTypes, directory: str | Path, dtype: torch.dtype
) -> None:
    names = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
    if dtype not in names:
        raise CheckpointError(f"checkpoints can not be saved as {dtype}; use one of {', '.join(names.values())}.")
    path = Path(directory)
    layout = {name: (_saved_dtype(name, tensor, dtype), tensor.shape) for name, tensor in tensors.items()}
    quantization = {"quantization_config": weight_types_to_hf(types)} if types else {}
    replace_file(
        path / SINGLE_FILE, lambda partial: _write_files({partial: tensors}, layout, _converted(tensors, layout))
    )
    write_json(path / "config.json", {**config, "dtype": names[dtype], **quantization})


def _write_files(files: Mapping[Path, Collection[str]], layout: Layout, values: Values) -> None:
    """Write tensors to the files that are to hold them, as their values come."""
    in_file = _in_file(layout)
    writers: dict[str, SafetensorsWriter] = {}
    with ExitStack() as stack:
        for path, names in files.items():
            writer = SafetensorsWriter(path, {name: in_file[name] for name in names}, METADATA)
            writers |= dict.fromkeys(names, stack.enter_context(writer))
        for name, first, rows in values:
            writers[name].write(name, bytes_of(rows), first * _row_bytes(*layout[name]))


def _converted(tensors: Mapping[str, Tensor], layout: Layout) -> Iterator[tuple[str, int, Tensor]]:
    """Tensors in the dtypes that they are written in, a piece at a time."""
    for name, tensor in tensors.items():
        dtype, _ = layout[name]
        for rows in pieces(tensor.shape, tensor.nbytes):
            part = tensor.detach() if rows is None else tensor.detach()[rows]
            yield name, 0 if rows is None else rows.start, part.to("cpu", dtype)


def _in_file(layout: Layout) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (NAMES[dtype], tuple(shape)) for name, (dtype, shape) in layout.items()}


def _row_bytes(dtype: torch.dtype, shape: torch.Size) -> int:
    return shape[1:].numel() * dtype.itemsize


def _saved_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    return dtype if tensor.is_floating_point() and not name.endswith(SCALES) else tensor.dtype
