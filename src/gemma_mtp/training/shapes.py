"""The bundled pair's two configurations and how their weights are initialised."""

from __future__ import annotations

import math

import torch

from gemma_mtp.config import FULL, SLIDING, DrafterConfig, LayerType, TargetConfig, TextConfig
from gemma_mtp.model.drafter import Drafter
from gemma_mtp.model.layers import Attention, DecoderLayer
from gemma_mtp.model.target import Target
from gemma_mtp.ops.linear import Embedding, Linear
from gemma_mtp.training import bpe

_TARGET_LAYERS: tuple[LayerType, ...] = ((SLIDING,) * 4 + (FULL,)) * 3
_DRAFTER_LAYERS: tuple[LayerType, ...] = (SLIDING,) * 3 + (FULL,)

#: E2B's shape at one hundredth of its size: KV sharing, double-wide MLP, per-layer embeddings, softcap.
BUNDLED_TARGET = TargetConfig(
    TextConfig(
        vocab_size=bpe.VOCAB_SIZE, hidden_size=256, intermediate_size=512, num_hidden_layers=15,
        num_attention_heads=4, num_key_value_heads=1, head_dim=64, global_head_dim=128, num_global_key_value_heads=1,
        layer_types=_TARGET_LAYERS, sliding_window=128, num_kv_shared_layers=5, use_double_wide_mlp=True,
        hidden_size_per_layer_input=32, vocab_size_per_layer_input=bpe.VOCAB_SIZE, final_logit_softcapping=30.0,
        max_position_embeddings=2048, eos_token_ids=(bpe.EOS, bpe.TURN_CLOSE),
    )
)  # fmt: skip


def drafter_for(target: TextConfig, hidden: int = 128, intermediate: int = 512, heads: int = 4) -> DrafterConfig:
    """The official drafter's shape, [S, S, S, F] without KV of its own, for this target."""
    text = TextConfig(
        vocab_size=target.vocab_size, hidden_size=hidden, intermediate_size=intermediate,
        num_hidden_layers=len(_DRAFTER_LAYERS), num_attention_heads=heads,
        num_key_value_heads=target.num_key_value_heads,
        num_global_key_value_heads=target.num_global_key_value_heads, head_dim=target.head_dim,
        global_head_dim=target.global_head_dim, layer_types=_DRAFTER_LAYERS, sliding_window=target.sliding_window,
        num_kv_shared_layers=len(_DRAFTER_LAYERS), attention_k_eq_v=target.attention_k_eq_v,
        max_position_embeddings=target.max_position_embeddings, sliding_rope=target.sliding_rope,
        full_rope=target.full_rope, eos_token_ids=target.eos_token_ids,
    )  # fmt: skip
    return DrafterConfig(text, target.hidden_size)


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
