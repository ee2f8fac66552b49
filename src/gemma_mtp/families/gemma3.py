"""Gemma 3's text models (transformers 5.22.2, models/gemma3): the skeleton without Gemma 4's additions.

Norms multiply by 1 + their stored weight, in float32; scores have a scale; values are not normalised, and layers have
no scalar. The multimodal checkpoints' text model is the same one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gemma_mtp.errors import ConfigError
from gemma_mtp.families.base import Family, LayerOptions
from gemma_mtp.json_files import shown

SLIDING, FULL = "sliding_attention", "full_attention"
#: Gemma3TextConfig's own, for what a config.json leaves out: the hub's multimodal ones say little
DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096, "pad_token_id": 0,
    "bos_token_id": 2, "max_position_embeddings": 131072, "hidden_size_per_layer_input": 0,
}  # fmt: skip
DEFAULT_SCALAR, DEFAULT_PATTERN = 256, 6
#: so many are refused as soon as they are counted
MANY_LAYERS = 1 << 20
#: of numbers
LEAST, MOST = 1e-3, 1e30
GLOBAL_THETA, LOCAL_THETA = 1e6, 1e4
#: fields of Gemma 4 that change a model, and that no Gemma 3 has
OF_GEMMA4 = (
    "global_head_dim", "num_global_key_value_heads", "per_layer_config", "num_kv_shared_layers", "use_double_wide_mlp",
    "attention_k_eq_v", "hidden_size_per_layer_input", "vocab_size_per_layer_input", "enable_moe_block", "num_experts",
    "top_k_experts", "moe_intermediate_size",
)  # fmt: skip
#: fields that are translated, or that stand for what is
OWN = (
    "query_pre_attn_scalar", "attn_logit_softcapping", "sliding_window_pattern", "_sliding_window_pattern",
    "rope_theta", "rope_local_base_freq", "rope_scaling", "use_bidirectional_attention",
)  # fmt: skip


def _options(raw: Mapping[str, Any]) -> LayerOptions:
    scalar = _number(raw, "query_pre_attn_scalar", DEFAULT_SCALAR)
    return LayerOptions(value_norm=False, score_scale=scalar**-0.5, layer_scalar=False, float32_norms=True)


def _number(raw: Mapping[str, Any], name: str, default: float) -> float:
    value = default if raw.get(name) is None else raw[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not LEAST <= value <= MOST:
        raise ConfigError(
            f"config.json has {name} = {shown(value)}, but a number from {LEAST:g} to {MOST:g} was expected."
        )
    return value


def _translated(raw: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of transformers 5 and of the hub's older files as the skeleton's."""
    if raw.get("attn_logit_softcapping") is not None:
        raise ConfigError("config.json has attn_logit_softcapping, which Gemma 3 does not use; remove it.")
    if raw.get("use_bidirectional_attention"):
        raise ConfigError("config.json has use_bidirectional_attention: such an encoder cannot decode text.")
    foreign = next((name for name in OF_GEMMA4 if raw.get(name)), None)
    if foreign is not None:
        raise ConfigError(f"config.json has {foreign} = {shown(raw[foreign])}, which no Gemma 3 has; remove it.")
    text = {name: value for name, value in raw.items() if name not in (*OWN, *OF_GEMMA4) and value is not None}
    text = {**DEFAULTS, **text, "rope_parameters": _ropes(raw)}
    layers = text["num_hidden_layers"]
    if "layer_types" not in text and type(layers) is int and layers < MANY_LAYERS:
        pattern = _number(raw, "sliding_window_pattern", DEFAULT_PATTERN)
        text["layer_types"] = [SLIDING if (i + 1) % pattern else FULL for i in range(layers)]
    return text


def _ropes(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Entries for both types, by Gemma3TextConfig's rules: `rope_scaling` is of full layers alone."""
    given, scaling = raw.get("rope_parameters"), raw.get("rope_scaling")
    given = {} if given is None else given
    parts = [given, scaling or {}, *(given.get(kind) or {} for kind in (SLIDING, FULL) if isinstance(given, dict))]
    if not all(isinstance(part, dict) for part in parts):
        raise ConfigError("config.json has rope_parameters or rope_scaling that are no objects of each type of layer.")
    full = {**(given.get(FULL) or {}), **(scaling or {})}
    sliding = dict(given.get(SLIDING) or {})
    full.setdefault("rope_theta", _number(raw, "rope_theta", GLOBAL_THETA))
    sliding.setdefault("rope_theta", _number(raw, "rope_local_base_freq", LOCAL_THETA))
    return {**given, SLIDING: sliding, FULL: full}


def _written(raw: dict[str, Any], options: LayerOptions) -> dict[str, Any]:
    """Returns the skeleton's fields as Gemma 3's."""
    scalar = options.score_scale**-2
    whole = round(scalar)
    text = {name: value for name, value in raw.items() if name not in OF_GEMMA4}
    return {**text, "query_pre_attn_scalar": whole if abs(scalar - whole) < 1e-6 * scalar else scalar}


GEMMA3 = Family(
    name="Gemma 3",
    targets={"gemma3_text": None, "gemma3": "text_config"},
    text_model_type="gemma3_text",
    defaults=lambda model_type: DEFAULTS,
    translated=_translated,
    options=_options,
    ends_full=False,
    architectures={"gemma3_text": "Gemma3ForCausalLM", "gemma3": "Gemma3ForConditionalGeneration"},
    written=_written,
    norm_offset=1.0,
)
