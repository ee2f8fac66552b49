"""GPTQ (AutoGPTQ, GPTQModel): 2, 3, 4 or 8 bits with zero points, in groups of the input in any order, packed along it.

Layout as in GPTQModel 7.7.0: nn_modules/qlinear. Files of its first format hold zero points less one
(utils/model.py, convert_gptq_v2_to_v1_format_module): of whole packed words, so that a zero point of zero borrows from
the next; of 3 bits, some of which lie in two words, of each by itself.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gemma_mtp.checkpoint.derived import Part
from gemma_mtp.checkpoint.quantisations.base import Quantised, Reading
from gemma_mtp.checkpoint.quantisations.bits import unpacked
from gemma_mtp.checkpoint.quantisations.records import RECORDS, notes
from gemma_mtp.errors import QuantisationError
from gemma_mtp.files.headers import StoredTensor

CONFIG: dict[str, Collection[Any] | None] = {
    **RECORDS, "provider": None,
    "quant_method": None, "bits": None, "group_size": None, "desc_act": None, "sym": None, "lm_head": None,
    "checkpoint_format": ("gptq", "gptq_v2"), "format": ("gptq", "gptq_v2"), "pack_dtype": ("int32",),
    "static_groups": None, "true_sequential": None, "damp_percent": None, "damp_auto_increment": None, "meta": None,
    "model_name_or_path": None, "model_file_base_name": None, "dataset": None, "tokenizer": None, "quantizer": None,
    "modules_to_not_convert": None, "modules_in_block_to_quantize": None, "block_name_to_quantize": None,
    "module_name_preceding_first_block": None, "batch_size": None, "pad_token_id": None, "model_seqlen": None,
    "use_cuda_fp16": None, "use_exllama": None, "max_input_length": None, "exllama_config": None,
    "cache_block_outputs": None, "backend": None, "dynamic": None, "is_marlin_format": (False,), "mse": None,
    "act_group_aware": None,
}  # fmt: skip
#: what may be said of some modules: their tensors tell the rest
EXCEPTION: dict[str, Collection[Any] | None] = {
    "bits": None, "group_size": None, "sym": None, "desc_act": None, "mse": None, "damp_percent": None,
    "damp_auto_increment": None, "static_groups": None, "act_group_aware": None, "pack_dtype": ("int32",),
}  # fmt: skip
BITS = (2, 3, 4, 8)
#: one for each number of a word
ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


def read(checkpoint: Quantised) -> Reading:
    """The reader. Raises QuantisationError for what is not known."""
    config = checkpoint.config
    checkpoint.only(config, CONFIG)
    bits, size = checkpoint.number(config, "bits", BITS), checkpoint.number(config, "group_size")
    others = _exceptions(checkpoint)
    first_format = "gptq_v2" not in (config.get("checkpoint_format"), config.get("format"))
    reading = Reading(notes=notes(checkpoint))
    for module, packed in checkpoint.named(".qweight"):
        ordered = f"{module}.g_idx" in checkpoint.stored
        if config.get("desc_act") and not ordered:
            raise checkpoint.refused(f"desc_act, but without {module}.g_idx,")
        if others:
            size, bits = layout(checkpoint, module, packed, [config, *others])
        kind = read_matrix(checkpoint, module, packed, bits, size, first_format, reading)
        reading.kinds[f"{kind}{', in an order of their own' if config.get('desc_act') else ''}"] += 1
    return reading


def _exceptions(checkpoint: Quantised) -> list[Mapping[str, Any]]:
    """What is said of modules that have other settings than the rest; of such that stay as they are, nothing is said.

    GPTQModel's `dynamic` has them by an expression for their names, which begins with "-:" for the latter.
    """
    dynamic = checkpoint.config.get("dynamic") or {}
    if not (isinstance(dynamic, dict) and all(isinstance(entry, dict) for entry in dynamic.values())):
        raise checkpoint.refused(f"dynamic {str(dynamic)[:60]!r}")
    others = {name: entry for name, entry in dynamic.items() if not name.startswith("-:")}
    for name, entry in others.items():
        checkpoint.only(entry, EXCEPTION, f"dynamic.{name[:60]}.")
    return list(others.values())


def layout(
    checkpoint: Quantised, module: str, packed: StoredTensor, settings: Collection[Mapping[str, Any]]
) -> tuple[int, int]:
    """Returns the columns of a group (-1: a row) and the bits of one matrix, by its shapes, of those that any of the
    `settings` has. Raises QuantisationError where none fits, or more than one number of bits."""
    bits = {width for entry in settings if type(width := entry.get("bits")) is int and width in BITS}
    sizes = [size for entry in settings if type(size := entry.get("group_size")) is int and 0 < size < 1 << 31]
    zeros = checkpoint.beside(f"{module}.qzeros", packed, ("I32",))
    if len(packed.shape) == len(zeros.shape) == 2 and all((*packed.shape, *zeros.shape)):
        (rows, outputs), (groups, words) = packed.shape, zeros.shape
        found = [
            (size, width) for width in sorted(bits) for size in (*dict.fromkeys(sizes), -1)
            if words == -(-outputs * width // 32) and groups == (-(-32 * rows // width // size) if size > 0 else 1)
        ]  # fmt: skip
        if len({width for _, width in found}) == 1:
            return found[0]
    raise checkpoint.refused(f"{packed.name} of {list(packed.shape)} and {zeros.name} of {list(zeros.shape)}")


def read_matrix(
    checkpoint: Quantised, module: str, packed: StoredTensor, bits: int, size: int, first_format: bool, reading: Reading
) -> str:
    """Read one matrix of so many bits, in groups of `size` columns, or in rows (-1). Returns the kind that it is of.
    Raises QuantisationError for what does not fit."""
    checkpoint.fitting(packed, ("I32",))
    if len(packed.shape) != 2 or not all(packed.shape) or 32 * packed.shape[0] % bits:
        raise checkpoint.refused(f"{packed.name} of {list(packed.shape)}")
    columns, outputs = 32 * packed.shape[0] // bits, packed.shape[1]
    groups = 1 if size == -1 else -(-columns // size)
    scales = checkpoint.beside(f"{module}.scales", packed, ("F16", "BF16", "F32"), (groups, outputs))
    zeros = checkpoint.beside(f"{module}.qzeros", packed, ("I32",), (groups, -(-outputs * bits // 32)))
    parts = [Part(tensor, 0) for tensor in (packed, zeros, scales)]
    if f"{module}.g_idx" in checkpoint.stored:
        parts.append(Part(checkpoint.beside(f"{module}.g_idx", packed, ("I32", "I64"), (columns,)), 0))
    name = f"{module}.weight"
    decode = functools.partial(_columns, bits, size if size > 0 else columns, first_format, name)
    reading.tensors[name] = checkpoint.matrix(name, (outputs, columns), parts, decode)
    reading.used |= {part.tensor.name for part in parts}
    return f"{bits} bits in {'rows' if groups == 1 else f'groups of {size}'} with zero points"


def _columns(bits: int, size: int, less_one: bool, name: str, parts: Sequence[Tensor], rows: range) -> Tensor:
    packed, zeros, scales, *order = parts
    columns, groups = 32 * len(packed) // bits, len(scales)
    group = order[0].long() if order else torch.arange(columns) // size
    if bool(((group < -groups) | (group >= groups)).any()):
        raise QuantisationError(
            f"the groups of {name} (g_idx) are not 0 to {groups - 1}; the checkpoint is damaged: copy it again."
        )
    if less_one and bits in ONES:
        zeros = (zeros.long() + ONES[bits]).to(torch.int32)
    points = unpacked(zeros, bits, rows.stop)[:, rows.start :].T
    if less_one and bits not in ONES:
        points = (points + 1) & (1 << bits) - 1
    points = points.float()
    values = unpacked(packed[:, rows.start : rows.stop].T, bits, columns).float()
    return (values - points[:, group]) * scales[:, rows.start : rows.stop].T.float()[:, group]
