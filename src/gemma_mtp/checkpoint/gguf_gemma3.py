"""The configuration of a GGUF file of architecture `gemma3`, in Hugging Face's form.

Where a file does not say something, it is what llama.cpp takes it to be (src/models/gemma3.cpp as vendored in
llama-cpp-python 0.3.36). Norms are stored with the 1 that Hugging Face's files leave out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gemma_mtp.checkpoint.gguf_metadata import Metadata, layer_count, matrix_shape, same_of_both
from gemma_mtp.config import FULL, SLIDING
from gemma_mtp.files.headers import StoredTensor

PREFIX = "gemma3."
PATTERN, DEFAULT_PATTERN = f"{PREFIX}attention.sliding_window_pattern", 6
SCALING, FACTORS = f"{PREFIX}rope.scaling.type", (f"{PREFIX}rope.scaling.factor", f"{PREFIX}rope.scale_linear")
LOCAL_THETA = 1e4
#: how many layers the 27B has, whose scores are scaled by the hidden size of a head and not by its own
LAYERS_OF_27B = 62


def gemma3_config(metadata: Metadata, tensors: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """Returns what config.json would hold. Raises ConfigError or CheckpointError for what can not be decoded with."""

    def integer(name: str, default: int | None = None) -> int:
        return metadata.integer(PREFIX + name, default)

    layers = layer_count(metadata, f"{PREFIX}block_count", tensors)
    hidden, head_dim = integer("embedding_length"), integer("attention.key_length")
    for name in ("attention.value_length", "rope.dimension_count"):
        if integer(name, head_dim) != head_dim:
            raise metadata.wrong(PREFIX + name, f"{head_dim}, as of keys,")
    heads = metadata.same_of_layers(f"{PREFIX}attention.head_count", layers)
    if heads < 1:
        raise metadata.wrong(f"{PREFIX}attention.head_count", "a number above 0")
    context = integer("context_length")
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "vocab_size": matrix_shape(metadata, tensors, "model.embed_tokens.weight")[0],
        "hidden_size": hidden,
        "intermediate_size": metadata.same_of_layers(f"{PREFIX}feed_forward_length", layers),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.same_of_layers(f"{PREFIX}attention.head_count_kv", layers),
        "head_dim": head_dim,
        "query_pre_attn_scalar": score_scalar(layers, hidden, heads, head_dim),
        "layer_types": _layer_types(metadata, layers),
        "sliding_window": integer("attention.sliding_window", 0) or context,
        "final_logit_softcapping": metadata.real(f"{PREFIX}final_logit_softcapping", 0.0) or None,
        "rms_norm_eps": metadata.real(f"{PREFIX}attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": context,
        "rope_parameters": _ropes(metadata),
        **same_of_both(metadata, tensors),
    }


def score_scalar(layers: int, hidden: int, heads: int, head_dim: int) -> int:
    """Returns what scores are divided by the root of: files have no key for it."""
    return hidden // heads if layers == LAYERS_OF_27B else head_dim


def _layer_types(metadata: Metadata, layers: int) -> list[str]:
    if metadata.integer(f"{PREFIX}attention.sliding_window", 0) == 0:
        return [FULL] * layers
    if PATTERN in metadata.values:
        return metadata.layer_types(PATTERN, layers)
    return [SLIDING if (i + 1) % DEFAULT_PATTERN else FULL for i in range(layers)]


def _ropes(metadata: Metadata) -> dict[str, dict[str, Any]]:
    """A factor divides the frequencies of full layers."""
    kind = metadata.text(SCALING, "linear")
    if kind not in ("none", "linear"):
        raise metadata.wrong(SCALING, "none or linear")
    given = next((metadata.real(key) for key in FACTORS if key in metadata.values), 0.0)
    factor = 1.0 if kind == "none" else given or 1.0
    full: dict[str, Any] = {"rope_type": "default", "rope_theta": metadata.real(f"{PREFIX}rope.freq_base")}
    if factor != 1:
        full |= {"rope_type": "linear", "factor": factor}
    theta = metadata.real(f"{PREFIX}rope.freq_base_swa", LOCAL_THETA)
    return {SLIDING: {"rope_type": "default", "rope_theta": theta}, FULL: full}
