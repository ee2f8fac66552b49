"""Configurations from Hugging Face `config.json` dictionaries, by the table of the family that they name."""

from __future__ import annotations

from typing import Any

from gemma_mtp.config.layers import full_layer_sizes, parse_layer_types
from gemma_mtp.config.models import DrafterConfig, TargetConfig
from gemma_mtp.config.rope import parse_ropes
from gemma_mtp.config.text import FULL, SLIDING, TextConfig
from gemma_mtp.config.values import field_value, is_token_id
from gemma_mtp.errors import ConfigError
from gemma_mtp.families.base import Family
from gemma_mtp.families.known import drafter_types, family_of, names, target_types
from gemma_mtp.json_files import shown


def parse_target_config(raw: dict[str, Any]) -> TargetConfig:
    """Read a target's `config.json` dictionary. Raises ConfigError naming the field that is wrong."""
    model_type = _model_type(raw)
    family = _family(model_type, "target", target_types(), "drafter")
    text_raw = _text_object(raw, family)
    if text_raw is None:
        raise ConfigError(
            f"config.json of model_type {model_type!r} has no {family.targets[model_type]!r} object; restore it from"
            " the source."
        )
    return TargetConfig(_parse_text_config(text_raw, raw, family), model_type)


def parse_drafter_config(raw: dict[str, Any]) -> DrafterConfig:
    """Read a drafter's `config.json` dictionary. Raises ConfigError naming the field that is wrong."""
    model_type = _model_type(raw)
    family = _family(model_type, "drafter", drafter_types(), "target")
    if not isinstance(raw.get("text_config"), dict):
        raise ConfigError("the drafter's config.json has no 'text_config' object; restore it from the source.")
    text_raw = dict(raw["text_config"])
    # transformers writes 0 where an all-shared stack was left to the default (Gemma4AssistantConfig.__post_init__)
    text_raw["num_kv_shared_layers"] = text_raw.get("num_kv_shared_layers") or text_raw.get("num_hidden_layers")
    text_raw.setdefault("hidden_size_per_layer_input", 0)  # no drafter has any
    return DrafterConfig(
        text=_parse_text_config(text_raw, raw, family),
        backbone_hidden_size=field_value(raw, "backbone_hidden_size", int, 1536),
        use_ordered_embeddings=field_value(raw, "use_ordered_embeddings", bool, False),
        num_centroids=field_value(raw, "num_centroids", int, 2048),
        centroid_intermediate_top_k=field_value(raw, "centroid_intermediate_top_k", int, 32),
        model_type=model_type,
    )


def _text_object(raw: dict[str, Any], family: Family) -> dict[str, Any] | None:
    """Returns the text configuration inside a target's, or None where it is not there."""
    key = family.targets[raw["model_type"]]
    text_raw = raw if key is None else raw.get(key)
    return text_raw if isinstance(text_raw, dict) else None


def _family(model_type: str, kind: str, types: list[str], other: str) -> Family:
    """Returns the family of a model_type, which must be one of `types`. `kind` and `other` are what a model can be."""
    family = family_of(model_type)
    if family is None or model_type not in types:
        hint = "" if family is None else f"; it is a {other}: pass it as the {other}"
        raise ConfigError(
            f"config.json has model_type {shown(model_type)}, which is not a {names()} {kind}"
            f" (expected one of {', '.join(types)}){hint}."
        )
    return family


def _model_type(raw: Any) -> str:
    if not isinstance(raw, dict):
        raise ConfigError(f"config.json must hold a JSON object, but holds a {type(raw).__name__}.")
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise ConfigError("config.json has no 'model_type'; it should say which model the checkpoint holds.")
    return model_type


