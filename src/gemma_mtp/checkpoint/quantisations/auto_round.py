"""AutoRound: the layouts of others, under a `packing_format` of its own.

As auto-round 0.15.1 writes it (export/export_to_autoround): GPTQ's with zero points less one or as they are, without an
order of columns; AWQ's; compressed-tensors' FP4 and MXFP8; FP8 in blocks. Some matrices may have other bits than the
rest.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from gemma_mtp.checkpoint.quantisations import awq, compressed_tensors, fp8, gptq
from gemma_mtp.checkpoint.quantisations.base import Quantised, Reading
from gemma_mtp.checkpoint.quantisations.records import ACTIVATIONS, RECORDS, notes

CONFIG: dict[str, Collection[Any] | None] = {
    **RECORDS, "quant_method": None, "packing_format": None, "backend": None, "activation_scheme": None,
    "fmt": ("e4m3",), "weight_block_size": None, "ignored_layers": None, "modules_to_not_convert": None,
    "quant_lm_head": None,
}  # fmt: skip
FP8 = "auto_round:fp8"


def read(checkpoint: Quantised) -> Reading:
    """The reader. Raises QuantisationError for what is not known."""
    config = checkpoint.config
    checkpoint.only(config, CONFIG)
    packing = config.get("packing_format")
    if not isinstance(packing, str) or packing not in PACKINGS:
        raise checkpoint.refused(f"packing_format {str(packing)[:60]!r}")
    reading = Reading(notes=notes(checkpoint, _settings(checkpoint), rounds=packing == FP8))
    PACKINGS[packing](checkpoint, reading)
    reading.used |= checkpoint.of_modules(ACTIVATIONS)
    return reading


def _settings(checkpoint: Quantised) -> list[Mapping[str, Any]]:
    """What is said of all matrices, and of those that differ."""
    extra = checkpoint.config.get("extra_config") or {}
    if not (isinstance(extra, dict) and all(isinstance(entry, dict) for entry in extra.values())):
        raise checkpoint.refused(f"extra_config {str(extra)[:60]!r}")
    return [checkpoint.config, *extra.values()]


def _integers(less_one: bool) -> Callable[[Quantised, Reading], None]:
    def read_all(checkpoint: Quantised, reading: Reading) -> None:
        settings = _settings(checkpoint)
        for module, packed in checkpoint.named(".qweight"):
            size, bits = gptq.layout(checkpoint, module, packed, settings)
            reading.kinds[gptq.read_matrix(checkpoint, module, packed, bits, size, less_one, reading)] += 1

    return read_all


def _awq(checkpoint: Quantised, reading: Reading) -> None:
    if any(entry.get("bits") not in (None, 4, 16, 32) for entry in _settings(checkpoint)):
        raise checkpoint.refused("other than 4 bits as AWQ's")
    awq.read_matrices(checkpoint, reading)


def _few_bits(checkpoint: Quantised, reading: Reading) -> None:
    """NVFP4, or MXFP4 and MXFP8."""
    packed = [entry for entry in _settings(checkpoint) if entry.get("bits") not in (16, 32)]
    kinds = {str(entry["data_type"])[:5] for entry in packed if entry.get("data_type") is not None}
    bits = [entry.get("bits") for entry in packed]
    if kinds == {"nv_fp"} and all(width in (4, None) for width in bits):
        formats = ["nvfp4-pack-quantized"]
    elif kinds == {"mx_fp"} and all(width in (4, 8, None) for width in bits):
        formats = ["mxfp4-pack-quantized", "mxfp8-quantized"]
    else:
        raise checkpoint.refused(f"data_type {', '.join(sorted(kinds))!r} of {str(bits)[:60]} bits")
    for format in formats:
        compressed_tensors.FORMATS[format](checkpoint, [], reading)


#: what reads each packing_format
PACKINGS: dict[str, Callable[[Quantised, Reading], None]] = {
    "auto_round:auto_gptq": _integers(True), "auto_round": _integers(False), "auto_round:gptqmodel": _integers(False),
    "auto_round:auto_awq": _awq, "auto_round:llm_compressor": _few_bits, FP8: fp8.read_matrices,
}  # fmt: skip
