"""bitsandbytes: blocks of 4 bits (NF4, FP4), their scales quantised once more or not, and rows of 8 bits.

Layouts as in bitsandbytes 0.50.2: functional.QuantState.as_dict, and nn.Linear8bitLt for 8 bits.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gemma_mtp.checkpoint.derived import Part
from gemma_mtp.checkpoint.quantisations.base import Quantised, Reading
from gemma_mtp.files.headers import StoredTensor

#: how it was made, and what activations are like; the stored states say what a weight is
CONFIG = dict.fromkeys((
    "quant_method", "load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit", "bnb_4bit_compute_dtype",
    "bnb_4bit_quant_storage", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "llm_int8_enable_fp32_cpu_offload",
    "llm_int8_has_fp16_weight", "llm_int8_skip_modules", "llm_int8_threshold",
))  # fmt: skip
STATE = ".quant_state.bitsandbytes__"
TYPES = ("nf4", "fp4")
NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def read(checkpoint: Quantised) -> Reading:
    """The reader. Raises QuantisationError for what is not known."""
    checkpoint.only(checkpoint.config, CONFIG)
    reading = Reading()
    for name in checkpoint.stored:
        if STATE in name:
            _read_4_bits(checkpoint, name, reading)
    for module, scale in checkpoint.named(".SCB"):
        _read_8_bits(checkpoint, module, scale, reading)
    if any(kind.startswith("int8") for kind in reading.kinds):
        reading.notes.append("bitsandbytes rounds activations to 8 bits too; here they stay as they are.")
    return reading


def _read_4_bits(checkpoint: Quantised, state_name: str, reading: Reading) -> None:
    name, _, kind = state_name.partition(STATE)
    state = _state(checkpoint, checkpoint.stored[state_name])
    shape, block = state.get("shape"), state.get("blocksize")
    sound = isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and 0 < n < 1 << 31 for n in shape)
    if not sound or kind not in TYPES or state.get("quant_type") != kind or block not in BLOCKS:
        raise checkpoint.refused(f"{state_name} {str(state)[:120]}")
    assert isinstance(shape, list)
    _, columns = shape
    packed = checkpoint.stored.get(name)
    if packed is None or 2 * packed.nbytes != math.prod(shape) or columns * packed.shape[0] % math.prod(shape):
        found = "nothing" if packed is None else f"{packed.dtype} {list(packed.shape)}"
        raise checkpoint.refused(f"{name}: {found} for a weight of {shape}")
    count = -(-math.prod(shape) // block)
    parts = [
        Part(packed, packed.shape[0] * columns // math.prod(shape)),
        Part(checkpoint.beside(f"{name}.quant_map", packed, ("F32",), (16,)), 0),
    ]
    nested = "nested_blocksize" in state
    parts.append(Part(checkpoint.beside(f"{name}.absmax", packed, ("U8",) if nested else ("F32",), (count,)), 0))
    outer = None
    if nested:
        size, offset = state["nested_blocksize"], state.get("nested_offset")
        if type(size) is not int or size < 1 or not isinstance(offset, int | float):
            raise checkpoint.refused(f"{state_name} {str(state)[:120]}")
        parts += [
            Part(checkpoint.beside(f"{name}.nested_absmax", packed, ("F32",), (-(-count // size),)), 0),
            Part(checkpoint.beside(f"{name}.nested_quant_map", packed, ("F32",), (256,)), 0),
        ]
        outer = size, float(offset)
    decode = functools.partial(_blocks, columns, block, outer)
    dtype = NAMES.get(str(state.get("dtype")), checkpoint.dtype)
    reading.tensors[name] = checkpoint.matrix(name, shape, parts, decode, dtype)
    reading.used |= {state_name, *(part.tensor.name for part in parts)}
    reading.kinds[f"{kind} in blocks of {block}{', its scales in 8 bits' if nested else ''}"] += 1


def _state(checkpoint: Quantised, tensor: StoredTensor) -> dict[str, Any]:
    """The JSON that lies in a tensor of bytes."""
    content = bytes(checkpoint.value(checkpoint.fitting(tensor, ("U8",))).flatten().tolist())
    try:
        state = json.loads(content)
    except (ValueError, RecursionError):
        state = None
    if not isinstance(state, dict):
        raise checkpoint.refused(f"{tensor.name}, which is no JSON object")
    return state


def _blocks(columns: int, block: int, outer: tuple[int, float] | None, parts: Sequence[Tensor], rows: range) -> Tensor:
    packed, values, scales, *nested = parts
    if outer is not None:  # scales are codes, with scales of their own
        size, offset = outer
        each = nested[0].repeat_interleave(size)[: len(scales)]
        scales = nested[1][scales.int()] * each + offset
    first, last = rows.start * columns, rows.stop * columns
    whole = scales[first // block : -(-last // block)].repeat_interleave(block)
    start = first % block
    whole = whole[start : start + last - first].view(len(rows), columns)
    halves = packed.view(torch.uint8).flatten()  # the first in the high half
    codes = torch.stack((halves >> 4, halves & 15), -1).view(len(rows), columns)
    return values[codes.int()] * whole


def _read_8_bits(checkpoint: Quantised, module: str, scale: StoredTensor, reading: Reading) -> None:
    name = f"{module}.weight"
    weight = checkpoint.beside(name, scale, ("I8",))
    if len(weight.shape) != 2:
        raise checkpoint.refused(f"{name} of {list(weight.shape)}")
    checkpoint.fitting(scale, ("F32",), weight.shape[:1])
    layout = checkpoint.stored.get(f"{module}.weight_format")
    if layout is not None and int(checkpoint.value(layout).flatten()[:1].sum()) != 0:
        raise checkpoint.refused(f"{layout.name}, whose rows are not in order,")
    reading.tensors[name] = checkpoint.matrix(name, weight.shape, [Part(weight), Part(scale)], _rows, checkpoint.dtype)
    reading.used |= {name, scale.name, f"{module}.weight_format"}
    reading.kinds["int8 in rows"] += 1


def _rows(parts: Sequence[Tensor], rows: range) -> Tensor:
    weight, scale = parts
    return weight.float() * (scale / 127)[:, None]
