"""Checkpoints of compressed-tensors, packed by the library itself: what we read is what it unpacks."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import CONFIG, EXPERTS, Pack, check_read, one_by_one, write_foreign
from torch import Tensor

from gemma_mtp.checkpoint import held_bytes, load_target, stored_tensors
from gemma_mtp.checkpoint.quantisations.bits import unpacked
from gemma_mtp.cli import main
from gemma_mtp.config import TextConfig
from gemma_mtp.weight_types import parse_weight_types
from gemma_mtp.weights.fp8 import Fp8
from gemma_mtp.weights.matrix import matrices

pytest.importorskip("compressed_tensors")
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTEGERS: dict[str, dict[str, Any]] = {
    "w4a16 in groups of 32": {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": True},
    "4 bits in rows": {"num_bits": 4, "strategy": "channel", "symmetric": True},
    "4 bits in groups with zero points": {"num_bits": 4, "strategy": "group", "group_size": 16, "symmetric": False},
    "8 bits in rows": {"num_bits": 8, "strategy": "channel", "symmetric": True},
    "8 bits in rows with zero points": {"num_bits": 8, "strategy": "channel", "symmetric": False},
    "3 bits": {"num_bits": 3, "strategy": "group", "group_size": 32, "symmetric": True},
    "6 bits with zero points": {"num_bits": 6, "strategy": "group", "group_size": 32, "symmetric": False},
}
MX = {"type": "float", "strategy": "group", "group_size": 32, "symmetric": True, "scale_dtype": "torch.uint8"}
E8 = {"num_bits": 8, "type": "float", "symmetric": True}
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: ("pack-quantized", args) for name, args in INTEGERS.items()},
    "FP8 in rows": ("float-quantized", {**E8, "strategy": "channel"}),
    "FP8 in one": ("float-quantized", {**E8, "strategy": "tensor"}),
    "FP8 in blocks": ("float-quantized", {**E8, "strategy": "block", "block_structure": [24, 32]}),
    "int8 in rows": ("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": True}),
    "NVFP4": ("nvfp4-pack-quantized", {
        "num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}),
    "MXFP4": ("mxfp4-pack-quantized", {
        "num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True}),
    "MXFP6": ("mxfp6-pack-quantized", {**MX, "num_bits": 6}),
    "MXFP8": ("mxfp8-quantized", {**MX, "num_bits": 8}),
}  # fmt: skip


def compressed(weight: Tensor, format: str, arguments: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
    """What the library stores of a weight, and what it makes of that."""
    args = QuantizationArgs(**arguments)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry(format)
    state = {"weight": weight, **parameters(weight.float(), args, format, weight.dtype)}
    packed = compressor.compress(state, scheme)
    return packed, compressor.decompress(dict(packed), scheme)["weight"]


def parameters(weight: Tensor, args: QuantizationArgs, format: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Scales and zero points of a weight."""
    N, K = weight.shape
    if args.strategy == "block":
        rows, columns = args.block_structure
        padded = torch.nn.functional.pad(weight, (0, -K % columns, 0, -N % rows))
        blocks = padded.unflatten(0, (-1, rows)).unflatten(2, (-1, columns))
        return {"weight_scale": (blocks.abs().amax((1, 3)) / 448).to(dtype)}
    size = {"tensor": None, "channel": K}.get(args.strategy, args.group_size)
    groups = weight.reshape(1, 1, -1) if size is None else weight.unflatten(1, (-1, size))
    low, high = groups.amin(-1), groups.amax(-1)
    if args.type == "float" and args.strategy in ("group", "tensor_group"):
        largest = torch.maximum(low.abs(), high.abs())
        if args.strategy == "group":
            exponent = {4: 2, 6: 2, 8: 8}[args.num_bits]  # of the largest value
            return {"weight_scale": torch.exp2(torch.floor(torch.log2(largest)) - exponent).to(dtype)}
        whole = 448 * 6 / weight.abs().amax().reshape(1)
        return {"weight_scale": (largest / 6 * whole).to(torch.float8_e4m3fn).float(), "weight_global_scale": whole}
    scale, zero = calculate_qparams(low, high, args)
    scale = scale.reshape(1) if size is None else scale
    return {"weight_scale": scale.to(dtype), **({} if args.symmetric else {"weight_zero_point": zero.to(torch.int8)})}


