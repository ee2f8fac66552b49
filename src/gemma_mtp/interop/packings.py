"""How other programs store matrices in the Hugging Face layout: as floats, or packed with scales beside them.

compressed-tensors' layouts are those of its 0.20 (`pack_to_int32`, `FloatQuantizationCompressor`), MLX's those of
`mlx.core.quantize` 0.32. `checkpoint/quantisations` reads all of them back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from gemma_mtp.checkpoint.experts import PRODUCTS
from gemma_mtp.checkpoint.quantisations.known import FIELD
from gemma_mtp.checkpoint.quantisations.mlx import SWITCH
from gemma_mtp.weights.grouped import Grouped
from gemma_mtp.weights.int4 import Int4
from gemma_mtp.weights.int8x32 import Int8x32

#: what is written for one matrix, by names of their own: dtype and shape of each, or values
Layout = dict[str, tuple[torch.dtype, torch.Size]]
Written = dict[str, Tensor]
#: parts of a model that its own tools leave as they are: what chooses (experts, clusters), and heads
HEAD_MODULE = "lm_head"  # a module of its own for other programs where it is tied, too
KEPT = ("router.proj", "masked_embedding.centroids", HEAD_MODULE)
TABLES = ("embed_tokens", "embed_tokens_per_layer")
#: matrices of all experts of a layer, in one tensor [E, N, K]
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
#: columns that share a scale in compressed-tensors' files, and of MLX's default
GROUP, MLX_GROUP = 32, 64
WORD_BITS = 32
FP8_LARGEST = 448.0


class Packing(ABC):
    """One way to write matrices [N, K]; vectors and matrices that do not fit stay floats of `dtype`."""

    #: the largest error of a matrix that its rounding may leave: root of the mean square, relative to the values'
    worst: ClassVar[float] = 0.0
    dtype: torch.dtype = torch.bfloat16
    #: whether tables of embeddings are packed too
    packs_tables: ClassVar[bool] = False
    #: whether each expert's matrices are packed by themselves, under names of their own; such that do not fit are
    #: refused
    experts_apart: ClassVar[bool] = False

    def fits(self, module: str, shape: Sequence[int]) -> bool:
        """Whether the matrix of this module is packed, or those of its experts."""
        if module.endswith(EXPERTS):
            return self._divides(shape[-1])
        kept = module.endswith(KEPT) or (module.endswith(TABLES) and not self.packs_tables)
        return len(shape) == 2 and not kept and self._divides(shape[1])

    def _divides(self, columns: int) -> bool:
        return False

    @abstractmethod
    def layout(self, module: str, shape: Sequence[int]) -> Layout:
        """Returns the dtypes and shapes of what stands for a packed matrix, by names in the file."""

    @abstractmethod
    def packed(self, module: str, rows: Tensor) -> Written:
        """Returns what stands for these rows, floats [n, K] in the dtype that they are stored in, or of these experts,
        [n, N, K]."""

    def constants(self, module: str, shape: Sequence[int]) -> Written:
        """Returns what is written once for a matrix, whatever its rows."""
        return {}

    def config(self, kept: Sequence[str]) -> dict[str, Any]:
        """Returns what config.json says of it. `kept`: modules of matrices that are not packed."""
        return {}


@dataclass(frozen=True)
class Floats(Packing):
    """All tensors as one dtype of floating-point numbers."""

    dtype: torch.dtype

    def fits(self, module: str, shape: Sequence[int]) -> bool:
        return False

    def layout(self, module: str, shape: Sequence[int]) -> Layout:
        raise AssertionError("no matrix is packed")

    def packed(self, module: str, rows: Tensor) -> Written:
        raise AssertionError("no matrix is packed")


class _CompressedTensors(Packing):
    """What a config.json of compressed-tensors says, for one group of modules: all of `torch.nn.Linear`.

    Experts are such modules once llm-compressor has taken them apart, and vLLM reads them so.
    """

    format: ClassVar[str]
    experts_apart = True

    def config(self, kept: Sequence[str]) -> dict[str, Any]:
        group = {"targets": ["Linear"], "weights": self.weights(), "input_activations": self.activations(),
                 "output_activations": None}  # fmt: skip
        return {FIELD: {
            "quant_method": "compressed-tensors", "format": self.format, "quantization_status": "compressed",
            "config_groups": {"group_0": group}, "ignore": sorted({*kept, HEAD_MODULE}), "kv_cache_scheme": None,
        }}  # fmt: skip

    def weights(self) -> dict[str, Any]:
        raise NotImplementedError

    def activations(self) -> dict[str, Any] | None:
        return None


@dataclass(frozen=True)
class Integers(_CompressedTensors):
    """`pack-quantized`: whole numbers of 4 or 8 bits, symmetric, in groups of 32 columns with a scale each.

    Element i of a row lies in word i // (32 / bits), at bit bits * (i % (32 / bits)), less the smallest number.
    """

    bits: int
    format = "pack-quantized"
    worst = 0.3

    def _divides(self, columns: int) -> bool:
        return columns % GROUP == 0

    def weights(self) -> dict[str, Any]:
        return {"num_bits": self.bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP,
                "dynamic": False, "actorder": None}  # fmt: skip

    def layout(self, module: str, shape: Sequence[int]) -> Layout:
        rows, columns = shape
        return {
            f"{module}.weight_packed": (torch.int32, torch.Size((rows, columns * self.bits // WORD_BITS))),
            f"{module}.weight_scale": (self.dtype, torch.Size((rows, columns // GROUP))),
            f"{module}.weight_shape": (torch.int64, torch.Size((2,))),
        }

    def constants(self, module: str, shape: Sequence[int]) -> Written:
        return {f"{module}.weight_shape": torch.tensor(list(shape))}

    def packed(self, module: str, rows: Tensor) -> Written:
        numbers, scales = _in_groups(rows, self.bits, self.dtype)
        words = in_words(numbers.int() + (1 << self.bits - 1), self.bits)
        return {f"{module}.weight_packed": words, f"{module}.weight_scale": scales}


@dataclass(frozen=True)
class Float8(_CompressedTensors):
    """`float-quantized`: e4m3 with a scale for each row; activations are rounded by row as they come."""

    format = "float-quantized"
    worst = 0.06

    def _divides(self, columns: int) -> bool:
        return True

    def weights(self) -> dict[str, Any]:
        return {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False}

    def activations(self) -> dict[str, Any]:
        return {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}

    def layout(self, module: str, shape: Sequence[int]) -> Layout:
        return {
            f"{module}.weight": (torch.float8_e4m3fn, torch.Size(shape)),
            f"{module}.weight_scale": (self.dtype, torch.Size((shape[0], 1))),
        }

    def packed(self, module: str, rows: Tensor) -> Written:
        values = rows.float()
        scales = (values.abs().amax(-1, keepdim=True) / FP8_LARGEST).to(self.dtype)
        scaled = values / _nonzero(scales.float())
        rounded = scaled.clamp(-FP8_LARGEST, FP8_LARGEST).to(torch.float8_e4m3fn)
        return {f"{module}.weight": rounded, f"{module}.weight_scale": scales}


@dataclass(frozen=True)
class MlxAffine(Packing):
    """MLX's affine mode: numbers of 4 or 8 bits in groups of 64, each times its group's scale, plus its group's bias.

    As in `mlx.core.quantize` the end of a group's range that is farther from 0 keeps its value, and 0 stays 0. Numbers
    are chosen for the scale and the bias as they are stored. Experts are named as mlx-lm names them, gates apart.
    """

    bits: int
    worst = 0.3
    packs_tables = True

    def _divides(self, columns: int) -> bool:
        return columns % MLX_GROUP == 0

    def config(self, kept: Sequence[str]) -> dict[str, Any]:
        how = {"group_size": MLX_GROUP, "bits": self.bits, "mode": "affine"}
        return {"quantization": how, FIELD: how}

    def layout(self, module: str, shape: Sequence[int]) -> Layout:
        *leading, rows, columns = shape
        packed: Layout = {}
        for name, n in _mlx_modules(module, rows).items():
            groups = torch.Size((*leading, n, columns // MLX_GROUP))
            words = torch.Size((*leading, n, columns * self.bits // WORD_BITS))
            packed |= {f"{name}.weight": (torch.uint32, words), f"{name}.scales": (self.dtype, groups),
                       f"{name}.biases": (self.dtype, groups)}  # fmt: skip
        return packed

    def packed(self, module: str, rows: Tensor) -> Written:
        most = (1 << self.bits) - 1
        groups = rows.float().unflatten(-1, (-1, MLX_GROUP))
        low, high = groups.amin(-1), groups.amax(-1)
        below = low.abs() > high.abs()
        scale = torch.where(below, 1.0, -1.0) * ((high - low) / most).clamp(min=1e-7)
        edge = torch.where(below, low, high)
        steps = (edge / scale).round()
        scale = torch.where(steps == 0, scale, edge / torch.where(steps == 0, torch.ones_like(steps), steps))
        scales, biases = scale.to(self.dtype), torch.where(steps == 0, 0.0, edge).to(self.dtype)
        numbers = ((groups - biases.float()[..., None]) / scales.float()[..., None]).round().clamp(0, most)
        words = in_words(numbers.flatten(-2).int(), self.bits).view(torch.uint32)
        parts, written = _mlx_modules(module, rows.shape[-2]), Written()
        for kind, whole in (("weight", words), ("scales", scales), ("biases", biases)):
            pieces = whole.split(list(parts.values()), -2)
            written |= {f"{name}.{kind}": piece.contiguous() for name, piece in zip(parts, pieces, strict=True)}
        return written


def _mlx_modules(module: str, rows: int) -> dict[str, int]:
    """What mlx-lm calls the modules of a stored matrix, and how many of its rows each has."""
    if not module.endswith(EXPERTS):
        return {module: rows}
    layer, _, name = module.rpartition(".")
    names = [f"{layer}.{SWITCH}.{part}" for part in PRODUCTS[name]]
    return dict.fromkeys(names, rows // len(names))


def in_words(numbers: Tensor, bits: int) -> Tensor:
    """Returns int32 [..., K * bits / 32] of int32 numbers [..., K] of so many bits, the first in the lowest bits."""
    each = WORD_BITS // bits
    words = torch.zeros(*numbers.shape[:-1], numbers.shape[-1] // each, dtype=torch.int32)
    for i in range(each):
        words |= numbers[..., i::each] << bits * i
    return words


def _in_groups(rows: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns int8 numbers [N, K] and scales [N, G] of `dtype`. Groups on a grid of 16 levels stay on it."""
    fitted: type[Grouped] = Int4 if bits == 4 else Int8x32
    numbers, exact_scales = fitted.fitted(rows)
    groups, values = numbers.unflatten(1, (-1, GROUP)).float(), rows.float().unflatten(1, (-1, GROUP))
    nearest = exact_scales.to(dtype)
    best, least = nearest, torch.full(nearest.shape, torch.inf)
    for tried in (nearest, _next(nearest, -1), _next(nearest, 1)):  # a neighbour may stand for the values better
        error = ((groups * tried.float()[..., None]).to(rows.dtype).float() - values).square().sum(-1)
        best, least = torch.where(error < least, tried, best), torch.minimum(error, least)
    lowest = -(1 << bits - 1)
    numbers = (values / _nonzero(best.float())[..., None]).round().clamp(lowest, -lowest - 1)
    return numbers.to(torch.int8).flatten(1), best


def _next(values: Tensor, direction: int) -> Tensor:
    """The next numbers of the same dtype, above or below."""
    return torch.nextafter(values, torch.full_like(values, direction * torch.inf))


def _nonzero(scales: Tensor) -> Tensor:
    return torch.where(scales == 0, torch.ones_like(scales), scales)


#: what is written for a format, by the name of a type
FLOATS = {"BF16": Floats(torch.bfloat16), "F16": Floats(torch.float16), "F32": Floats(torch.float32)}
PACKINGS: dict[str, dict[str, Packing]] = {
    "safetensors": {**FLOATS},
    "compressed-tensors": {"W4A16": Integers(4), "W8A16": Integers(8), "FP8": Float8()},
    "mlx": {**FLOATS, "4BIT": MlxAffine(4), "8BIT": MlxAffine(8)},
}
