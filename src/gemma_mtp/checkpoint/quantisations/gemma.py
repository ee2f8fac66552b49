"""Google's mobile QAT checkpoints (`-qat-mobile-transformers`): 2, 4 and 8 bits by rows, and tables by blocks.

Layout as transformers 5.24.0 reads `quant_method: "gemma"` (integrations/gemma_quant.py): whatever does not fit that is
refused. A linear layer has a static scale for the activations that go in, and one for those that come out.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gemma_mtp.checkpoint.derived import Decode, Part, with_activations
from gemma_mtp.checkpoint.quantisations.base import Quantised, Reading
from gemma_mtp.checkpoint.quantisations.bits import grouped, unpacked
from gemma_mtp.files.headers import StoredTensor
from gemma_mtp.weights.grouped import BLOCK, Grouped
from gemma_mtp.weights.int2 import Int2
from gemma_mtp.weights.int4 import Int4
from gemma_mtp.weights.int8 import Int8

CONFIG = {
    "quant_method": None, "num_bits": (2, 4, 8), "quantize_embeddings": (True, False), "module_quant_configs": None,
    "modules_to_not_convert": None,
}  # fmt: skip
ACTIVATIONS = ("input_activation_scale", "output_activation_scale")
#: of keys and values, which transformers does not use either
CACHE_SCALES = ("k_cache_scale", "v_cache_scale")
#: the formats that hold such numbers, by the name of rows of them (`Grouped.of_rows`): the smallest first
INTEGER_ROWS: dict[str, type[Grouped]] = {f"{form.format} rows": form for form in (Int2, Int4, Int8)}
#: bits of their numbers
BITS: dict[type[Grouped], int] = {Int2: 2, Int4: 4, Int8: 8}


def read(checkpoint: Quantised) -> Reading:
    """The reader. Raises QuantisationError for what is not known."""
    checkpoint.only(checkpoint.config, CONFIG)
    patterns = _patterns(checkpoint)
    reading = Reading()
    for module, scale in checkpoint.named(".weight_scale"):
        packed = checkpoint.beside(f"{module}.weight", scale, ("U8", "I8"))
        _read(checkpoint, module, packed, scale, _bits(checkpoint, patterns, module), reading)
    for module, scale in checkpoint.named(".embedding_scale"):
        packed = checkpoint.beside(f"{module}.embedding_quantized", scale, ("U8", "I8"))
        _read(checkpoint, module, packed, scale, _bits(checkpoint, patterns, module), reading)
    for module, scales in _activations(checkpoint).items():
        name = f"{module}.weight"
        if any(scales) and f"{name}_scale" not in reading.used:
            raise checkpoint.refused(f"scales of the activations of {module}, whose weights are not quantised,")
        if name in reading.tensors:
            reading.tensors[name] = with_activations(reading.tensors[name], scales)
    reading.used |= {
        f"{name}.{end}" for end in (*ACTIVATIONS, *CACHE_SCALES) for name, _ in checkpoint.named(f".{end}")
    }
    return reading


def _patterns(checkpoint: Quantised) -> dict[str, int]:
    """Bits by regular expressions of modules' names."""
    patterns = checkpoint.config.get("module_quant_configs") or {}
    if not isinstance(patterns, dict):
        raise checkpoint.refused(f"module_quant_configs {str(patterns)[:60]!r}")
    found: dict[str, int] = {}
    for pattern, own in patterns.items():
        if not isinstance(own, Mapping):
            raise checkpoint.refused(f"module_quant_configs.{pattern} {str(own)[:60]!r}")
        checkpoint.only(own, {"num_bits": (2, 4, 8)}, f"module_quant_configs.{pattern}.")
        try:
            re.compile(pattern)
        except re.error:
            raise checkpoint.refused(f"module_quant_configs.{pattern}, which is no regular expression,") from None
        found[pattern] = _number_of_bits(checkpoint, own)
    return found