def packer(name: str, dtype: torch.dtype = torch.bfloat16) -> Pack:
    """Returns what packs a weight of this dtype in one of `FORMATS`."""

    def pack(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        packed, values = compressed(weight.to(dtype), *FORMATS[name])
        return {part.removeprefix("weight"): tensor for part, tensor in packed.items()}, values.to(dtype)

    return pack


def config_of(format: str, arguments: dict[str, Any], **more: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {**arguments, "dynamic": False, "actorder": None, "observer": "minmax"},
             "input_activations": None, "output_activations": None}  # fmt: skip
    return {"quant_method": "compressed-tensors", "format": format, "quantization_status": "compressed",
            "config_groups": {"group_0": group}, "ignore": ["lm_head"], "kv_cache_scheme": None, **more}  # fmt: skip


@pytest.mark.parametrize(("name", "dtype", "config"), [
    *((name, torch.bfloat16, CONFIG) for name in FORMATS),  # the library gives FP4 in bfloat16 alone
    *((name, torch.float32, CONFIG) for name in ("w4a16 in groups of 32", "6 bits with zero points", "FP8 in blocks")),
    *((name, torch.bfloat16, EXPERTS) for name in FORMATS),
])  # fmt: skip
def test_values_are_the_librarys(
    name: str, dtype: torch.dtype, config: TextConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loaded in the scales' dtype, every weight is what the library unpacks; whatever is read at once."""
    changes = {"quantization_config": config_of(*FORMATS[name])}
    write_foreign(tmp_path, packer(name, dtype), changes, dtype, config)
    check_read(tmp_path, dtype, monkeypatch)


def test_inspect_has_a_line_for_each_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = {"quantization_config": config_of(*FORMATS["NVFP4"])}
    write_foreign(tmp_path, packer("NVFP4"), changes, config=EXPERTS)
    assert main(["inspect", str(tmp_path)]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert any(line.startswith("experts are stored one by one") for line in lines)


@pytest.mark.parametrize(("name", "config"), [
    *((name, CONFIG) for name in ("FP8 in rows", "FP8 in one", "FP8 in blocks", "int8 in rows")),
    *((name, EXPERTS) for name in ("FP8 in rows", "FP8 in one", "FP8 in blocks")),
])  # fmt: skip
def test_fp8_stays_for_kernels_that_multiply_it(
    name: str, config: TextConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where each row has one scale, with no value rounded; what kernels read of it are the bytes that are stored."""
    format, arguments = FORMATS[name]
    exact: list[Tensor] = []

    def pack(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        packed, values = compressed(weight.bfloat16(), format, arguments)
        if packed["weight"].dtype == torch.float8_e4m3fn and name != "FP8 in blocks":
            exact.append(packed["weight"].float() * packed["weight_scale"].float())
        return {part.removeprefix("weight"): tensor for part, tensor in packed.items()}, values

    write_foreign(tmp_path, pack, {"quantization_config": config_of(format, arguments)}, config=config)
    monkeypatch.setattr("gemma_mtp.checkpoint.tensors.PIECE_BYTES", 3000)
    plain, target = (load_target(tmp_path, torch.bfloat16, fp8=fp8) for fp8 in (False, True))
    weights = target.checkpoint_tensors()
    assert all(torch.equal(weights[key].dense(), weight.dense()) for key, weight in plain.checkpoint_tensors().items())
    kept = one_by_one({key: weight.values() for key, weight in weights.items() if isinstance(weight, Fp8)})
    assert len(kept) == len(exact) and (not kept) == (name not in ("FP8 in rows", "FP8 in one"))
    assert all(any(torch.equal(weight, values) for values in exact) for weight in kept.values())
    for fp8, model in ((False, plain), (True, target)):
        held = sum(tensor.nbytes for matrix in model.checkpoint_tensors().values() for tensor in matrix.kept().values())
        assert held_bytes(tmp_path, "target", torch.bfloat16, None, fp8) == held
    # what is quantised while loading is made of the values, where its columns allow, and what is saved is floats
    quantised = load_target(tmp_path, torch.bfloat16, types=parse_weight_types("target=int8"), fp8=True)
    left = [matrix.stored for matrix in matrices(quantised) if isinstance(matrix.stored, Fp8)]
    assert all(weight.shape[-1] % 64 for weight in left) and len(left) < max(1, len(exact))
    assert all(tensor.dtype == torch.bfloat16 for tensor in stored_tensors(weights).values())


@pytest.mark.parametrize("name", ["FP8 in rows", "FP8 in blocks"])
def test_a_plan_counts_what_stays_as_it_is_stored(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a card with kernels that multiply FP8: to the byte; and floats on a CPU and with PyTorch's operators."""
    changes = {"quantization_config": config_of(*FORMATS[name])}
    write_foreign(tmp_path, packer(name), changes, also=["embed_tokens.weight"])
    sizes = []
    for asked, fp8, types in (("0", False, "none"), ("1", True, "none"), ("1", True, "target=int8")):
        monkeypatch.setenv("GEMMA_MTP_CUDA", asked)
        arguments_of = ["plan", str(tmp_path), "--device", "cuda", "--no-drafter", "--quantize", types, "--json"]
        assert main([*arguments_of, "--bandwidth", "1GB"]) == 0
        read = json.loads(capsys.readouterr().out)
        target = load_target(tmp_path, torch.bfloat16, types=parse_weight_types(types), fp8=fp8)
        held = sum(weight.nbytes for weight in target.checkpoint_tensors().values())
        assert read["choices"][0]["takes"]["weights"] == held
        sizes.append((held, read["gains"][0]["round_seconds"]))
    assert (sizes[1] < sizes[0]) == (name == "FP8 in rows")


@pytest.mark.skipif(not HAS_TRITON, reason="the extra gpu-test is not installed")
def test_kernels_get_the_bytes_that_are_stored(tmp_path: Path) -> None:
    from gemma_mtp.backend.cuda.backend import CudaBackend
    from gemma_mtp.backend.cuda.dots import FP8

    format, arguments = FORMATS["FP8 in rows"]

    def pack(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        packed, values = compressed(weight.bfloat16(), format, arguments)
        return {part.removeprefix("weight"): tensor for part, tensor in packed.items()}, values

    write_foreign(tmp_path, pack, {"quantization_config": config_of(format, arguments)})
    target = load_target(tmp_path, torch.bfloat16, fp8=True)
    held = {tensor.data_ptr() for matrix in matrices(target) for tensor in matrix.stored.kept().values()}
    layers = CudaBackend(target, None, print).on_device.layers  # type: ignore[arg-type]
    for weight in (weight for layer in layers for weight in (layer.qkv, layer.o, layer.gate_up, layer.down)):
        assert weight.kind == FP8 and weight.group >= weight.columns
        assert {weight.data.data_ptr(), weight.scales.data_ptr()} <= held


@pytest.mark.parametrize("bits", range(1, 9))
def test_numbers_of_any_width(bits: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    generator = torch.Generator().manual_seed(bits)
    for count in (1, 31, 32, 100):
        values = torch.randint(-(1 << bits - 1), 1 << bits - 1, (3, count), generator=generator, dtype=torch.int8)
        found = unpacked(pack_to_int32(values, bits), bits, count)
        assert torch.equal(found.int() - (1 << bits - 1), values.int())
