"""The configuration of a GGUF file's model, in Hugging Face's form, of its metadata and its tensors' shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from gemma_mtp.checkpoint.gguf_gemma3 import gemma3_config
from gemma_mtp.checkpoint.gguf_metadata import Metadata, layer_count, matrix_shape, same_of_both
from gemma_mtp.config import FULL, SLIDING
from gemma_mtp.errors import ConfigError
from gemma_mtp.files.headers import StoredTensor

ARCHITECTURE = "general.architecture"
#: names of the architectures: llama.cpp's, and for drafters those of older files
GEMMA3, GEMMA4 = "gemma3", "gemma4"
TARGETS = (GEMMA4, GEMMA3)
DRAFTERS = ("gemma4-assistant", "gemma4_assistant", "gemma4_mtp")
#: llama.cpp's where a target's file does not say; a drafter has none
DEFAULT_SOFTCAP = 30.0
#: a rotary frequency divided by so much or more is taken for none
UNROTATED = 1e28
#: keys, after the architecture's name, that are applied here or that no token depends on
KNOWN = frozenset({
    "vocab_size", "context_length", "embedding_length", "embedding_length_out", "block_count", "feed_forward_length",
    "attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon", "attention.key_length",
    "attention.value_length", "attention.key_length_swa", "attention.value_length_swa", "attention.sliding_window",
    "attention.sliding_window_pattern", "attention.shared_kv_layers", "embedding_length_per_layer_input",
    "rope.freq_base", "rope.freq_base_swa", "rope.dimension_count", "rope.dimension_count_swa", "rope.scaling.type",
    "rope.scaling.factor", "rope.scale_linear", "final_logit_softcapping", "expert_count", "expert_used_count",
    "expert_feed_forward_length", "nextn_predict_layers",
})  # fmt: skip


def architecture_of(metadata: Metadata) -> str:
    """Returns the architecture. Raises ConfigError for one that can not be read."""
    architecture = metadata.text(ARCHITECTURE)
    if architecture not in (*TARGETS, *DRAFTERS):
        raise ConfigError(
            f"{metadata.path} is of architecture {architecture!r}, which can not be read; supported are"
            f" {', '.join((*TARGETS, *DRAFTERS))}."
        )
    return architecture


def config_of(metadata: Metadata, tensors: Mapping[str, StoredTensor], rope_factors: Tensor | None) -> dict[str, Any]:
    """Returns what config.json would hold. `tensors` are by official name, `rope_factors` as stored, [head_dim / 2].

    Raises ConfigError for what is missing, of the wrong kind, or can not be decoded with.
    """
    architecture = architecture_of(metadata)
    if architecture == GEMMA3:
        return gemma3_config(metadata, tensors)
    drafter = architecture in DRAFTERS
    text = _text_config(metadata, f"{architecture}.", tensors, rope_factors, drafter)
    if not drafter:
        return {"architectures": ["Gemma4ForCausalLM"], **text}
    _, backbone = matrix_shape(metadata, tensors, "pre_projection.weight")
    given = metadata.integer(f"{architecture}.embedding_length_out", backbone // 2)
    if 2 * given != backbone:
        raise metadata.wrong(f"{architecture}.embedding_length_out", f"{backbone // 2}, as pre_projection has it,")
    return {
        "architectures": ["Gemma4AssistantForCausalLM"],
        "model_type": "gemma4_assistant",
        "backbone_hidden_size": given,
        "use_ordered_embeddings": False,
        "tie_word_embeddings": text["tie_word_embeddings"],
        "eos_token_id": text["eos_token_id"],
        "text_config": text,
    }


def unknown_keys(metadata: Metadata) -> list[str]:
    """Returns the architecture's keys that are not applied, and may change what the model computes."""
    prefix = f"{metadata.text(ARCHITECTURE)}."
    return [key for key in metadata.values if key.startswith(prefix) and key.removeprefix(prefix) not in KNOWN]


