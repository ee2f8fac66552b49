"""Checkpoints: what they hold, loading and saving."""

from gemma_mtp.checkpoint.load import (
    SCALES,
    Contents,
    check_headers,
    load_drafter,
    load_target,
    read_config,
    read_contents,
    read_drafter_config,
    read_generation_config,
    read_target_config,
    read_weight_types,
    report,
    save_drafter,
    save_target,
    stored_dtypes,
    stored_tensors,
    text_headers,
)
from gemma_mtp.checkpoint.safetensors import read_headers
from gemma_mtp.config import TargetConfig
from gemma_mtp.config.generation import GenerationDefaults

__all__ = [
    "SCALES",
    "Contents",
    "GenerationDefaults",
    "TargetConfig",
    "check_headers",
    "load_drafter",
    "load_target",
    "read_config",
    "read_contents",
    "read_drafter_config",
    "read_generation_config",
    "read_headers",
    "read_target_config",
    "read_weight_types",
    "report",
    "save_drafter",
    "save_target",
    "stored_dtypes",
    "stored_tensors",
    "text_headers",
]