def _parse_text_config(raw: dict[str, Any], outer: dict[str, Any], family: Family) -> TextConfig:
    options = family.options(raw)
    raw = family.translated(raw)
    model_type = field_value(raw, "model_type", str, family.text_model_type)
    defaults = family.defaults(model_type)
    layers = field_value(raw, "num_hidden_layers", int)
    layer_types = parse_layer_types(raw, layers, family)
    head_dim = field_value(raw, "head_dim", int, defaults["head_dim"])
    kv_heads = field_value(raw, "num_key_value_heads", int)
    k_eq_v = field_value(raw, "attention_k_eq_v", bool, False)
    default_global = defaults.get("global_head_dim", head_dim)
    global_head_dim, global_kv = full_layer_sizes(raw, layer_types, head_dim, kv_heads, k_eq_v, default_global)
    _refuse_other_layers(raw, outer, family)
    ple = field_value(raw, "hidden_size_per_layer_input", int, defaults["hidden_size_per_layer_input"])
    vocab = field_value(raw, "vocab_size", int)
    ropes = parse_ropes(raw, layer_types)
    eos = outer.get("eos_token_id")
    return TextConfig(
        vocab_size=vocab,
        hidden_size=field_value(raw, "hidden_size", int),
        intermediate_size=field_value(raw, "intermediate_size", int),
        num_hidden_layers=layers,
        num_attention_heads=field_value(raw, "num_attention_heads", int),
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        global_head_dim=global_head_dim,
        num_global_key_value_heads=global_kv,
        layer_types=layer_types,
        sliding_window=field_value(raw, "sliding_window", int),
        num_kv_shared_layers=field_value(raw, "num_kv_shared_layers", int, 0),
        use_double_wide_mlp=field_value(raw, "use_double_wide_mlp", bool, False),
        attention_k_eq_v=k_eq_v,
        hidden_size_per_layer_input=ple,
        vocab_size_per_layer_input=field_value(raw, "vocab_size_per_layer_input", int, vocab if ple else 0),
        enable_moe_block=field_value(raw, "enable_moe_block", bool, False),
        num_experts=field_value(raw, "num_experts", int, 0),
        top_k_experts=field_value(raw, "top_k_experts", int, 0),
        moe_intermediate_size=field_value(raw, "moe_intermediate_size", int, 0),
        final_logit_softcapping=field_value(raw, "final_logit_softcapping", float, None),
        rms_norm_eps=field_value(raw, "rms_norm_eps", float, 1e-6),
        max_position_embeddings=field_value(raw, "max_position_embeddings", int, defaults["max_position_embeddings"]),
        sliding_rope=ropes[SLIDING],
        full_rope=ropes[FULL],
        options=options,
        tie_word_embeddings=field_value(outer, "tie_word_embeddings", bool, True),
        pad_token_id=field_value(raw, "pad_token_id", int, None),
        bos_token_id=field_value(raw, "bos_token_id", int, None),
        eos_token_ids=_parse_eos(raw.get("eos_token_id", 1) if eos is None else eos),
        model_type=model_type,
    )


def _refuse_other_layers(raw: dict[str, Any], outer: dict[str, Any], family: Family) -> None:
    """Raise ConfigError for layers that the skeleton does not have, or weights in another file."""
    activation = field_value(raw, "hidden_activation", str, "gelu_pytorch_tanh")
    if activation != "gelu_pytorch_tanh":
        raise ConfigError(
            f"config.json has hidden_activation {shown(activation)}, but {family.name} uses 'gelu_pytorch_tanh'."
        )
    if field_value(raw, "attention_bias", bool, False):
        raise ConfigError(f"config.json has attention_bias true, but {family.name} attention has no biases.")
    if raw.get("use_bidirectional_attention") == "all":
        raise ConfigError("config.json has use_bidirectional_attention 'all': such an encoder cannot decode text.")
    if outer.get("transformers_weights") is not None:
        raise ConfigError(
            f"config.json has transformers_weights = {shown(outer['transformers_weights'])}, but weights are read from"
            " model.safetensors or model.safetensors.index.json; rename the file, and remove the field."
        )


def _parse_eos(raw: Any) -> tuple[int, ...]:
    ids = [] if raw is None else raw if isinstance(raw, list) else [raw]
    if not all(map(is_token_id, ids)):
        raise ConfigError(f"config.json has eos_token_id {shown(raw)}, but a token id or a list of them was expected.")
    return tuple(ids)
