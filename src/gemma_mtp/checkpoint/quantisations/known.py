"""The quantisations that are known, and how a checkpoint tells that it is in one."""

from __future__ import annotations

from gemma_mtp.checkpoint.quantisations import (
    auto_round,
    awq,
    bitsandbytes,
    compressed_tensors,
    fp8,
    gemma,
    gptq,
    mlx,
    modelopt,
)
from gemma_mtp.checkpoint.quantisations.base import Quantised, Reader
from gemma_mtp.checkpoint.source import Source
from gemma_mtp.json_files import read_json

FIELD = "quantization_config"
MLX = "MLX"  # has no quant_method
#: where older versions of ModelOpt wrote what they did
MODELOPT_FILE = "hf_quant_config.json"

#: readers by what config.json calls them (`quant_method`)
READERS: dict[str, Reader] = {
    "compressed-tensors": compressed_tensors.read,
    "bitsandbytes": bitsandbytes.read,
    "awq": awq.read,
    "gptq": gptq.read,
    "modelopt": modelopt.read,
    "auto-round": auto_round.read,
    "fp8": fp8.read,
    "gemma": gemma.read,
    MLX: mlx.read,
}


def found_in(source: Source) -> Quantised | None:
    """Returns what a checkpoint says of its quantisation, if it says so and there is a reader.

    Raises CheckpointError where config.json is missing or malformed.
    """
    config = source.config()
    if not isinstance(config, dict):
        return None  # the parser of configurations says so
    raw = config.get(FIELD)
    if isinstance(raw, dict) and raw.get("quant_method") is not None:
        method = raw["quant_method"]
        return Quantised(source, method, raw) if isinstance(method, str) and method in READERS else None
    if (source.path / MODELOPT_FILE).is_file():
        content = read_json(source.path / MODELOPT_FILE)
        inner = content.get("quantization") if isinstance(content, dict) else None
        return Quantised(source, "modelopt", inner) if isinstance(inner, dict) else None
    raw = config.get("quantization", raw)
    if isinstance(raw, dict) and any(name.endswith(".scales") for name in source.tensors()):
        return Quantised(source, MLX, raw)
    return None
