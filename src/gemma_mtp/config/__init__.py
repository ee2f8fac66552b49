"""Model configurations: the two dataclasses, their reading from and writing to Hugging Face's JSON, and presets."""

from gemma_mtp.config.parse import (
    DRAFTER_MODEL_TYPES,
    FULL,
    LAYER_TYPES,
    PRESETS,
    SLIDING,
    TARGET_MODEL_TYPES,
    DrafterConfig,
    LayerOptions,
    LayerType,
    TargetConfig,
    TextConfig,
    drafter_config_to_hf,
    full_layer_overrides,
    parse_drafter_config,
    parse_target_config,
    target_config_to_hf,
)
from gemma_mtp.config.rope import RopeConfig

__all__ = [
    "DRAFTER_MODEL_TYPES",
    "FULL",
    "LAYER_TYPES",
    "PRESETS",
    "SLIDING",
    "TARGET_MODEL_TYPES",
    "DrafterConfig",
    "LayerOptions",
    "LayerType",
    "RopeConfig",
    "TargetConfig",
    "TextConfig",
    "drafter_config_to_hf",
    "full_layer_overrides",
    "parse_drafter_config",
    "parse_target_config",
    "target_config_to_hf",
]