def _text_config(
    metadata: Metadata, prefix: str, tensors: Mapping[str, StoredTensor], rope_factors: Tensor | None, drafter: bool
) -> dict[str, Any]:
    def integer(name: str, default: int | None = None) -> int:
        return metadata.integer(prefix + name, default)

    layers = layer_count(metadata, f"{prefix}block_count", tensors)
    vocab, _ = matrix_shape(metadata, tensors, "model.embed_tokens.weight")
    layer_types = metadata.layer_types(f"{prefix}attention.sliding_window_pattern", layers)
    shared = integer("attention.shared_kv_layers", layers if drafter else 0)
    wide = _feed_forward(metadata, f"{prefix}feed_forward_length", layers, shared)
    full_dim, head_dim = _head_dims(metadata, prefix)
    ple = integer("embedding_length_per_layer_input", 0)
    experts = integer("expert_count", 0)
    softcap = metadata.real(f"{prefix}final_logit_softcapping", 0.0 if drafter else DEFAULT_SOFTCAP)
    return {
        "model_type": "gemma4_text",
        "vocab_size": vocab,
        "hidden_size": integer("embedding_length"),
        **wide,
        "num_hidden_layers": layers,
        "num_attention_heads": metadata.same_of_layers(f"{prefix}attention.head_count", layers),
        **_key_value_heads(metadata, prefix, layer_types, shared, tensors, full_dim),
        "head_dim": head_dim,
        "global_head_dim": full_dim,
        "layer_types": layer_types,
        "sliding_window": integer("attention.sliding_window"),
        "num_kv_shared_layers": shared,
        "hidden_size_per_layer_input": ple,
        "vocab_size_per_layer_input": matrix_shape(metadata, tensors, "model.embed_tokens_per_layer.weight")[0]
        if ple
        else 0,
        "enable_moe_block": experts > 0,
        "num_experts": experts or None,
        "top_k_experts": integer("expert_used_count") if experts else None,
        "moe_intermediate_size": metadata.same_of_layers(f"{prefix}expert_feed_forward_length", layers)
        if experts
        else None,
        "final_logit_softcapping": softcap or None,
        "rms_norm_eps": metadata.real(f"{prefix}attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": integer("context_length"),
        "rope_parameters": _ropes(metadata, prefix, (full_dim, head_dim), rope_factors),
        **same_of_both(metadata, tensors),
    }


def _feed_forward(metadata: Metadata, key: str, layers: int, shared: int) -> dict[str, Any]:
    """Widths of the MLPs: of layers without keys and values of their own, the same as of the others, or double."""
    widths = metadata.of_layers(key, layers)
    first = layers - shared
    double = 0 < first < layers and widths[-1] == 2 * widths[0]
    if widths != [widths[0]] * first + [widths[0] * (2 if double else 1)] * (layers - first):
        raise metadata.wrong(key, "one width, doubled at most in the layers that share keys and values,")
    return {"intermediate_size": widths[0], "use_double_wide_mlp": double}


def _head_dims(metadata: Metadata, prefix: str) -> tuple[int, int]:
    """Returns those of full and of sliding layers."""
    full = metadata.integer(f"{prefix}attention.key_length")
    sliding = metadata.integer(f"{prefix}attention.key_length_swa", full)
    for name, expected in (
        ("attention.value_length", full), ("attention.value_length_swa", sliding), ("rope.dimension_count", full),
        ("rope.dimension_count_swa", sliding),
    ):  # fmt: skip
        if metadata.integer(prefix + name, expected) != expected:
            raise metadata.wrong(prefix + name, f"{expected}, as of keys,")
    return full, sliding


def _key_value_heads(
    metadata: Metadata, prefix: str, layer_types: Sequence[str], shared: int, tensors: Mapping[str, StoredTensor],
    full_dim: int,
) -> dict[str, Any]:  # fmt: skip
    """Their numbers in sliding and in full layers, and whether full layers have no values beside their keys."""
    key = f"{prefix}attention.head_count_kv"
    counts = metadata.of_layers(key, len(layer_types))
    of_kind = {kind: {n for n, of in zip(counts, layer_types, strict=True) if of == kind} for kind in (SLIDING, FULL)}
    if any(len(numbers) > 1 for numbers in of_kind.values()):
        raise metadata.wrong(key, "one number for all sliding layers, and one for all full ones,")
    full = next(iter(of_kind[FULL] or of_kind[SLIDING]))
    sliding = next(iter(of_kind[SLIDING] or of_kind[FULL]))
    own = [i for i, kind in enumerate(layer_types) if kind == FULL and i < len(layer_types) - shared]
    without = [i for i in own if f"model.layers.{i}.self_attn.v_proj.weight" not in tensors]
    k_eq_v = bool(own) and without == own
    heads = {"num_key_value_heads": sliding, "attention_k_eq_v": k_eq_v or (not own and full != sliding)}
    if heads["attention_k_eq_v"]:
        return {**heads, "num_global_key_value_heads": full}
    if full == sliding:
        return heads
    entry = {"head_dim": full_dim, "num_key_value_heads": full}
    return {**heads, "per_layer_config": {str(i): entry for i, kind in enumerate(layer_types) if kind == FULL}}


def _ropes(
    metadata: Metadata, prefix: str, head_dims: tuple[int, int], factors: Tensor | None
) -> dict[str, dict[str, Any]]:
    scaling = metadata.text(f"{prefix}rope.scaling.type", "none")
    if scaling != "none":
        raise metadata.wrong(f"{prefix}rope.scaling.type", "none")
    if metadata.real(f"{prefix}rope.scaling.factor", 1.0) not in (0.0, 1.0):
        raise metadata.wrong(f"{prefix}rope.scaling.factor", "1")
    full: dict[str, Any] = {"rope_type": "default", "rope_theta": metadata.real(f"{prefix}rope.freq_base")}
    if factors is not None:
        share = _rotated_share(metadata, factors, head_dims[0] // 2)
        full |= {"rope_type": "proportional", "partial_rotary_factor": share}
    sliding = {"rope_type": "default", "rope_theta": metadata.real(f"{prefix}rope.freq_base_swa")}
    return {SLIDING: sliding, FULL: full}


def _rotated_share(metadata: Metadata, factors: Tensor, half: int) -> float:
    """Returns the share of a full layer's dimensions that rotate: those whose frequencies are divided by 1."""
    rotated = int((factors == 1).sum()) if factors.shape == (half,) else 0
    if rotated == 0 or not bool((factors[:rotated] == 1).all() and (factors[rotated:] >= UNROTATED).all()):
        raise ConfigError(
            f"{metadata.path} has rope_freqs.weight with other values than {half} of 1, or of 1 and then of 1e30, which"
            " can not be decoded with; convert the model again."
        )
    return rotated / half
