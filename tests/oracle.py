"""Small random fp32 models built by transformers, one a family: the oracle for loading and for the models' math."""

from __future__ import annotations

from typing import Any, Final

import torch
from transformers import (
    Gemma4AssistantConfig,
    Gemma4AssistantForCausalLM,
    Gemma4AudioConfig,
    Gemma4Config,
    Gemma4ForCausalLM,
    Gemma4ForConditionalGeneration,
    Gemma4TextConfig,
    Gemma4UnifiedAssistantConfig,
    Gemma4UnifiedAssistantForCausalLM,
    Gemma4UnifiedConfig,
    Gemma4UnifiedForConditionalGeneration,
    Gemma4UnifiedTextConfig,
    Gemma4VisionConfig,
    PreTrainedModel,
)

VOCAB = 256
WINDOW = 16
S: Final = "sliding_attention"
F: Final = "full_attention"
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16,
    "global_head_dim": 32, "sliding_window": WINDOW, "final_logit_softcapping": 30.0, "max_position_embeddings": 512,
    "num_hidden_layers": 6, "layer_types": [S, S, S, S, S, F],
}  # fmt: skip
NO_PLE = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": VOCAB}
K_EQ_V = {"attention_k_eq_v": True, "num_key_value_heads": 4, "num_global_key_value_heads": 2}

#: text configurations, by the checkpoint whose features they have
FAMILIES: dict[str, dict[str, Any]] = {
    "e2b": {
        "num_hidden_layers": 10, "layer_types": [S, S, S, S, F] * 2, "num_key_value_heads": 1,
        "num_kv_shared_layers": 5, "use_double_wide_mlp": True, "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB,
    },
    "e4b": {
        "num_hidden_layers": 9, "layer_types": [S, S, F] * 3, "num_key_value_heads": 2, "num_kv_shared_layers": 3,
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB,
    },
    "12b": {**K_EQ_V},
    "26b": {
        **NO_PLE, **K_EQ_V, "enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 32,
    },
    "31b": {**NO_PLE, **K_EQ_V},
    "text": {**NO_PLE, "num_key_value_heads": 2},
}  # fmt: skip


def build_target(family: str, seed: int = 0) -> PreTrainedModel:
    """A random target; multimodal for all families but "text", as the official checkpoints are."""
    torch.manual_seed(seed)
    settings = {**COMMON, **FAMILIES[family]}
    if family == "12b":
        settings.pop("hidden_size_per_layer_input", None)
        text = Gemma4UnifiedTextConfig(**settings)
        model: PreTrainedModel = Gemma4UnifiedForConditionalGeneration(Gemma4UnifiedConfig(text_config=text))
    elif family == "text":
        model = Gemma4ForCausalLM(Gemma4TextConfig(**settings))
    else:
        vision = Gemma4VisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                                    num_key_value_heads=2, head_dim=8, position_embedding_size=32)  # fmt: skip
        audio = Gemma4AudioConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, output_proj_dims=16)
        text = Gemma4TextConfig(**settings)
        model = Gemma4ForConditionalGeneration(Gemma4Config(text_config=text, vision_config=vision, audio_config=audio))
    return randomise(model, seed)


def text_config(target: PreTrainedModel) -> Gemma4TextConfig:
    return target.config.get_text_config()


def build_drafter(family: str, centroids: bool = False, seed: int = 1) -> PreTrainedModel:
    """A random drafter of the official shape that fits `build_target(family)`."""
    torch.manual_seed(seed)
    settings = {
        **COMMON, **FAMILIES[family], **NO_PLE, "vocab_size_per_layer_input": 0, "hidden_size": 32,
        "intermediate_size": 48, "num_hidden_layers": 4, "num_kv_shared_layers": 4, "layer_types": [S, S, S, F],
        "final_logit_softcapping": None, "use_double_wide_mlp": False, "enable_moe_block": False,
    }  # fmt: skip
    rest = {
        "backbone_hidden_size": COMMON["hidden_size"], "use_ordered_embeddings": centroids, "num_centroids": 16,
        "centroid_intermediate_top_k": 4,
    }  # fmt: skip
    if family == "12b":
        for name in ("hidden_size_per_layer_input", "vocab_size_per_layer_input", "enable_moe_block"):
            settings.pop(name)
        text = Gemma4UnifiedTextConfig(**settings)
        drafter: PreTrainedModel = Gemma4UnifiedAssistantForCausalLM(
            Gemma4UnifiedAssistantConfig(text_config=text, **rest)
        )
    else:
        drafter = Gemma4AssistantForCausalLM(Gemma4AssistantConfig(text_config=Gemma4TextConfig(**settings), **rest))
    randomise(drafter, seed)
    if centroids:
        drafter.masked_embedding.token_ordering.copy_(torch.randperm(VOCAB))
    return drafter


def randomise(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Weights of a scale that spreads the logits; norms and layer scalars away from one, so that none is a no-op."""
    generator = torch.Generator().manual_seed(seed)
    named = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if n.endswith("layer_scalar"))]
    with torch.no_grad():
        for name, tensor in named:
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim <= 1:
                tensor.copy_(1 + 0.2 * noise)
            else:
                tensor.copy_(noise / tensor.shape[-1] ** 0.5 * (2.0 if "embed_tokens" in name else 1.0))
    return model.eval()
