"""What GGUF metadata and tensors of every architecture say of layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gemma_mtp.checkpoint.gguf_metadata import Metadata
from gemma_mtp.errors import CheckpointError
from gemma_mtp.files.headers import StoredTensor

SLIDING, FULL = "sliding_attention", "full_attention"


def same_of_both(metadata: Metadata, tensors: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """What both architectures' files say in the same way."""
    return {
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "pad_token_id": metadata.integer_or_none("tokenizer.ggml.padding_token_id"),
        "bos_token_id": metadata.integer_or_none("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.integer_or_none("tokenizer.ggml.eos_token_id"),
        "hidden_activation": "gelu_pytorch_tanh",
    }


def layer_count(metadata: Metadata, key: str, tensors: Mapping[str, StoredTensor]) -> int:
    """Returns the number of layers, of which each has a tensor."""
    layers = metadata.integer(key)
    if not 0 < layers <= len(tensors):
        raise metadata.wrong(key, f"a number above 0 and no more than the {len(tensors)} tensors there are")
    return layers


def matrix_shape(metadata: Metadata, tensors: Mapping[str, StoredTensor], name: str) -> tuple[int, ...]:
    """Returns rows and columns of a matrix that the model needs."""
    if name not in tensors or len(tensors[name].shape) != 2:
        raise CheckpointError(f"{metadata.path} has no matrix {name}; convert the model again.")
    return tensors[name].shape


def layer_types_of(metadata: Metadata, key: str, layers: int) -> list[str]:
    """Of a flag for each layer; of a number n, every n-th layer is a full one."""
    pattern = metadata.values.get(key)
    if type(pattern) is int and pattern > 0:
        pattern = [(i + 1) % pattern != 0 for i in range(layers)]
    if not isinstance(pattern, list) or len(pattern) != layers or not all(isinstance(flag, bool) for flag in pattern):
        raise metadata.wrong(key, f"a flag for each of {layers} layers")
    return [SLIDING if flag else FULL for flag in pattern]


def same_of_layers(metadata: Metadata, key: str, layers: int) -> int:
    """Returns the number that is the same for all layers."""
    values = metadata.of_layers(key, layers)
    if len(set(values)) != 1:
        raise metadata.wrong(key, "one number for all layers")
    return values[0]
