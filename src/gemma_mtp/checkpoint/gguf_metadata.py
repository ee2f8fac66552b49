"""Metadata of a GGUF file by key, held to be of the kind that is asked for, and what all architectures say in it."""

from __future__ import annotations

import array
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from gemma_mtp.config import FULL, SLIDING
from gemma_mtp.errors import CheckpointError, ConfigError
from gemma_mtp.files.headers import StoredTensor


class Metadata:
    """The metadata of one file; `path` is for messages. Every method raises ConfigError naming the key."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path, self.values = path, values

    def text(self, key: str, default: str | None = None) -> str:
        value = self.values.get(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, "a text")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key, default)
        if type(value) is not int:
            raise self.wrong(key, "a whole number")
        return value

    def integer_or_none(self, key: str) -> int | None:
        return self.integer(key) if key in self.values else None

    def real(self, key: str, default: float | None = None) -> float:
        """Returns the shortest number that is the same in float32, in which files have it: 1e-06, not 9.99e-07."""
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.wrong(key, "a number")
        return float(str(np.float32(value)))

    def of_layers(self, key: str, layers: int) -> list[int]:
        """Returns one number for each layer, of as many or of one for all."""
        value = self.values.get(key)
        if type(value) is int:
            return [value] * layers
        if not _whole_numbers(value) or len(value) != layers:
            raise self.wrong(key, f"a whole number, or one for each of {layers} layers")
        return list(value)

    def integers(self, key: str) -> list[int]:
        """Returns a list of whole numbers; none where there is no such key."""
        value = self.values.get(key, array.array("i"))
        if not _whole_numbers(value):
            raise self.wrong(key, "whole numbers")
        return list(value)

    def same_of_layers(self, key: str, layers: int) -> int:
        """Returns the number that is the same for all layers."""
        values = self.of_layers(key, layers)
        if len(set(values)) != 1:
            raise self.wrong(key, "one number for all layers")
        return values[0]

    def layer_types(self, key: str, layers: int) -> list[str]:
        """Of a flag for each layer; of a number n, every n-th layer is a full one."""
        pattern = self.values.get(key)
        if type(pattern) is int and pattern > 0:
            pattern = [(i + 1) % pattern != 0 for i in range(layers)]
        flags = isinstance(pattern, list) and all(isinstance(flag, bool) for flag in pattern)
        if not isinstance(pattern, list) or not flags or len(pattern) != layers:
            raise self.wrong(key, f"a flag for each of {layers} layers")
        return [SLIDING if flag else FULL for flag in pattern]

    def wrong(self, key: str, expected: str) -> ConfigError:
        value = self.values.get(key)
        if value is None:
            return ConfigError(f"{self.path} has no {key!r} in its metadata; convert the model again.")
        shown = repr(value) if len(repr(value)) < 80 else f"{repr(value)[:77]}..."
        return ConfigError(f"{self.path} has {key} = {shown}, but {expected} was expected; convert the model again.")


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


def _whole_numbers(value: Any) -> TypeGuard[array.array[int]]:
    return isinstance(value, array.array) and value.typecode not in "fd"
