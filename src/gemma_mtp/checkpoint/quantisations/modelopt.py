"""NVIDIA's ModelOpt: NVFP4 and FP8.

Layouts as in nvidia-modelopt 0.47.0: torch/quantization/qtensor/nvfp4_tensor.py and torch/export.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gemma_mtp.checkpoint.derived import Part
from gemma_mtp.checkpoint.quantisations.base import Quantised, Reading
from gemma_mtp.checkpoint.quantisations.bits import fp4, grouped

CONFIG = {
    "quant_method": None, "quant_algo": ("NVFP4", "FP8", "MIXED_PRECISION"), "config_groups": None, "ignore": None,
    "producer": None, "kv_cache_scheme": None, "kv_cache_quant_algo": None, "group_size": (16,),
    "exclude_modules": None, "quantized_layers": None,
}  # fmt: skip
GROUP = 16
ACTIVATIONS = ("input_scale", "k_scale", "v_scale", "k_proj.k_scale", "v_proj.v_scale", "output_scale")


def read(checkpoint: Quantised) -> Reading:
    """The reader. Raises QuantisationError for what is not known."""
    config = checkpoint.config
    checkpoint.only(config, CONFIG)
    reading = Reading()
    for name, scale in checkpoint.named("_scale"):
        weight = checkpoint.stored.get(name)
        if weight is not None and weight.dtype == "U8":
            _read_nvfp4(checkpoint, name, reading)
        elif weight is not None and weight.dtype == "F8_E4M3":
            checkpoint.fitting(scale, ("F32",), (), (1,))
            reading.tensors[name] = checkpoint.fp8_matrix(weight, scale, _fp8, checkpoint.dtype)
            reading.used |= {name, scale.name}
            reading.kinds["FP8 with a scale for each tensor"] += 1
    activations = {f"{name}.{end}" for end in ACTIVATIONS for name, _ in checkpoint.named(f".{end}")}
    if activations:
        reading.notes.append("its own tools round activations too, by stored scales; here they stay as they are.")
    if config.get("kv_cache_scheme") or config.get("kv_cache_quant_algo"):
        reading.notes.append("it says how to quantise keys and values, which is not followed: they are kept as always.")
    reading.used |= activations
    return reading


def _read_nvfp4(checkpoint: Quantised, name: str, reading: Reading) -> None:
    packed = checkpoint.stored[name]
    if len(packed.shape) < 2 or not all(packed.shape) or 2 * packed.shape[-1] % GROUP:
        raise checkpoint.refused(f"{name} of {list(packed.shape)}")
    *leading, halves = packed.shape
    scale = checkpoint.beside(f"{name}_scale", packed, ("F8_E4M3",), (*leading, 2 * halves // GROUP))
    whole = checkpoint.beside(f"{name}_scale_2", packed, ("F32",), (), (1,))
    parts = [Part(packed), Part(scale), Part(whole, 0)]
    reading.tensors[name] = checkpoint.matrix(name, (*leading, 2 * halves), parts, _nvfp4, checkpoint.dtype)
    reading.used |= {part.tensor.name for part in parts}
    reading.kinds["NVFP4"] += 1


def _nvfp4(parts: Sequence[Tensor], rows: range) -> Tensor:
    packed, scale, whole = parts
    return grouped(fp4(packed, 2 * packed.shape[-1]), scale.float() * whole)


def _fp8(parts: Sequence[Tensor], rows: range) -> Tensor:
    weight, scale = parts
    return weight.float() * scale
