"""Gemma 4 (transformers 5.22.2, models/gemma4 and gemma4_unified): the skeleton itself, so a table of names only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gemma_mtp.families.base import Family


def _defaults(model_type: str) -> Mapping[str, Any]:
    """A unified model has no per-layer embeddings, and another default context."""
    unified = "unified" in model_type
    return {
        "head_dim": 256,
        "global_head_dim": 512,
        "hidden_size_per_layer_input": 0 if unified else 256,
        "max_position_embeddings": 262144 if unified else 131072,
    }


GEMMA4 = Family(
    name="Gemma 4",
    targets={
        "gemma4": "text_config",
        "gemma4_unified": "text_config",
        "gemma4_text": None,
        "gemma4_unified_text": None,
    },
    drafters=("gemma4_assistant", "gemma4_unified_assistant"),
    text_model_type="gemma4_text",
    defaults=_defaults,
    architectures={
        "gemma4": "Gemma4ForConditionalGeneration",
        "gemma4_unified": "Gemma4UnifiedForConditionalGeneration",
        "gemma4_text": "Gemma4ForCausalLM",
        "gemma4_unified_text": "Gemma4UnifiedForCausalLM",
        "gemma4_assistant": "Gemma4AssistantForCausalLM",
        "gemma4_unified_assistant": "Gemma4UnifiedAssistantForCausalLM",
    },
)
