"""Writes models as checkpoints in the official Hugging Face layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from gemma_mtp.checkpoint.names import HEAD
from gemma_mtp.checkpoint.read import family_table
from gemma_mtp.checkpoint.safetensors import SINGLE_FILE
from gemma_mtp.checkpoint.tensors import SCALES, stored_tensors
from gemma_mtp.config import DrafterConfig, TargetConfig, TextConfig, drafter_config_to_hf, target_config_to_hf
from gemma_mtp.errors import CheckpointError
from gemma_mtp.json_files import replace_file, write_json
from gemma_mtp.model.drafter import Drafter
from gemma_mtp.model.target import Target
from gemma_mtp.ops.quantise import Weight
from gemma_mtp.weight_types import WeightTypes, weight_types_to_hf


def save_target(
    model: Target, config: TargetConfig, directory: str | Path, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write a target in the official layout: `model.safetensors` and `config.json`, each renamed into place."""
    prefix = "model." if family_table(config).targets[config.model_type] is None else "model.language_model."
    weights = model.checkpoint_tensors()
    named = {name.replace("model.", prefix, 1): weight for name, weight in weights.items()}
    config = replace(config, text=_tied_as(config.text, weights))
    _save(named, target_config_to_hf(config), model.weight_types, directory, dtype)


def save_drafter(
    model: Drafter, config: DrafterConfig, directory: str | Path, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write a drafter in the official layout: `model.safetensors` and `config.json`, each renamed into place."""
    weights = model.checkpoint_tensors()
    config = replace(config, text=_tied_as(config.text, weights))
    _save(weights, drafter_config_to_hf(config), model.weight_types, directory, dtype)


def _tied_as(config: TextConfig, weights: Mapping[str, Weight]) -> TextConfig:
    return replace(config, tie_word_embeddings=HEAD not in weights)


def _save(
    named: Mapping[str, Weight], config: dict[str, Any], types: WeightTypes, directory: str | Path, dtype: torch.dtype
) -> None:
    names = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
    if dtype not in names:
        raise CheckpointError(f"checkpoints can not be saved as {dtype}; use one of {', '.join(names.values())}.")
    tensors = {
        name: tensor.detach().to("cpu", _saved_dtype(name, tensor, dtype)).contiguous()
        for name, tensor in stored_tensors(named).items()
    }
    path = Path(directory)
    quantization = {"quantization_config": weight_types_to_hf(types)} if types else {}
    replace_file(path / SINGLE_FILE, lambda partial: save_file(tensors, partial, metadata={"format": "pt"}))
    write_json(path / "config.json", {**config, "dtype": names[dtype], **quantization})


def _saved_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    return dtype if tensor.is_floating_point() and not name.endswith(SCALES) else tensor.dtype
