"""The configurations of the two kinds of checkpoints: targets and drafters."""

from __future__ import annotations

from dataclasses import dataclass

from gemma_mtp.config.text import TextConfig
from gemma_mtp.errors import ConfigError


@dataclass(frozen=True)
class TargetConfig:
    """A target checkpoint: its text stack and the Hugging Face model_type it is stored as."""

    text: TextConfig
    model_type: str = "gemma4_text"

    def __post_init__(self) -> None:
        _check_target_config(self)


@dataclass(frozen=True)
class DrafterConfig:
    """A drafter checkpoint ("assistant" in Hugging Face naming)."""

    text: TextConfig
    backbone_hidden_size: int
    use_ordered_embeddings: bool = False
    num_centroids: int = 2048
    centroid_intermediate_top_k: int = 32
    model_type: str = "gemma4_assistant"

    def __post_init__(self) -> None:
        _check_drafter_config(self)


def _check_target_config(c: TargetConfig) -> None:
    text = c.text
    if text.first_kv_shared_layer == 0:
        raise ConfigError(f"config.json has num_kv_shared_layers = {text.num_kv_shared_layers}, but a target needs"
                          " layers with keys and values of their own: fewer than num_hidden_layers ="
                          f" {text.num_hidden_layers} were expected.")  # fmt: skip
    if text.hidden_size_per_layer_input and text.vocab_size_per_layer_input < text.vocab_size:
        raise ConfigError(f"config.json has vocab_size_per_layer_input = {text.vocab_size_per_layer_input}, but every"
                          f" token needs a per-layer embedding: vocab_size = {text.vocab_size} or more was expected;"
                          " restore the one that is wrong.")  # fmt: skip


def _check_drafter_config(c: DrafterConfig) -> None:
    if c.text.first_kv_shared_layer != 0:
        raise ConfigError("the drafter's layers must all be KV-shared: num_kv_shared_layers must equal"
                          f" num_hidden_layers = {c.text.num_hidden_layers}.")  # fmt: skip
    if c.text.hidden_size_per_layer_input or c.text.enable_moe_block or c.text.use_double_wide_mlp:
        raise ConfigError("the drafter's config.json must have hidden_size_per_layer_input 0, and enable_moe_block and"
                          " use_double_wide_mlp false.")  # fmt: skip
    if c.backbone_hidden_size < 1:
        raise ConfigError(
            f"config.json has backbone_hidden_size = {c.backbone_hidden_size}; expected a positive number."
        )
    if c.use_ordered_embeddings:
        if c.num_centroids < 1 or c.text.vocab_size % c.num_centroids:
            raise ConfigError(f"config.json has num_centroids = {c.num_centroids}, which does not divide vocab_size ="
                              f" {c.text.vocab_size}.")  # fmt: skip
        if not 1 <= c.centroid_intermediate_top_k <= c.num_centroids:
            raise ConfigError(f"config.json has centroid_intermediate_top_k = {c.centroid_intermediate_top_k}; expected"
                              f" 1 to num_centroids = {c.num_centroids}.")  # fmt: skip
