"""MLX: packed integers with scales and biases (affine, 2 to 8 bits), MXFP4, MXFP8 and NVFP4.

Layouts as mlx.core.quantize of MLX 0.32.4 writes them. How a module is packed stands in the configuration: under its
path, or for all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gemma_mtp.checkpoint.derived import Part, derived
from gemma_mtp.checkpoint.experts import PRODUCTS
from gemma_mtp.checkpoint.quantisations.base import Quantised, Reading
from gemma_mtp.checkpoint.quantisations.bits import e4m3, e8m0, fp4, grouped, unpacked
from gemma_mtp.checkpoint.source import FLOAT_DTYPES

FIELDS = {"group_size": (16, 32, 64, 128), "bits": (2, 3, 4, 5, 6, 8), "mode": ("affine", "mxfp4", "mxfp8", "nvfp4")}
#: bits and columns of a group of the modes that leave no choice
FLOATS = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}
#: where mlx-lm keeps a layer's experts: each part of a product for all of them
SWITCH = "switch_glu"


def read(checkpoint: Quantised) -> Reading:
    """The reader. Raises QuantisationError for what is not known."""
    config = checkpoint.config
    modules = {module for module, _ in checkpoint.named(".scales")}
    general = {name: value for name, value in config.items() if not isinstance(value, dict | bool)}
    checkpoint.only(general, FIELDS)
    reading = Reading()
    for module in sorted(modules):
        own = config.get(module, {})
        if own is False:
            raise checkpoint.refused(f"{module}.scales, but {module} set to false,")
        if not isinstance(own, dict):
            own = {}
        checkpoint.only(own, FIELDS, f"{module}.")
        _read(checkpoint, module, {**general, **own}, reading)
    _join_experts(checkpoint, reading)
    return reading


def _join_experts(checkpoint: Quantised, reading: Reading) -> None:
    """Experts under the names that checkpoints have, gates before the rest of the same product."""
    ends = tuple(f".{SWITCH}.{parts[0]}.weight" for parts in PRODUCTS.values())
    for first in [name for name in reading.tensors if name.endswith(ends)]:
        layer, _, part = first.removesuffix(".weight").rpartition(f".{SWITCH}.")
        official, parts = next((name, parts) for name, parts in PRODUCTS.items() if parts[0] == part)
        found = [reading.tensors.pop(f"{layer}.{SWITCH}.{name}.weight", None) for name in parts]
        matrices = [tensor for tensor in found if tensor is not None and len(tensor.shape) == 3]
        if len({tensor.shape for tensor in matrices}) != 1 or len(matrices) < len(parts):
            raise checkpoint.refused(f"experts in {layer}.{SWITCH} of different shapes, or not all of them")
        experts, rows, columns = matrices[0].shape
        name, shape = f"{layer}.{official}", (experts, rows * len(parts), columns)
        reading.tensors[name] = derived(name, shape, matrices[0].dtype, [Part(one) for one in matrices], _stacked)


def _stacked(parts: Sequence[Tensor], rows: range) -> Tensor:
    return torch.cat(list(parts), 1)


def _read(checkpoint: Quantised, module: str, how: Mapping[str, Any], reading: Reading) -> None:
    mode = how.get("mode") or "affine"
    default = FLOATS.get(mode, (4, 64))
    bits, group = how.get("bits") or default[0], how.get("group_size") or default[1]
    if mode in FLOATS and (bits, group) != FLOATS[mode]:
        raise checkpoint.refused(f"mode {mode} with {bits} bits in groups of {group}")
    if f"{module}.global_scale" in checkpoint.stored:
        raise checkpoint.refused(f"{module}.global_scale")
    scales = checkpoint.stored[f"{module}.scales"]
    if len(scales.shape) < 2 or not all(scales.shape):
        raise checkpoint.refused(f"{scales.name} of {list(scales.shape)}")
    columns = scales.shape[-1] * group
    name = f"{module}.weight"
    packed = checkpoint.beside(name, scales, ("U32",), (*scales.shape[:-1], columns * bits // 32))
    parts = [Part(packed), Part(scales)]
    if mode == "affine":
        checkpoint.fitting(scales, tuple(FLOAT_DTYPES))
        parts.append(Part(checkpoint.beside(f"{module}.biases", packed, (scales.dtype,), scales.shape)))
        decode = functools.partial(_affine, bits, columns)
    else:
        checkpoint.fitting(scales, ("U8",))
        decode = functools.partial(_float, mode, columns)
    reading.tensors[name] = checkpoint.matrix(name, (*scales.shape[:-1], columns), parts, decode)
    reading.used |= {part.tensor.name for part in parts}
    reading.kinds[f"{bits} bits in groups of {group}" if mode == "affine" else mode.upper()] += 1


def _affine(bits: int, columns: int, parts: Sequence[Tensor], rows: range) -> Tensor:
    packed, scales, biases = parts
    values = grouped(unpacked(packed, bits, columns).float(), scales.float())
    return (values.unflatten(-1, (biases.shape[-1], -1)) + biases.float()[..., None]).flatten(-2)


def _float(mode: str, columns: int, parts: Sequence[Tensor], rows: range) -> Tensor:
    packed, scales = parts
    values = e4m3(unpacked(packed, 8, columns)) if mode == "mxfp8" else fp4(packed, columns)
    return grouped(values, e4m3(scales) if mode == "nvfp4" else e8m0(scales))
