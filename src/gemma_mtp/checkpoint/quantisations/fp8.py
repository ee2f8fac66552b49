"""FP8 (E4M3) with a scale for each block of a matrix or for all of it, under `weight_scale_inv`, which it is multiplied
by: what transformers (`quant_method: "fp8"`), DeepSeek's tools and AutoRound write.

Layout as in transformers 5.22.2: integrations/finegrained_fp8.py. Packed experts have such scales of their own.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor

from gemma_mtp.checkpoint.derived import Part
from gemma_mtp.checkpoint.quantisations.base import Quantised, Reading
from gemma_mtp.checkpoint.quantisations.bits import e8m0, grid_of, in_blocks
from gemma_mtp.checkpoint.quantisations.records import ACTIVATIONS, RECORDS, notes
from gemma_mtp.files.headers import StoredTensor

CONFIG: dict[str, Collection[Any] | None] = {
    **RECORDS, "quant_method": None, "activation_scheme": None, "weight_block_size": None, "dequantize": None,
    "modules_to_not_convert": None, "ignored_layers": None, "modules_to_convert": None, "scale_fmt": ("float", "ue8m0"),
    "expert_dtype": ("fp8",), "fmt": ("e4m3",), "packing_format": ("fp8",),
}  # fmt: skip


def read(checkpoint: Quantised) -> Reading:
    """The reader. Raises QuantisationError for what is not known."""
    checkpoint.only(checkpoint.config, CONFIG)
    reading = Reading(notes=notes(checkpoint, rounds=True))
    read_matrices(checkpoint, reading)
    return reading


def read_matrices(checkpoint: Quantised, reading: Reading) -> None:
    """Read all that are stored so. Raises QuantisationError for what does not fit."""
    said = checkpoint.block(checkpoint.config.get("weight_block_size"), "weight_block_size")
    for end in ("_scale_inv", "_scale"):
        for name, scale in checkpoint.named(end):
            weight = checkpoint.stored.get(name)
            if weight is not None and weight.dtype == "F8_E4M3" and len(weight.shape) > 1:
                _read(checkpoint, weight, scale, said, reading)
    reading.used |= checkpoint.of_modules(ACTIVATIONS)


def _read(
    checkpoint: Quantised, weight: StoredTensor, scale: StoredTensor, said: tuple[int, int] | None, reading: Reading
) -> None:
    if weight.name in reading.tensors:
        raise checkpoint.refused(f"two scales for {weight.name}")
    checkpoint.fitting(scale, ("F32", "BF16", "F16", "F8_E8M0", "U8"))
    if scale.shape in ((), (1,)):
        reading.tensors[weight.name] = checkpoint.fp8_matrix(weight, scale, _whole, checkpoint.dtype)
        each = "tensor"
    else:
        block = block_of(checkpoint, weight, scale, scale.shape, said)
        parts = [Part(weight), Part(scale, int(len(weight.shape) > 2))]
        decode = functools.partial(_blocks, block, len(weight.shape) == 2)
        reading.tensors[weight.name] = checkpoint.matrix(weight.name, weight.shape, parts, decode, checkpoint.dtype)
        each = f"block of {block[0]} x {block[1]}"
    reading.used |= {weight.name, scale.name}
    reading.kinds[f"FP8 with a scale for each {each}"] += 1


def block_of(
    checkpoint: Quantised, weight: StoredTensor, scale: StoredTensor, grid: Sequence[int], said: tuple[int, int] | None
) -> tuple[int, int]:
    """Returns the size of the blocks that a `grid` of scales is of: as the configuration says, the last ones perhaps
    smaller; or, as transformers takes it, what the scales divide. Raises QuantisationError where neither fits."""
    *leading, rows, columns = weight.shape
    *leading_scales, down, across = grid if len(grid) == len(weight.shape) else (0, 0)
    if leading == leading_scales and down and across:
        if said is not None and (down, across) == grid_of(rows, columns, said):
            return said
        if rows % down == 0 and columns % across == 0:
            return rows // down, columns // across
    raise checkpoint.refused(f"{scale.name} of {list(scale.shape)} for {weight.name} of {list(weight.shape)}")


def _floats(scale: Tensor) -> Tensor:
    return e8m0(scale) if scale.element_size() == 1 else scale.float()


def _whole(parts: Sequence[Tensor], rows: range) -> Tensor:
    weight, scale = parts
    return weight.float() * _floats(scale)


def _blocks(block: tuple[int, int], are_rows: bool, parts: Sequence[Tensor], rows: range) -> Tensor:
    weight, scale = parts
    return in_blocks(weight.float(), _floats(scale), block, rows.start if are_rows else 0)
