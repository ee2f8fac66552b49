"""Google's mobile QAT checkpoints (`-qat-mobile-transformers`): 2, 4 and 8 bits by rows, and tables by blocks.

Layout as transformers 5.24.0 reads `quant_method: "gemma"`, of which this was written by its description: whatever does
not fit that is refused. Its static scales of activations are not used.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from gemma_mtp.checkpoint.derived import Part
from gemma_mtp.checkpoint.quantisations.base import Quantised, Reading
from gemma_mtp.checkpoint.quantisations.bits import grouped, unpacked
from gemma_mtp.files.headers import StoredTensor

CONFIG = {
    "quant_method": None, "num_bits": (2, 4, 8), "quantize_embeddings": (True, False), "module_quant_configs": None,
    "modules_to_not_convert": None,
}  # fmt: skip
ACTIVATIONS = ("input_activation_scale", "output_activation_scale", "k_cache_scale", "v_cache_scale")


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
    scales = {f"{name}.{end}" for end in ACTIVATIONS for name, _ in checkpoint.named(f".{end}")}
    if scales:
        reading.notes.append(
            "its activations are to be rounded to 8 bits by stored scales (input_activation_scale), as it was trained;"
            " here they stay as they are."
        )
    reading.used |= scales
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
        found[pattern] = checkpoint.number(own, "num_bits", (2, 4, 8))
    return found


def _bits(checkpoint: Quantised, patterns: Mapping[str, int], module: str) -> int:
    """Of the first pattern that is found in a module's name."""
    general: Any = checkpoint.config.get("num_bits", 4)
    return next((bits for pattern, bits in patterns.items() if re.search(pattern, module)), general)


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
    decode = functools.partial(_rows, bits, columns)
    reading.tensors[name] = checkpoint.matrix(name, (out, columns), parts, decode, checkpoint.dtype)
    reading.used |= {packed.name, scale.name}
    reading.kinds[f"{bits} bits in {'rows' if blocks == 1 else f'blocks of {columns // blocks}'}"] += 1


def _rows(bits: int, columns: int, parts: Sequence[Tensor], rows: range) -> Tensor:
    packed, scale = parts
    values = packed.float() if bits == 8 else unpacked(packed, bits, columns).float() - (1 << bits - 1)
    return grouped(values, scale)
