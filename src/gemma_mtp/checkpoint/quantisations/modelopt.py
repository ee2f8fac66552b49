"""NVIDIA's ModelOpt: NVFP4, MXFP4, MXFP8, FP8 and int8.

Layouts as in nvidia-modelopt 0.47.0: torch/quantization/qtensor/nvfp4_tensor.py and torch/export. How a matrix is
stored is read off its tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from torch import Tensor

from gemma_mtp.checkpoint.derived import Part
from gemma_mtp.checkpoint.quantisations.base import Quantised, Reading
from gemma_mtp.checkpoint.quantisations.bits import for_rows, fp4, grouped, in_blocks
from gemma_mtp.checkpoint.quantisations.fp8 import block_of
from gemma_mtp.checkpoint.quantisations.records import ACTIVATIONS, ROUNDS_ACTIVATIONS, ROUNDS_KEYS
from gemma_mtp.files.headers import StoredTensor

ALGORITHMS = ("NVFP4", "W4A16_NVFP4", "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "fp8_pb_wo", "MXFP8", "mxfp4", "W8A16",
              "MIXED_PRECISION")  # fmt: skip
#: those whose activations are rounded by scales that are not stored
DYNAMIC = ("FP8_PER_CHANNEL_PER_TOKEN", "MXFP8", "mxfp4")
CONFIG = {
    "quant_method": None, "quant_algo": ALGORITHMS, "config_groups": None, "ignore": None, "producer": None,
    "kv_cache_scheme": None, "kv_cache_quant_algo": None, "group_size": (16, 32), "exclude_modules": None,
    "quantized_layers": None,
}  # fmt: skip
GROUP = 16
#: rows and columns that share a scale of FP8
BLOCK = 128, 128
#: what inputs of a matrix are multiplied by before it, which no model here does
SMOOTHED = ".pre_quant_scale"


def read(checkpoint: Quantised) -> Reading:
    """The reader. Raises QuantisationError for what is not known."""
    config = checkpoint.config
    checkpoint.only(config, CONFIG)
    smoothed = next((name for name in checkpoint.stored if name.endswith(SMOOTHED)), None)
    if smoothed is not None:
        raise checkpoint.refused(f"scales of inputs ({smoothed})")
    reading = Reading()
    for name, scale in checkpoint.named("_scale"):
        weight = checkpoint.stored.get(name)
        if weight is None or weight.dtype not in ("U8", "F8_E4M3", "I8"):
            continue
        if not all(weight.shape) or len(weight.shape) < 2:
            raise checkpoint.refused(f"{name} of {list(weight.shape)}")
        if scale.dtype == "U8" and weight.dtype != "I8":
            bits = 4 if weight.dtype == "U8" else 8
            reading.tensors[name] = checkpoint.mx_matrix(name, weight, bits)
            reading.used |= {name, scale.name}
            reading.kinds[f"MXFP{bits}"] += 1
        elif weight.dtype == "U8":
            _read_nvfp4(checkpoint, name, reading)
        else:
            _read_8_bits(checkpoint, weight, scale, reading)
    activations = checkpoint.of_modules(ACTIVATIONS)
    if activations:
        reading.notes.append("its own tools round activations too, by stored scales; here they stay as they are.")
    elif config.get("quant_algo") in DYNAMIC:
        reading.notes.append(ROUNDS_ACTIVATIONS)
    if config.get("kv_cache_scheme") or config.get("kv_cache_quant_algo"):
        reading.notes.append(ROUNDS_KEYS)
    reading.used |= activations
    return reading


def _read_8_bits(checkpoint: Quantised, weight: StoredTensor, scale: StoredTensor, reading: Reading) -> None:
    """FP8 or int8 with a scale for all, for each row, or, of FP8, for each block, as [blocks, 1, blocks, 1]."""
    checkpoint.fitting(scale, ("F32",))
    fp8 = weight.dtype == "F8_E4M3"
    whole, by_row = scale.shape in ((), (1,)), scale.shape == weight.shape[:-1]
    if whole or by_row:
        if fp8:
            made = checkpoint.fp8_matrix(weight, scale, _by_row, checkpoint.dtype)
        else:
            parts = [Part(weight), Part(scale, int(not whole))]
            made = checkpoint.matrix(weight.name, weight.shape, parts, _by_row, checkpoint.dtype)
        reading.tensors[weight.name] = made
    elif fp8 and len(scale.shape) == 4 and len(weight.shape) == 2 and scale.shape[1::2] == (1, 1):
        block = block_of(checkpoint, weight, scale, scale.shape[::2], BLOCK)
        parts = [Part(weight), Part(scale, 0)]
        decode = functools.partial(_in_blocks, block)
        reading.tensors[weight.name] = checkpoint.matrix(weight.name, weight.shape, parts, decode, checkpoint.dtype)
    else:
        checkpoint.fitting(scale, ("F32",), (), (1,), weight.shape[:-1])
    reading.used |= {weight.name, scale.name}
    each = "tensor" if whole else "row" if by_row else "block"
    reading.kinds[f"{'FP8' if fp8 else '8 bits'} with a scale for each {each}"] += 1


def _read_nvfp4(checkpoint: Quantised, name: str, reading: Reading) -> None:
    packed = checkpoint.stored[name]
    if 2 * packed.shape[-1] % GROUP:
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


def _by_row(parts: Sequence[Tensor], rows: range) -> Tensor:
    weight, scale = parts
    return weight.float() * for_rows(scale, weight)


def _in_blocks(block: tuple[int, int], parts: Sequence[Tensor], rows: range) -> Tensor:
    weight, scale = parts
    return in_blocks(weight.float(), scale[:, 0, :, 0], block, rows.start)
