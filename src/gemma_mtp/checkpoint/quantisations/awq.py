"""AWQ (AutoAWQ, "gemm"): 4 bits with zero points, in groups of the input, packed along the output.

Layout as in AutoAWQ 0.2.9: modules/linear/gemm.py and utils/packing_utils.py.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from gemma_mtp.checkpoint.derived import Part
from gemma_mtp.checkpoint.quantisations.base import Quantised, Reading
from gemma_mtp.checkpoint.quantisations.bits import unpacked
from gemma_mtp.checkpoint.quantisations.records import RECORDS, notes

CONFIG: dict[str, Collection[Any] | None] = {
    **RECORDS, "provider": None, "to_quant_block_names": None,
    # zero points are stored and taken off either way
    "quant_method": None, "bits": (4,), "w_bit": (4,), "group_size": None, "q_group_size": None, "zero_point": None,
    "version": ("gemm", "GEMM"), "modules_to_not_convert": None, "backend": ("autoawq", "auto"), "do_fuse": (False,),
    "exllama_config": None, "fuse_max_seq_len": None, "modules_to_fuse": None,
}  # fmt: skip
#: which of a word's eight halves holds each of its columns
ORDER = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])


def read(checkpoint: Quantised) -> Reading:
    """The reader. Raises QuantisationError for what is not known."""
    checkpoint.only(checkpoint.config, CONFIG)
    reading = Reading(notes=notes(checkpoint))
    read_matrices(checkpoint, reading)
    return reading


def read_matrices(checkpoint: Quantised, reading: Reading) -> None:
    """Read all that are packed so. Raises QuantisationError for what does not fit."""
    for module, packed in checkpoint.named(".qweight"):
        checkpoint.fitting(packed, ("I32",))
        if len(packed.shape) != 2:
            raise checkpoint.refused(f"{packed.name} of {list(packed.shape)}")
        columns, words = packed.shape
        scales = checkpoint.beside(f"{module}.scales", packed, ("F16", "BF16", "F32"))
        groups = scales.shape[0] if len(scales.shape) == 2 else 0
        if not groups or columns % groups or scales.shape[1] != 8 * words:
            raise checkpoint.refused(f"{scales.name} of {list(scales.shape)} for {packed.name} of {list(packed.shape)}")
        zeros = checkpoint.beside(f"{module}.qzeros", packed, ("I32",), (groups, words))
        parts = [Part(packed, 0), Part(zeros, 0), Part(scales, 0)]
        name = f"{module}.weight"
        reading.tensors[name] = checkpoint.matrix(name, (8 * words, columns), parts, _columns)
        reading.used |= {part.tensor.name for part in parts}
        reading.kinds[f"4 bits in groups of {columns // groups} with zero points"] += 1


def _columns(parts: Sequence[Tensor], rows: range) -> Tensor:
    packed, zeros, scales = parts
    first, last = rows.start // 8, -(-rows.stop // 8)

    def numbers(words: Tensor) -> Tensor:
        each = unpacked(words[:, first:last], 4, 8 * (last - first)).unflatten(-1, (-1, 8))[..., ORDER].flatten(-2)
        return each[:, rows.start - 8 * first : rows.stop - 8 * first].float()

    values = numbers(packed).unflatten(0, (len(zeros), -1)) - numbers(zeros)[:, None]
    return (values * scales[:, None, rows.start : rows.stop].float()).flatten(0, 1).T.contiguous()
