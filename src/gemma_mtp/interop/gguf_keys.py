"""A model's configuration by llama.cpp's keys, as its own conversion writes them. `checkpoint.gguf_config` and
`checkpoint.gguf_gemma3` read them back."""

from __future__ import annotations

import array
from typing import Any

import torch
from torch import Tensor

from gemma_mtp.checkpoint.gguf_gemma3 import DEFAULT_PATTERN, score_scalar
from gemma_mtp.config import DrafterConfig, TargetConfig, TextConfig
from gemma_mtp.errors import ConfigError
from gemma_mtp.families.gemma3 import GEMMA3
from gemma_mtp.families.known import family_of

#: what divides the frequency of a dimension that does not rotate
UNROTATED = 1e30
QUANTISATION_VERSION = 2


def general_keys(file_type: int) -> dict[str, Any]:
    """Returns what every file says. `file_type`: llama.cpp's number of a type of matrices."""
    return {
        "general.type": "model", "general.file_type": file_type, "general.quantization_version": QUANTISATION_VERSION,
    }  # fmt: skip


def model_keys(config: TargetConfig | DrafterConfig) -> dict[str, Any]:
    """Returns the architecture and all of its keys. Raises ConfigError for what they can not say."""
    if is_gemma3(config):
        architecture, keys = "gemma3", {**_shared(config.text), **_of_gemma3(config.text)}
    elif isinstance(config, DrafterConfig):
        architecture, keys = "gemma4-assistant", {**_shared(config.text), **_of_gemma4(config.text)} | {
            "embedding_length_out": config.backbone_hidden_size, "nextn_predict_layers": config.text.num_hidden_layers
        }  # fmt: skip
    else:
        architecture, keys = "gemma4", {**_shared(config.text), **_of_gemma4(config.text)}
        keys.setdefault("final_logit_softcapping", 0.0)  # of a target llama.cpp has one where the file does not say
    return {"general.architecture": architecture, **{f"{architecture}.{name}": value for name, value in keys.items()}}


def is_gemma3(config: TargetConfig | DrafterConfig) -> bool:
    return family_of(config.model_type) is GEMMA3


def _shared(text: TextConfig) -> dict[str, Any]:
    """What both architectures have keys for."""
    keys: dict[str, Any] = {
        "vocab_size": text.vocab_size, "context_length": text.max_position_embeddings,
        "embedding_length": text.hidden_size, "block_count": text.num_hidden_layers,
        "feed_forward_length": _of_layers([text.layer_intermediate_size(i) for i in range(text.num_hidden_layers)]),
        "attention.head_count": text.num_attention_heads,
        "attention.head_count_kv": _of_layers([text.layer_kv_heads(i) for i in range(text.num_hidden_layers)]),
        "attention.layer_norm_rms_epsilon": float(text.rms_norm_eps),
        "attention.key_length": text.global_head_dim, "attention.value_length": text.global_head_dim,
        "attention.sliding_window": text.sliding_window,
        "rope.freq_base": float(text.full_rope.rope_theta), "rope.freq_base_swa": float(text.sliding_rope.rope_theta),
    }  # fmt: skip
    if text.final_logit_softcapping:
        keys["final_logit_softcapping"] = float(text.final_logit_softcapping)
    return keys


def _of_gemma4(text: TextConfig) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "attention.key_length_swa": text.head_dim, "attention.value_length_swa": text.head_dim,
        "attention.sliding_window_pattern": [text.is_sliding(i) for i in range(text.num_hidden_layers)],
        "attention.shared_kv_layers": text.num_kv_shared_layers,
        "embedding_length_per_layer_input": text.hidden_size_per_layer_input,
        "rope.dimension_count": text.global_head_dim, "rope.dimension_count_swa": text.head_dim,
    }  # fmt: skip
    if text.enable_moe_block:
        keys |= {"expert_count": text.num_experts, "expert_used_count": text.top_k_experts,
                 "expert_feed_forward_length": text.moe_intermediate_size}  # fmt: skip
    return keys


def _of_gemma3(text: TextConfig) -> dict[str, Any]:
    """The scale of its scores has no key: llama.cpp knows it by the number of layers."""
    scalar = score_scalar(text.num_hidden_layers, text.hidden_size, text.num_attention_heads, text.head_dim)
    if text.options.score_scale != scalar**-0.5:
        raise ConfigError(
            f"GGUF files of Gemma 3 can not say query_pre_attn_scalar: of this model it is"
            f" {text.options.score_scale**-2:g}, but {scalar} would be read."
        )
    full, sliding = text.full_rope, text.sliding_rope
    if sliding.rope_type != "default" or full.rope_type == "proportional":
        raise ConfigError(
            "GGUF files of Gemma 3 can not say rope_parameters of sliding layers with a factor, nor of type"
            " 'proportional'."
        )
    scaled = {"rope.scaling.type": "linear", "rope.scaling.factor": full.factor} if full.factor != 1 else {}
    period = _period(text)
    return {**scaled, **({} if period == DEFAULT_PATTERN else {"attention.sliding_window_pattern": period})}


def _period(text: TextConfig) -> int:
    """Which layers are full ones: every so many-th. llama.cpp reads no flags of this architecture."""
    sliding = [text.is_sliding(i) for i in range(text.num_hidden_layers)]
    for period in (DEFAULT_PATTERN, *range(1, text.num_hidden_layers + 2)):
        if sliding == [(i + 1) % period != 0 for i in range(text.num_hidden_layers)]:
            return period
    raise ConfigError("GGUF files of Gemma 3 can not say layer_types that do not repeat, a full layer after others.")


def _of_layers(values: list[int]) -> int | array.array[int]:
    """One number where all layers have it."""
    return values[0] if len(set(values)) == 1 else array.array("i", values)


def rope_divisors(config: TargetConfig | DrafterConfig) -> Tensor | None:
    """Returns what the frequencies of full layers are divided by, float32 [head_dim / 2], where a file has that.

    Gemma 4's full layers rotate only their first dimensions, by frequencies of the whole head. Raises ConfigError for
    other kinds of rotation.
    """
    text = config.text
    if is_gemma3(config):
        return None
    full, sliding = text.full_rope, text.sliding_rope
    if (sliding.rope_type, sliding.factor) != ("default", 1) or full.rope_type == "linear" or full.factor != 1:
        raise ConfigError("GGUF files of Gemma 4 can not say rope_parameters with a factor or of type 'linear'.")
    half = text.global_head_dim // 2
    rotated = int(half * full.partial_rotary_factor)
    return torch.tensor([1.0] * rotated + [UNROTATED] * (half - rotated))
