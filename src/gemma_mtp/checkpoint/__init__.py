"""Checkpoints of targets and drafters: what they hold, loading and saving, whatever format they are stored in."""

from gemma_mtp.checkpoint.derived import rounded_products
from gemma_mtp.checkpoint.kept import kinds_of
from gemma_mtp.checkpoint.load import held_bytes, load_drafter, load_target
from gemma_mtp.checkpoint.open import open_source
from gemma_mtp.checkpoint.read import (
    check_headers,
    empty_model,
    read_config,
    read_contents,
    read_drafter_config,
    read_generation_config,
    read_headers,
    read_target_config,
    read_weight_types,
    report,
    stored_dtypes,
    text_headers,
)
from gemma_mtp.checkpoint.safetensors import SINGLE_FILE
from gemma_mtp.checkpoint.save import save_drafter, save_target
from gemma_mtp.checkpoint.source import Location, Source
from gemma_mtp.checkpoint.tensors import stored_tensors
from gemma_mtp.files.headers import StoredTensor
from gemma_mtp.weights.base import SCALES

__all__ = [
    "SCALES",
    "SINGLE_FILE",
    "Location",
    "Source",
    "StoredTensor",
    "check_headers",
    "empty_model",
    "held_bytes",
    "kinds_of",
    "load_drafter",
    "load_target",
    "open_source",
    "read_config",
    "read_contents",
    "read_drafter_config",
    "read_generation_config",
    "read_headers",
    "read_target_config",
    "read_weight_types",
    "report",
    "rounded_products",
    "save_drafter",
    "save_target",
    "stored_dtypes",
    "stored_tensors",
    "text_headers",
]
