"""The configuration of a stack of decoder layers: a target's own, and the one inside a drafter.

Field names are Hugging Face's, so that a reader of either finds the other.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Literal, get_args

from gemma_mtp.config.rope import DEFAULT_ROPES, RopeConfig
from gemma_mtp.config.values import check_range
from gemma_mtp.errors import ConfigError
from gemma_mtp.families.base import LayerOptions

LayerType = Literal["sliding_attention", "full_attention"]
LAYER_TYPES: tuple[LayerType, ...] = get_args(LayerType)
SLIDING: LayerType = "sliding_attention"
FULL: LayerType = "full_attention"


#: what float32 computes with: beyond, numbers vanish beside others, become infinite, or are all the same
RANGES = {"rms_norm_eps": (1e-30, 1.0), "final_logit_softcapping": (1.0, 1000.0)}


@dataclass(frozen=True)
class TextConfig:
    """A stack of decoder layers. All sizes are counts of elements.

    `global_head_dim` and `num_global_key_value_heads` are those of full-attention layers, resolved on load.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    global_head_dim: int
    num_global_key_value_heads: int
    layer_types: tuple[LayerType, ...]
    sliding_window: int
    num_kv_shared_layers: int = 0
    use_double_wide_mlp: bool = False
    attention_k_eq_v: bool = False
    hidden_size_per_layer_input: int = 0
    vocab_size_per_layer_input: int = 0
    enable_moe_block: bool = False
    num_experts: int = 0
    top_k_experts: int = 0
    moe_intermediate_size: int = 0
    final_logit_softcapping: float | None = None
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 131072
    sliding_rope: RopeConfig = DEFAULT_ROPES[SLIDING]
    full_rope: RopeConfig = DEFAULT_ROPES[FULL]
    options: LayerOptions = field(default_factory=LayerOptions)
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 2
    eos_token_ids: tuple[int, ...] = (1,)
    model_type: str = "gemma4_text"

    def __post_init__(self) -> None:
        _check_text_config(self)

    @property
    def first_kv_shared_layer(self) -> int:
        """Index of the first layer that has no keys and values of its own."""
        return self.num_hidden_layers - self.num_kv_shared_layers

    def is_sliding(self, layer: int) -> bool:
        return self.layer_types[layer] == SLIDING

    def is_kv_shared(self, layer: int) -> bool:
        return layer >= self.first_kv_shared_layer

    def layer_head_dim(self, layer: int) -> int:
        return self.head_dim if self.is_sliding(layer) else self.global_head_dim

    def layer_kv_heads(self, layer: int) -> int:
        return self.num_key_value_heads if self.is_sliding(layer) else self.num_global_key_value_heads

    def layer_intermediate_size(self, layer: int) -> int:
        """Width of a layer's MLP: doubled on KV-shared layers of models that say so (E2B)."""
        doubled = self.use_double_wide_mlp and self.first_kv_shared_layer > 0 and self.is_kv_shared(layer)
        return self.intermediate_size * (2 if doubled else 1)

    def key_is_value(self, layer: int) -> bool:
        """Whether the layer's value is its unnormalised key projection (no v_proj tensor)."""
        return self.attention_k_eq_v and not self.is_sliding(layer)

    def rope(self, layer_type: LayerType) -> RopeConfig:
        return self.sliding_rope if layer_type == SLIDING else self.full_rope

    @functools.cached_property  # asked for at every call of the drafter
    def donor_layers(self) -> dict[LayerType, int]:
        """The last layer of each type with its own KV; KV-shared layers and the drafter read its cache."""
        return {kind: i for i, kind in enumerate(self.layer_types[: self.first_kv_shared_layer])}

    def kv_layer(self, layer: int) -> int:
        """Index of the layer whose cached keys and values `layer` reads."""
        return self.donor_layers[self.layer_types[layer]] if self.is_kv_shared(layer) else layer


def _check_text_config(c: TextConfig) -> None:
    positive = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "head_dim", "global_head_dim", "num_global_key_value_heads", "sliding_window",
                "max_position_embeddings")  # fmt: skip
    for name in positive:
        if getattr(c, name) < 1:
            raise ConfigError(f"config.json has {name} = {getattr(c, name)}, but a positive number was expected.")
    if c.hidden_size_per_layer_input < 0:
        raise ConfigError(f"config.json has hidden_size_per_layer_input = {c.hidden_size_per_layer_input}; expected 0"
                          " (none) or more.")  # fmt: skip
    for name in ("head_dim", "global_head_dim"):
        if getattr(c, name) % 2:
            raise ConfigError(f"config.json has {name} = {getattr(c, name)}, but an even number was expected: rotary"
                              " embeddings turn pairs.")  # fmt: skip
    for name, bounds in RANGES.items():
        if getattr(c, name) is not None:
            check_range(name, getattr(c, name), *bounds)
    for name in ("num_key_value_heads", "num_global_key_value_heads"):
        if c.num_attention_heads % getattr(c, name):
            raise ConfigError(f"config.json has {name} = {getattr(c, name)}, which does not divide num_attention_heads"
                              f" = {c.num_attention_heads}.")  # fmt: skip
    _check_kv_sharing(c)
    if c.enable_moe_block and not (0 < c.top_k_experts <= c.num_experts and c.moe_intermediate_size > 0):
        raise ConfigError(f"config.json has enable_moe_block true with num_experts = {c.num_experts}, top_k_experts ="
                          f" {c.top_k_experts} and moe_intermediate_size = {c.moe_intermediate_size}, but positive"
                          " numbers were expected, and top_k_experts of num_experts at most.")  # fmt: skip


def _check_kv_sharing(c: TextConfig) -> None:
    if not 0 <= c.num_kv_shared_layers <= c.num_hidden_layers:
        raise ConfigError(f"config.json has num_kv_shared_layers = {c.num_kv_shared_layers}, but it must lie between 0"
                          f" and num_hidden_layers = {c.num_hidden_layers}.")  # fmt: skip
    if 0 < c.first_kv_shared_layer < c.num_hidden_layers:
        missing = set(c.layer_types[c.first_kv_shared_layer :]) - set(c.donor_layers)
        if missing:
            raise ConfigError(f"config.json has num_kv_shared_layers = {c.num_kv_shared_layers}, which leaves no"
                              f" {missing.pop()} layer with keys and values for the others to read.")  # fmt: skip
