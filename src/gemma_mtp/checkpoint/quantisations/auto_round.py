"""AutoRound: the layouts of others, under a `packing_format` of its own.

As auto-round 0.15.1 writes it (export/export_to_autoround): GPTQ's with zero points less one or as they are, without an
order of columns; AWQ's; compressed-tensors' FP4; FP8 in blocks. Some matrices may have other bits than the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from gemma_mtp.checkpoint.quantisations import awq, compressed_tensors, fp8, gptq
from gemma_mtp.checkpoint.quantisations.base import Quantised, Reading
from gemma_mtp.files.headers import StoredTensor

CONFIG: dict[str, Collection[Any] | None] = {
    **fp8.RECORDS, "quant_method": None, "packing_format": None, "backend": None, "activation_scheme": None,
    "fmt": ("e4m3",), "weight_block_size": None, "ignored_layers": None, "modules_to_not_convert": None,
    "quant_lm_head": None,
}  # fmt: skip
BITS = (2, 3, 4, 8)


def read(checkpoint: Quantised) -> Reading:
    """The reader. Raises QuantisationError for what is not known."""
    config = checkpoint.config
    checkpoint.only(config, CONFIG)
    packing = config.get("packing_format")
    if not isinstance(packing, str) or packing not in PACKINGS:
        raise checkpoint.refused(f"packing_format {str(packing)[:60]!r}")
    reading = Reading()
    PACKINGS[packing](checkpoint, reading)
    for end in fp8.ACTIVATIONS:
        reading.used |= {f"{name}.{end}" for name, _ in checkpoint.named(f".{end}")}
    if any(settings.get("act_bits") not in (None, 16, 32) for settings in _settings(checkpoint)):
        reading.notes = [fp8.ROUNDS_ACTIVATIONS]
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
        bits = [width for entry in settings if type(width := entry.get("bits")) is int and width in BITS]
        sizes = [size for entry in settings if type(size := entry.get("group_size")) is int and 0 < size < 1 << 31]
        for module, packed in checkpoint.named(".qweight"):
            size, width = _layout(checkpoint, module, packed, bits, sizes)
            reading.kinds[gptq.read_matrix(checkpoint, module, packed, width, size, less_one, reading)] += 1

    return read_all


def _layout(
    checkpoint: Quantised, module: str, packed: StoredTensor, bits: Collection[int], sizes: Collection[int]
) -> tuple[int, int]:
    """Columns of a group and bits of one matrix, of those that the configuration has for any, by its shapes."""
    zeros = checkpoint.beside(f"{module}.qzeros", packed, ("I32",))
    if len(packed.shape) == len(zeros.shape) == 2 and all((*packed.shape, *zeros.shape)):
        (rows, outputs), (groups, words) = packed.shape, zeros.shape
        found = [
            (size, width) for width in sorted({*bits}) for size in (*dict.fromkeys(sizes), -1)
            if words == -(-outputs * width // 32) and groups == (-(-32 * rows // width // size) if size > 0 else 1)
        ]  # fmt: skip
        if len({width for _, width in found}) == 1:
            return found[0]
    raise checkpoint.refused(f"{packed.name} of {list(packed.shape)} and {zeros.name} of {list(zeros.shape)}")


def _awq(checkpoint: Quantised, reading: Reading) -> None:
    if any(entry.get("bits") not in (None, 4, 16, 32) for entry in _settings(checkpoint)):
        raise checkpoint.refused("other than 4 bits as AWQ's")
    awq.read_matrices(checkpoint, reading)


def _fp4(checkpoint: Quantised, reading: Reading) -> None:
    kinds = {"nv_fp": "nvfp4-pack-quantized", "mx_fp": "mxfp4-pack-quantized"}
    packed = [entry for entry in _settings(checkpoint) if entry.get("bits") not in (16, 32)]
    named = {str(entry["data_type"]) for entry in packed if entry.get("data_type") is not None}
    read_as = {kind for start, kind in kinds.items() if any(name.startswith(start) for name in named)}
    if len(read_as) != 1:
        raise checkpoint.refused(f"data_type {', '.join(sorted(named))[:60]!r} in compressed-tensors' layout")
    compressed_tensors.FORMATS[read_as.pop()](checkpoint, [], reading)


#: what reads each packing_format
PACKINGS: dict[str, Callable[[Quantised, Reading], None]] = {
    "auto_round:auto_gptq": _integers(True), "auto_round": _integers(False), "auto_round:gptqmodel": _integers(False),
    "auto_round:auto_awq": _awq, "auto_round:llm_compressor": _fp4, "auto_round:fp8": fp8.read_matrices,
}  # fmt: skip
