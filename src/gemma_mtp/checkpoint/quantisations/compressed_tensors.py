"""compressed-tensors (llm-compressor, vLLM): packed integers, FP8, NVFP4, MXFP4, MXFP6 and MXFP8.

How a matrix is packed is read off its tensors and held against the configuration's groups. Layouts as in
compressed-tensors 0.20.1: compressors/pack_quantized, naive_quantized, nvfp4, mxfp4, mxfp6 and mxfp8.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from gemma_mtp.checkpoint.derived import Part
from gemma_mtp.checkpoint.quantisations.base import Quantised, Reading
from gemma_mtp.checkpoint.quantisations.bits import fp4, grid_of, grouped, in_blocks, unpacked
from gemma_mtp.checkpoint.quantisations.records import ACTIVATIONS
from gemma_mtp.checkpoint.source import FLOAT_DTYPES
from gemma_mtp.files.headers import StoredTensor

TOP: dict[str, Collection[Any] | None] = {
    "quant_method": None, "format": None, "config_groups": None, "ignore": None, "quantization_status": None,
    "global_compression_ratio": None, "kv_cache_scheme": None, "version": None, "transform_config": ({},),
    "sparsity_config": ({},), "moe_sparsity_config": ({},),
}  # fmt: skip
GROUP = {"targets": None, "weights": None, "input_activations": None, "output_activations": None, "format": None}
WEIGHTS = {
    "num_bits": tuple(range(1, 9)), "type": ("int", "float"), "symmetric": (True, False), "group_size": None,
    "strategy": ("tensor", "channel", "group", "tensor_group", "block"), "block_structure": None, "dynamic": (False,),
    "actorder": None, "observer": None, "observer_kwargs": None, "scale_dtype": None, "zp_dtype": None,
}  # fmt: skip
FLOATS = tuple(FLOAT_DTYPES)


def read(checkpoint: Quantised) -> Reading:
    """The reader. Raises QuantisationError for what is not known."""
    groups = _groups(checkpoint)
    reading = Reading()
    formats = {str(group.get("format") or checkpoint.config.get("format")) for group in groups}
    for format in sorted(formats):
        if format not in FORMATS:
            raise checkpoint.refused(f"format {format!r}")
        FORMATS[format](checkpoint, groups, reading)
    reading.used |= checkpoint.of_modules(ACTIVATIONS)
    if any(group.get("input_activations") or group.get("output_activations") for group in groups):
        reading.notes.append(
            "its own tools round activations too, as its config_groups say; here they stay as they are."
        )
    if checkpoint.config.get("kv_cache_scheme"):
        reading.notes.append("it has a kv_cache_scheme, which is not followed: keys and values are kept as always.")
    return reading


def _groups(checkpoint: Quantised) -> list[Mapping[str, Any]]:
    checkpoint.only(checkpoint.config, TOP)
    groups = checkpoint.config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise checkpoint.refused(f"config_groups {str(groups)[:60]!r}")
    for name, group in groups.items():
        if not (isinstance(group, dict) and isinstance(group.get("weights"), dict)):
            raise checkpoint.refused(f"config_groups.{name} {str(group)[:60]!r}")
        checkpoint.only(group, GROUP, f"config_groups.{name}.")
        checkpoint.only(group["weights"], WEIGHTS, f"config_groups.{name}.weights.")
    return list(groups.values())


def _packed_integers(checkpoint: Quantised, groups: Sequence[Mapping[str, Any]], reading: Reading) -> None:
    integers = [group["weights"] for group in groups if (group["weights"].get("type") or "int") == "int"]
    allowed = {weights.get("num_bits") or 8 for weights in integers}
    for name, packed in checkpoint.named("_packed"):
        if packed.dtype != "I32":
            continue  # of another format
        shape = _shape(checkpoint, name, packed)
        *leading, columns = shape
        bits = [b for b in sorted(allowed) if (*leading, -(-columns * b // 32)) == packed.shape]
        if len(bits) != 1:
            raise checkpoint.refused(f"{packed.name} of {list(packed.shape)} for a weight of {list(shape)}")
        if f"{name}_g_idx" in checkpoint.stored:
            raise checkpoint.refused(f"columns in the order of {name}_g_idx")
        scale = _scale(checkpoint, f"{name}_scale", packed, shape)
        parts = [Part(packed), Part(scale, 0 if scale.shape in ((), (1,)) else 1)]
        zero = checkpoint.stored.get(f"{name}_zero_point")
        if zero is not None:
            if len(leading) != 1:
                raise checkpoint.refused(f"{zero.name} of a weight of {list(shape)}")
            rows = -(-leading[0] * bits[0] // 32)
            parts.append(Part(checkpoint.fitting(zero, ("I32",), (rows, *scale.shape[1:])), 0))
        decode = functools.partial(_integers, bits[0], columns)
        reading.tensors[name] = checkpoint.matrix(name, shape, parts, decode)
        reading.used |= {part.tensor.name for part in parts} | {f"{name}_shape"}
        group = f"groups of {columns // scale.shape[-1]}" if scale.shape and scale.shape[-1] > 1 else "rows"
        reading.kinds[f"{bits[0]} bits in {group}{'' if zero is None else ' with zero points'}"] += 1


def _integers(bits: int, columns: int, parts: Sequence[Tensor], rows: range) -> Tensor:
    packed, scale, *zero = parts
    values = unpacked(packed, bits, columns).float() - (1 << bits - 1)
    scale = scale.float().reshape(1, 1) if scale.numel() == 1 else scale.float()
    if zero:  # packed along the rows; stored with the same offset as the values
        points = unpacked(zero[0].T, bits, rows.stop)[..., rows.start :].T.float() - (1 << bits - 1)
        values = (values.unflatten(-1, (points.shape[-1], -1)) - points[..., None]).flatten(-2)
    return grouped(values, scale)


def _stored_as_is(checkpoint: Quantised, groups: Sequence[Mapping[str, Any]], reading: Reading) -> None:
    """Weights of FP8 or int8 under their own names."""
    said = [checkpoint.block(group["weights"].get("block_structure"), "block_structure") for group in groups]
    blocks = {block for block in said if block is not None}
    for name, tensor in list(checkpoint.stored.items()):
        if tensor.dtype not in ("F8_E4M3", "I8") or f"{name}_scale" not in checkpoint.stored:
            continue
        scale = checkpoint.stored[f"{name}_scale"]
        zero = checkpoint.stored.get(f"{name}_zero_point")
        if zero is not None:
            raise checkpoint.refused(f"zero points ({zero.name})")
        found = _block(tensor.shape, scale.shape, blocks)
        if found is None:
            scale = _scale(checkpoint, scale.name, tensor, tensor.shape)
            parts = [Part(tensor), Part(scale, 0 if scale.shape in ((), (1,)) else 1)]
            decode: Callable[[Sequence[Tensor], range], Tensor] = _scaled
        else:
            checkpoint.fitting(scale, FLOATS)
            parts, decode = [Part(tensor), Part(scale, 0)], functools.partial(_block_scaled, found)
        by_row = found is None and (scale.shape in ((), (1,)) or scale.shape[-1] == 1)
        if tensor.dtype == "F8_E4M3" and by_row:
            reading.tensors[name] = checkpoint.fp8_matrix(tensor, scale, decode)
        else:
            reading.tensors[name] = checkpoint.matrix(name, tensor.shape, parts, decode)
        reading.used |= {name, scale.name}
        kind = "FP8" if tensor.dtype == "F8_E4M3" else "8 bits"
        each = "tensor" if scale.shape in ((), (1,)) else "block" if found else "row"
        reading.kinds[f"{kind} with a scale for each {each}"] += 1


def _block(shape: Sequence[int], scale: Sequence[int], blocks: set[Any]) -> tuple[int, int] | None:
    """The size of the blocks that share a scale, if there are such."""
    for block in blocks:
        if len(shape) == 2 and tuple(scale) == grid_of(shape[0], shape[1], block):
            return block
    return None


def _scaled(parts: Sequence[Tensor], rows: range) -> Tensor:
    values, scale = parts
    scale = scale.float()
    return values.float() * scale if scale.numel() == 1 else grouped(values.float(), scale)


def _block_scaled(block: tuple[int, int], parts: Sequence[Tensor], rows: range) -> Tensor:
    values, scale = parts
    return in_blocks(values.float(), scale.float(), block, rows.start)


def _nvfp4_packed(checkpoint: Quantised, groups: Sequence[Mapping[str, Any]], reading: Reading) -> None:
    """Groups of 16, scales of FP8 and one for the tensor, or for each of a tensor of experts."""
    for name, packed in checkpoint.named("_packed"):
        if packed.dtype != "U8":
            continue
        shape = (*packed.shape[:-1], 2 * packed.shape[-1]) if packed.shape else ()
        if len(shape) < 2 or shape[-1] % 16:
            raise checkpoint.refused(f"{packed.name} of {list(packed.shape)}")
        scale = checkpoint.beside(f"{name}_scale", packed, ("F8_E4M3",), (*shape[:-1], shape[-1] // 16))
        every = [(), (1,), (shape[0], 1, 1)] if len(shape) > 2 else [(), (1,)]
        whole = checkpoint.beside(f"{name}_global_scale", packed, ("F32",), *every)
        parts = [Part(packed), Part(scale), Part(whole, int(len(whole.shape) > 1))]
        reading.tensors[name] = checkpoint.matrix(name, shape, parts, _nvfp4, checkpoint.dtype)
        reading.used |= {part.tensor.name for part in parts}
        reading.kinds["NVFP4"] += 1


def _nvfp4(parts: Sequence[Tensor], rows: range) -> Tensor:
    packed, scale, whole = parts
    return grouped(fp4(packed, 2 * packed.shape[-1]), scale.float() / whole)


def _mx(bits: int) -> Callable[[Quantised, Sequence[Mapping[str, Any]], Reading], None]:
    """MXFP4 and MXFP6, packed, and MXFP8 under its own name."""
    end, dtype = ("", "F8_E4M3") if bits == 8 else ("_packed", "U8")

    def read_all(checkpoint: Quantised, groups: Sequence[Mapping[str, Any]], reading: Reading) -> None:
        for name, packed in checkpoint.named(end):
            if packed.dtype != dtype or (bits == 8 and f"{name}_scale" not in checkpoint.stored):
                continue  # of another format
            reading.tensors[name] = checkpoint.mx_matrix(name, packed, bits)
            reading.used |= {packed.name, f"{name}_scale"}
            reading.kinds[f"MXFP{bits}"] += 1

    return read_all


def _shape(checkpoint: Quantised, name: str, packed: StoredTensor) -> tuple[int, ...]:
    """The weight's own shape, which is stored beside it."""
    tensor = checkpoint.beside(f"{name}_shape", packed, ("I64", "I32"), (len(packed.shape),))
    shape = tuple(checkpoint.value(tensor).tolist())
    if len(shape) < 2 or not all(0 < size < 1 << 40 for size in shape):
        raise checkpoint.refused(f"{tensor.name} {list(shape)}")
    return shape


def _scale(checkpoint: Quantised, name: str, tensor: StoredTensor, shape: Sequence[int]) -> StoredTensor:
    """A scale for the whole, for each row, or for each of a row's groups."""
    found = checkpoint.beside(name, tensor, FLOATS)
    *leading, columns = shape
    fits = found.shape in ((), (1,)) or (
        len(found.shape) == len(shape) and list(found.shape[:-1]) == leading and found.shape[-1] > 0
        and columns % found.shape[-1] == 0
    )  # fmt: skip
    return found if fits else checkpoint.fitting(found, FLOATS, (*leading, 1), ())


FORMATS: dict[str, Callable[[Quantised, Sequence[Mapping[str, Any]], Reading], None]] = {
    "pack-quantized": _packed_integers, "int-quantized": _stored_as_is, "float-quantized": _stored_as_is,
    "naive-quantized": _stored_as_is, "nvfp4-pack-quantized": _nvfp4_packed, "mxfp4-pack-quantized": _mx(4),
    "mxfp6-pack-quantized": _mx(6), "mxfp8-quantized": _mx(8),
}  # fmt: skip
