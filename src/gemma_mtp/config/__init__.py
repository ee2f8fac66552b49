"""Model configurations: of targets and drafters, read from and written to Hugging Face's JSON, and presets."""

from gemma_mtp.config.models import DrafterConfig, TargetConfig
from gemma_mtp.config.parse import parse_drafter_config, parse_target_config
from gemma_mtp.config.presets import PRESETS
from gemma_mtp.config.rope import RopeConfig
from gemma_mtp.config.text import FULL, LAYER_TYPES, SLIDING, LayerType, TextConfig
from gemma_mtp.config.write import config_to_hf, drafter_config_to_hf, target_config_to_hf
from gemma_mtp.families.base import LayerOptions

__all__ = [
    "FULL",
    "LAYER_TYPES",
    "PRESETS",
    "SLIDING",
    "DrafterConfig",
    "LayerOptions",
    "LayerType",
    "RopeConfig",
    "TargetConfig",
    "TextConfig",
    "config_to_hf",
    "drafter_config_to_hf",
    "parse_drafter_config",
    "parse_target_config",
    "target_config_to_hf",
]
