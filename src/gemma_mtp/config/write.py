"""Configurations as Hugging Face `config.json` dictionaries."""

from __future__ import annotations

import dataclasses
from typing import Any

from gemma_mtp.config.layers import check_last_layer
from gemma_mtp.config.models import DrafterConfig, TargetConfig
from gemma_mtp.config.rope import rope_to_hf
from gemma_mtp.config.text import FULL, SLIDING, TextConfig
from gemma_mtp.errors import ConfigError
from gemma_mtp.families.base import Family
from gemma_mtp.families.known import family_of, names


def config_to_hf(config: TargetConfig | DrafterConfig) -> dict[str, Any]:
    """The `config.json` dictionary of either. Raises ConfigError for a model that can be read only."""
    return target_config_to_hf(config) if isinstance(config, TargetConfig) else drafter_config_to_hf(config)


def target_config_to_hf(config: TargetConfig) -> dict[str, Any]:
    """The `config.json` dictionary of a target, in the official layout. Inverse of `parse_target_config`."""
    family = _written_family(config.model_type)
    architectures = [family.architectures[config.model_type]]
    text = _text_config_to_hf(config.text, family)
    if family.targets[config.model_type] is None:
        return {"architectures": architectures, **text, "model_type": config.model_type}
    return {
        "architectures": architectures,
        "model_type": config.model_type,
        "text_config": text,
        "vision_config": None,
        "audio_config": None,
        "tie_word_embeddings": config.text.tie_word_embeddings,
    }


def drafter_config_to_hf(config: DrafterConfig) -> dict[str, Any]:
    """The `config.json` dictionary of a drafter, in the official layout. Inverse of `parse_drafter_config`."""
    family = _written_family(config.model_type)
    return {
        "architectures": [family.architectures[config.model_type]],
        "model_type": config.model_type,
        "backbone_hidden_size": config.backbone_hidden_size,
        "use_ordered_embeddings": config.use_ordered_embeddings,
        "num_centroids": config.num_centroids,
        "centroid_intermediate_top_k": config.centroid_intermediate_top_k,
        "tie_word_embeddings": config.text.tie_word_embeddings,
        "text_config": _text_config_to_hf(config.text, family),
    }


def _written_family(model_type: str) -> Family:
    """Returns the family, which must be one that is written. Raises ConfigError."""
    family = family_of(model_type)
    if family is None or model_type not in family.architectures:
        raise ConfigError(f"a model of model_type {model_type!r} can not be written; only {names()} is.")
    return family


def _text_config_to_hf(config: TextConfig, family: Family) -> dict[str, Any]:
    raw = dataclasses.asdict(config)
    check_last_layer(config.layer_types, family)
    del raw["options"]
    raw["layer_types"] = list(config.layer_types)
    raw["eos_token_id"] = list(raw.pop("eos_token_ids"))
    raw["rope_parameters"] = {SLIDING: rope_to_hf(config.sliding_rope), FULL: rope_to_hf(config.full_rope)}
    del raw["sliding_rope"], raw["full_rope"]
    if config.num_global_key_value_heads == config.num_key_value_heads:
        raw["num_global_key_value_heads"] = None
    elif not config.attention_k_eq_v:  # only per_layer_config can say so
        full = {"head_dim": config.global_head_dim, "num_key_value_heads": raw.pop("num_global_key_value_heads")}
        raw["per_layer_config"] = {str(i): full for i, kind in enumerate(config.layer_types) if kind == FULL}
    for name in ("num_experts", "top_k_experts", "moe_intermediate_size"):
        raw[name] = raw[name] or None
    raw["hidden_activation"] = "gelu_pytorch_tanh"
    written = family.written(raw, config.options)
    if config.options != family.options(written):
        raise ConfigError(f"a model whose layers differ from {family.name}'s (LayerOptions) can not be written as one.")
    return written
