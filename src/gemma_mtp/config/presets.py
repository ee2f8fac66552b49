"""The official checkpoints' geometries."""

from __future__ import annotations

from typing import Any

from gemma_mtp.config.models import DrafterConfig, TargetConfig
from gemma_mtp.config.text import FULL, SLIDING, LayerType, TextConfig


def _layer_pattern(sliding: int, repeats: int) -> tuple[LayerType, ...]:
    return ((SLIDING,) * sliding + (FULL,)) * repeats


def _official_target(hidden: int, intermediate: int, pattern: tuple[int, int], heads: int, kv: tuple[int, int],
                     window: int, context: int, **rest: Any) -> TextConfig:  # fmt: skip
    types = _layer_pattern(*pattern)
    return TextConfig(
        vocab_size=262144, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=len(types),
        num_attention_heads=heads, num_key_value_heads=kv[0], num_global_key_value_heads=kv[1], head_dim=256,
        global_head_dim=512, layer_types=types, sliding_window=window, final_logit_softcapping=30.0,
        max_position_embeddings=context, eos_token_ids=(1, 106, 50), **rest,
    )  # fmt: skip


def drafter_stack(
    target: TextConfig, hidden: int, intermediate: int, heads: int, layers: int, unified: bool
) -> TextConfig:
    """Returns the layers of a drafter of the official shape: sliding ones and a full one last, without KV of their
    own."""
    types = _layer_pattern(layers - 1, 1)
    return TextConfig(
        vocab_size=target.vocab_size, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=len(types),
        num_attention_heads=heads, num_key_value_heads=target.num_key_value_heads,
        num_global_key_value_heads=target.num_global_key_value_heads, head_dim=target.head_dim,
        global_head_dim=target.global_head_dim, layer_types=types, sliding_window=target.sliding_window,
        num_kv_shared_layers=len(types), attention_k_eq_v=target.attention_k_eq_v,
        max_position_embeddings=target.max_position_embeddings, sliding_rope=target.sliding_rope,
        full_rope=target.full_rope, eos_token_ids=target.eos_token_ids,
        model_type="gemma4_unified_text" if unified else "gemma4_text",
    )  # fmt: skip


def _official_drafter(target: TextConfig, hidden: int, heads: int, ordered: bool, model_type: str) -> DrafterConfig:
    text = drafter_stack(target, hidden, 8 * hidden, heads, 4, "unified" in model_type)
    return DrafterConfig(text, target.hidden_size, use_ordered_embeddings=ordered, model_type=model_type)


_PLE = {"hidden_size_per_layer_input": 256, "vocab_size_per_layer_input": 262144}
_MOE = {"enable_moe_block": True, "num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704}
_E2B = _official_target(1536, 6144, (4, 7), 8, (1, 1), 512, 131072, num_kv_shared_layers=20, use_double_wide_mlp=True,
                        **_PLE)  # fmt: skip
_E4B = _official_target(2560, 10240, (5, 7), 8, (2, 2), 512, 131072, num_kv_shared_layers=18, **_PLE)
_12B = _official_target(3840, 15360, (5, 8), 16, (8, 1), 1024, 262144, attention_k_eq_v=True,
                        model_type="gemma4_unified_text")  # fmt: skip
_26B = _official_target(2816, 2112, (5, 5), 16, (8, 2), 1024, 262144, attention_k_eq_v=True, **_MOE)
_31B = _official_target(5376, 21504, (5, 10), 32, (16, 4), 1024, 262144, attention_k_eq_v=True)

#: The ten official checkpoints' geometries (five targets, five drafters), by the name used on the hub.
PRESETS: dict[str, TargetConfig | DrafterConfig] = {
    "gemma-4-E2B-it": TargetConfig(_E2B, "gemma4"),
    "gemma-4-E4B-it": TargetConfig(_E4B, "gemma4"),
    "gemma-4-12B-it": TargetConfig(_12B, "gemma4_unified"),
    "gemma-4-26B-A4B-it": TargetConfig(_26B, "gemma4"),
    "gemma-4-31B-it": TargetConfig(_31B, "gemma4"),
    "gemma-4-E2B-it-assistant": _official_drafter(_E2B, 256, 4, True, "gemma4_assistant"),
    "gemma-4-E4B-it-assistant": _official_drafter(_E4B, 256, 4, True, "gemma4_assistant"),
    "gemma-4-12B-it-assistant": _official_drafter(_12B, 1024, 16, False, "gemma4_unified_assistant"),
    "gemma-4-26B-A4B-it-assistant": _official_drafter(_26B, 1024, 16, False, "gemma4_assistant"),
    "gemma-4-31B-it-assistant": _official_drafter(_31B, 1024, 32, False, "gemma4_assistant"),
}