def _number_of_bits(checkpoint: Quantised, own: Mapping[str, Any]) -> int:
    """A module's, or the checkpoint's, where it does not say; 4 where that does not either."""
    if own.get("num_bits") is not None:
        return checkpoint.number(own, "num_bits", (2, 4, 8))
    general: int = checkpoint.config.get("num_bits") or 4
    return general


def _bits(checkpoint: Quantised, patterns: Mapping[str, int], module: str) -> int:
    """Of the pattern that is found furthest to the left in a module's name; of several there, the first one's."""
    found = [(match.start(), i) for i, pattern in enumerate(patterns) if (match := re.search(pattern, module))]
    return list(patterns.values())[min(found)[1]] if found else _number_of_bits(checkpoint, checkpoint.config)


def _read(
    checkpoint: Quantised, module: str, packed: StoredTensor, scale: StoredTensor, bits: int, reading: Reading
) -> None:
    if len(packed.shape) != 2 or not all(packed.shape) or packed.dtype != ("I8" if bits == 8 else "U8"):
        raise checkpoint.refused(f"{packed.name} of {packed.dtype} {list(packed.shape)} for {bits} bits")
    out, width = packed.shape
    columns = width * (8 // bits)
    blocks = scale.shape[-1] if len(scale.shape) == 2 else 0
    if not blocks or columns % blocks:
        raise checkpoint.refused(f"{scale.name} of {list(scale.shape)}")
    checkpoint.fitting(scale, ("F32",), (out, blocks))
    name = f"{module}.weight"
    parts = [Part(packed), Part(scale)]
    # float32, in which products of numbers and scales are exact
    made = checkpoint.matrix(name, (out, columns), parts, functools.partial(_rows, bits, columns), "F32")
    reading.tensors[name] = replace(made, undecoded=_undecoded(bits, columns, blocks))
    reading.used |= {packed.name, scale.name}
    reading.kinds[f"{bits} bits in {'rows' if blocks == 1 else f'blocks of {columns // blocks}'}"] += 1


def _undecoded(bits: int, columns: int, blocks: int) -> dict[str, Decode]:
    """How its numbers are read as they are, in every format that holds them and whose groups its blocks are made of."""
    return {
        kind: functools.partial(_integer_rows, form, bits, columns)
        for kind, form in INTEGER_ROWS.items()
        if BITS[form] >= bits and columns % BLOCK == 0 and columns // blocks % form.group == 0
    }


def _numbers(bits: int, columns: int, packed: Tensor) -> Tensor:
    """Whole numbers, int8 [..., columns]."""
    return packed if bits == 8 else unpacked(packed, bits, columns).to(torch.int8) - (1 << bits - 1)


def _rows(bits: int, columns: int, parts: Sequence[Tensor], rows: range) -> Tensor:
    packed, scale = parts
    return grouped(_numbers(bits, columns, packed).float(), scale)


def _integer_rows(form: type[Grouped], bits: int, columns: int, parts: Sequence[Tensor], rows: range) -> Tensor:
    packed, scale = parts
    scales = scale.repeat_interleave(columns // form.group // scale.shape[-1], -1)
    return form.as_rows(_numbers(bits, columns, packed), scales)


def _activations(checkpoint: Quantised) -> dict[str, tuple[float, float]]:
    """Scales of what goes into a linear layer and of what comes out of it, by the module's name; 0 for none."""
    stored = {
        (module, place): checkpoint.fitting(tensor, ("F32",), (), (1,))
        for place, end in enumerate(ACTIVATIONS)
        for module, tensor in checkpoint.named(f".{end}")
    }
    found: dict[str, list[float]] = {}
    values = checkpoint.source.read((tensor, None) for tensor in stored.values())
    for ((module, place), tensor), value in zip(stored.items(), values, strict=True):
        scale = value.item()
        if not (math.isfinite(scale) and scale >= 0):
            raise checkpoint.refused(f"{tensor.name} = {scale}")
        found.setdefault(module, [0.0, 0.0])[place] = scale
    return {module: (before, after) for module, (before, after) in found.items()}
