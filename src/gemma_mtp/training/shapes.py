"""The configuration of a new drafter, and how weights are initialised."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from gemma_mtp.config import DrafterConfig, TargetConfig, TextConfig
from gemma_mtp.config.presets import drafter_stack
from gemma_mtp.model.drafter import Drafter
from gemma_mtp.model.layers import Attention, DecoderLayer
from gemma_mtp.model.target import Target
from gemma_mtp.weights.matrix import Embedding, Linear


@dataclass(frozen=True)
class DrafterShape:
    """Sizes of a new drafter; None: as the official drafters of targets of that size have them. `centroids` clusters
    make a centroid head, of which the best `centroid_top_k` are scored."""

    hidden: int | None = None
    intermediate: int | None = None
    heads: int | None = None
    layers: int = 4
    centroids: int | None = None
    centroid_top_k: int = 32


def new_drafter_config(target: TargetConfig, shape: DrafterShape = DrafterShape()) -> DrafterConfig:
    """A drafter of the official shape, sliding layers and a full one last without KV of their own, for this target.

    Raises ConfigError where the sizes do not work.
    """
    text = target.text
    hidden = shape.hidden or _official_hidden(text.hidden_size)
    unified = "unified" in target.model_type
    intermediate, heads = shape.intermediate or _wide(hidden), shape.heads or _official_heads(text)
    stack = drafter_stack(text, hidden, intermediate, heads, shape.layers, unified)
    return DrafterConfig(
        stack, text.hidden_size, use_ordered_embeddings=shape.centroids is not None,
        num_centroids=shape.centroids or 2048, centroid_intermediate_top_k=shape.centroid_top_k,
        model_type="gemma4_unified_assistant" if unified else "gemma4_assistant",
    )  # fmt: skip


def _official_hidden(backbone: int) -> int:
    """256 beside 1536 and 2560, 1024 beside more; smaller targets than any official one get half of their own size."""
    return min(256, backbone // 2) if backbone <= 2560 else 1024


def _wide(hidden: int) -> int:
    return (8 if hidden >= 256 else 4) * hidden


def _official_heads(target: TextConfig) -> int:
    """Half of the target's 8 heads beside the small targets, as many as the target has beside the others."""
    return target.num_attention_heads // 2 if target.num_attention_heads == 8 else target.num_attention_heads


def initialise(model: Target | Drafter, seed: int) -> None:
    """Seeded random weights under which every branch starts small and attention starts soft.

    Attention has scale 1, so the per-head norms begin at head_dim ** -0.25; each branch ends in a norm of its own,
    whose weight begins near (2 * layers) ** -0.5, so that the residual stream stays near 1.
    """
    generator = torch.Generator().manual_seed(seed)
    branch = (2 * len(model.layers)) ** -0.5
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Linear | Embedding):
                module.weight.normal_(0.0, module.weight.shape[1] ** -0.5, generator=generator)
        for layer in model.layers:
            assert isinstance(layer, DecoderLayer)
            for name, parameter in layer.named_parameters():
                if name.startswith("post_") or ".post_" in name:
                    parameter.fill_(branch)
            _soften(layer.self_attn)
        if isinstance(model, Target) and model.config.hidden_size_per_layer_input:
            P = model.config.hidden_size_per_layer_input
            model.embed_tokens_per_layer.weight.normal_(0.0, P**-0.5, generator=generator)


def _soften(attention: Attention) -> None:
    scale = math.sqrt(math.sqrt(1 / attention.head_dim))
    attention.q_norm.weight.fill_(scale)
    if attention.k_norm is not None:
        attention.k_norm.weight.fill_(scale)
