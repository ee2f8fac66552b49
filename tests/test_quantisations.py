"""Checkpoints in other tools' quantisations, packed by the tools themselves where they install on a CPU."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from foreign import (
    CONFIG,
    EXPERTS,
    SINGLE,
    awq_parts,
    awq_values,
    check_read,
    gptq_parts,
    rounded,
    write_foreign,
)
from models import random_target
from safetensors.torch import load_file, save_file
from torch import Tensor

from gemma_mtp.checkpoint import load_target
from gemma_mtp.checkpoint.quantisations.bits import E2M1, e4m3, e8m0
from gemma_mtp.config import TextConfig
from gemma_mtp.errors import QuantisationError
from gemma_mtp.measure.memory import inspect_checkpoint
from gemma_mtp.weights.fp8 import Fp8

BF16, F32 = torch.bfloat16, torch.float32

# -- bitsandbytes


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("block", "storage", "model"), [
    (64, torch.uint8, CONFIG), (128, torch.bfloat16, CONFIG), (64, torch.uint8, EXPERTS),
])  # fmt: skip
def test_bitsandbytes_4_bits(
    kind: str, nested: bool, block: int, storage: torch.dtype, model: TextConfig, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    functional = pytest.importorskip("bitsandbytes.functional")
    from bitsandbytes.backends.default import ops as generic

    def pack(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        packed, state = functional.quantize_4bit(
            weight, blocksize=block, compress_statistics=nested, quant_type=kind, quant_storage=storage
        )
        parts = {f".{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
        scales = state.absmax
        if nested:
            scales = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        # its kernel for CPUs begins a block with every row, as none of its quantisers does
        values = generic._dequantize_4bit_compute(
            packed.view(torch.uint8).reshape(-1), scales, state.code, block, weight.shape, F32
        )
        if weight.shape[1] % block == 0:
            assert torch.equal(values, functional.dequantize_4bit(packed, state))
        return {"": packed, **parts}, values

    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "_load_in_4bit": True,
              "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": nested}  # fmt: skip
    write_foreign(tmp_path, pack, {"quantization_config": config}, F32, model)
    check_read(tmp_path, F32, monkeypatch, exact=False)
    assert f"of {kind} in blocks of {block}" in inspect_checkpoint(tmp_path).read_as[0]


def test_bitsandbytes_8_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")

    def pack(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        packed, scale, _ = functional.int8_vectorwise_quant(weight.half())
        return {"": packed, "/SCB": scale}, functional.int8_vectorwise_dequant(packed, scale)

    config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    write_foreign(tmp_path, pack, {"quantization_config": config}, F32)
    with pytest.raises(Exception, match="activations"):
        check_read(tmp_path, F32, monkeypatch)
    check_read(tmp_path, F32, monkeypatch, exact=False, strict=False)


# -- MLX


@pytest.mark.parametrize(("mode", "bits", "group"), [
    *(("affine", bits, 32) for bits in (2, 3, 4, 5, 6, 8)), ("mxfp4", 4, 32), ("mxfp8", 8, 32),
    ("nvfp4", 4, 16),
])  # fmt: skip
def test_mlx(mode: str, bits: int, group: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its embeddings and head are packed too; a module may be packed in another way than the rest."""
    mx = pytest.importorskip("mlx.core")

    def pack(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        way = {"bits": bits, "group_size": group}
        if mode == "affine" and weight.shape == (128, 64):  # the MLP's
            way = {"bits": 8, "group_size": 64}
        made = mx.quantize(mx.array(weight.float().numpy()), mode=mode, **way)
        values = mx.dequantize(*made, mode=mode, dtype=mx.float32, **way)
        parts = dict(zip(("", "/scales", "/biases"), (torch.from_numpy(np.array(part)) for part in made), strict=False))
        return parts, torch.from_numpy(np.array(values))

    quantization: dict[str, Any] = {"group_size": group, "bits": bits, "mode": mode}
    if mode == "affine":
        weights = random_target(config=CONFIG).checkpoint_tensors()
        wide = [name for name, weight in weights.items() if weight.shape == (128, 64)]
        quantization |= {name.removesuffix(".weight"): {"bits": 8, "group_size": 64} for name in wide}
    changes = {"quantization": quantization, "quantization_config": quantization}
    write_foreign(tmp_path, pack, changes, F32, also=["embed_tokens.weight"])
    check_read(tmp_path, F32, monkeypatch, exact=False)


# -- AWQ, packed as AutoAWQ 0.2.9 does (modules/linear/gemm.py, utils/packing_utils.py)


@pytest.mark.parametrize(("group", "model"), [(16, CONFIG), (32, CONFIG), (-1, CONFIG), (32, EXPERTS)])
def test_awq(group: int, model: TextConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pack(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        size = weight.shape[1] if group == -1 else group
        numbers, zeros, scales = rounded(weight, size, 4)
        parts = awq_parts(numbers, zeros, scales)
        return parts, awq_values(parts["/qweight"], parts["/qzeros"], parts["/scales"].float(), size).T

    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": group != 16, "version": "gemm",
              "modules_to_not_convert": None, "provider": "auto-round"}  # fmt: skip
    write_foreign(tmp_path, pack, {"quantization_config": config}, torch.float16, model)
    check_read(tmp_path, F32, monkeypatch, stored=torch.float16)


# -- GPTQ, packed as GPTQModel 7.7.0 does (nn_modules/qlinear, pack_original)


@pytest.mark.parametrize(("bits", "group", "sorted_", "format", "model"), [
    (4, 32, False, "gptq", CONFIG), (4, 16, True, "gptq", CONFIG), (4, 32, True, "gptq_v2", CONFIG),
    (8, -1, False, "gptq", CONFIG), (2, 16, False, "gptq_v2", CONFIG), (3, 32, False, "gptq_v2", CONFIG),
    (3, 32, True, "gptq", CONFIG), (2, 16, True, "gptq", CONFIG), (4, 32, True, "gptq", EXPERTS),
])  # fmt: skip
def test_gptq(
    bits: int, group: int, sorted_: bool, format: str, model: TextConfig, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A zero point of 0 is less than none in the first format."""

    def pack(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        size = weight.shape[1] if group == -1 else group
        generator = torch.Generator().manual_seed(3)
        order = torch.arange(weight.shape[1]) // size
        if sorted_:
            order = order[torch.randperm(len(order), generator=generator)]
        weight[0] = weight[0].abs()  # a zero point of 0
        numbers, zeros, scales = rounded(weight, size, bits, order)
        values = (numbers - zeros[:, order]) * scales[:, order]
        if bits == 3 and len(zeros) % 32:  # GPTQModel packs whole threes of words alone
            return {"": weight}, weight
        parts = gptq_parts(numbers, zeros, scales, bits, less_one=format == "gptq")
        return {**parts, "/g_idx": order.int()}, values

    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": sorted_, "sym": False,
              "checkpoint_format": format, "damp_percent": 0.01, "true_sequential": True}  # fmt: skip
    write_foreign(tmp_path, pack, {"quantization_config": config}, torch.float16, model)
    check_read(tmp_path, F32, monkeypatch, stored=torch.float16)


def test_gptq_with_other_settings_of_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPTQModel's `dynamic` has bits and groups of some modules, and modules that stay as they are."""

    def pack(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        bits, size = (8, 64) if weight.shape[1] == 128 else (4, 16)
        if weight.shape[1] == 32:
            return {"": weight}, weight
        numbers, zeros, scales = rounded(weight, size, bits)
        values = (numbers - zeros.repeat_interleave(size, 1)) * scales.repeat_interleave(size, 1)
        return gptq_parts(numbers, zeros, scales, bits), values

    config = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": False,
              "checkpoint_format": "gptq_v2", "provider": "auto-round", "autoround_version": "0.15.1",
              "dynamic": {"-:.*router.*": {}, "-:.*head.*": {"of no matter": 1},
                          "+:.*down_proj.*": {"bits": 8, "group_size": 64}}}  # fmt: skip
    write_foreign(tmp_path, pack, {"quantization_config": config}, torch.float16)
    check_read(tmp_path, F32, monkeypatch, stored=torch.float16)
    line = inspect_checkpoint(tmp_path).read_as[0]
    assert "of 4 bits in groups of 16" in line and "of 8 bits in groups of 64" in line
    for dynamic, said in (
        ({"+:.*down_proj.*": {"bits": 3}}, r"qweight of \[32, 64\] and .*qzeros of \[2, 16\]"),
        ({"+:a": {"act_bits": 8}}, r"with dynamic\.\+:a\.act_bits '8'"), ([1], "with dynamic"),
        ({"a": 1}, "with dynamic"),
    ):  # fmt: skip
        raw = json.loads((tmp_path / "config.json").read_text())
        raw["quantization_config"]["dynamic"] = dynamic
        (tmp_path / "config.json").write_text(json.dumps(raw))
        with pytest.raises(QuantisationError, match=said):
            load_target(tmp_path, F32)


# -- ModelOpt


@pytest.mark.parametrize(("in_config", "model"), [(True, CONFIG), (False, CONFIG), (True, EXPERTS)])
def test_modelopt_nvfp4(in_config: bool, model: TextConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("modelopt")
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    def pack(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        packed, scale, whole = NVFP4QTensor.quantize(weight, 16)
        values = packed.dequantize(scale=scale, double_scale=whole, block_sizes={-1: 16}, dtype=F32)
        return {"": packed._quantized_data, "_scale": scale, "_scale_2": whole}, values

    inner = {"quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": 16, "exclude_modules": ["lm_head"]}
    quantization = {"quantization_config": {**inner, "quant_method": "modelopt"}} if in_config else {}
    write_foreign(tmp_path, pack, quantization, BF16, model)
    if not in_config:
        content = {"producer": {"name": "modelopt", "version": "0.47.0"}, "quantization": inner}
        (tmp_path / "hf_quant_config.json").write_text(json.dumps(content))
    check_read(tmp_path, F32, monkeypatch, exact=False, stored=BF16)


def modelopt_packed(weight: Tensor, algorithm: str) -> tuple[dict[str, Tensor], Tensor]:
    """As its export does: weight / (amax / largest), of all, of a row, of a block or of 32 columns (a power of two)."""
    N, K = weight.shape
    values, largest = weight.float(), 127 if algorithm == "W8A16" else 448
    if algorithm in ("MXFP8", "mxfp4"):
        bits, top = (8, 8) if algorithm == "MXFP8" else (4, 2)
        exponents = torch.floor(torch.log2(values.unflatten(1, (-1, 32)).abs().amax(-1))) - top
        each = torch.exp2(exponents).repeat_interleave(32, 1)
        stored = (exponents + 127).to(torch.uint8)
        if bits == 8:
            packed = (values / each).clamp(-448, 448).to(torch.float8_e4m3fn)
            return {"": packed, "_scale": stored}, packed.float() * each
        codes = (values / each)[..., None].sub(E2M1).abs().argmin(-1)
        return {"": (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8), "_scale": stored}, E2M1[codes] * each
    if algorithm == "fp8_pb_wo":
        padded = torch.nn.functional.pad(values, (0, -K % 128, 0, -N % 128))
        blocks = padded.unflatten(1, (-1, 128)).unflatten(0, (-1, 128)).abs().amax((1, 3)) / largest
        scale, each = blocks[:, None, :, None], blocks.repeat_interleave(128, 0)[:N].repeat_interleave(128, 1)[:, :K]
    else:
        scale = values.abs().amax() if algorithm == "FP8" else values.abs().amax(1)
        scale = scale / largest
        each = scale if algorithm == "FP8" else scale[:, None]
    packed = (values / each).round().to(torch.int8) if largest == 127 else (values / each).to(torch.float8_e4m3fn)
    static = {"/input_scale": torch.ones(())} if algorithm == "FP8" else {}
    return {"": packed, "_scale": scale, **static}, packed.float() * each


@pytest.mark.parametrize(("algorithm", "model"), [
    *itertools.product(["FP8", "FP8_PER_CHANNEL_PER_TOKEN", "fp8_pb_wo", "MXFP8", "mxfp4", "W8A16"], [CONFIG, EXPERTS]),
    ("fp8_pb_wo", dataclasses.replace(CONFIG, intermediate_size=192)),  # blocks at the edges are smaller
])  # fmt: skip
def test_modelopt_by_formula(
    algorithm: str, model: TextConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FP8 with one scale for a row or matrix can stay so for kernels that multiply it."""
    config = {
        "quant_method": "modelopt",
        "quant_algo": algorithm,
        "producer": {"name": "modelopt"},
        "ignore": ["lm_head"],
    }
    changes = {"quantization_config": config}
    write_foreign(tmp_path, functools.partial(modelopt_packed, algorithm=algorithm), changes, BF16, model)
    weights_only = algorithm in ("fp8_pb_wo", "W8A16")
    if not weights_only:
        with pytest.raises(Exception, match="activations"):
            check_read(tmp_path, F32, monkeypatch)
    check_read(tmp_path, F32, monkeypatch, strict=weights_only, stored=BF16)
    kept, floats = (load_target(tmp_path, BF16, fp8=fp8).checkpoint_tensors() for fp8 in (True, False))
    are_fp8 = [name for name, weight in kept.items() if isinstance(weight, Fp8)]
    assert bool(are_fp8) == (algorithm in ("FP8", "FP8_PER_CHANNEL_PER_TOKEN"))
    assert all(torch.equal(kept[name].dense(), floats[name].dense()) for name in are_fp8)


@pytest.mark.parametrize(("change", "said"), [
    ({"x.pre_quant_scale": torch.ones(64)}, r"scales of inputs \(x\.pre_quant_scale\)"),
    ({"model.layers.0.mlp.up_proj.weight_scale": torch.ones(5)}, r"of F32 \[5\], but for modelopt F32 .* was expected"),
    ({"model.layers.0.mlp.up_proj.weight_scale": torch.ones(3, 1, 1, 1)}, r"weight_scale of \[3, 1, 1, 1\] for"),
    ({"model.layers.0.mlp.up_proj.weight_scale": torch.ones(1, 2, 1, 1)}, r"\[1, 2, 1, 1\], but for modelopt"),
    ({"model.layers.0.mlp.up_proj.weight_scale": torch.ones(128, 3).byte()}, r"of U8 \[128, 3\], but for modelopt"),
])  # fmt: skip
def test_modelopt_refuses(change: dict[str, Tensor], said: str, tmp_path: Path) -> None:
    config = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}
    write_foreign(tmp_path, functools.partial(modelopt_packed, algorithm="FP8"), {"quantization_config": config}, BF16)
    save_file({**load_file(tmp_path / SINGLE), **change}, tmp_path / SINGLE)
    with pytest.raises(QuantisationError, match=said):
        load_target(tmp_path, F32)


# -- transformers' FP8, by its own operations


@pytest.mark.parametrize(("block", "scales", "model"), [
    ((16, 32), "float", CONFIG), ((8, 8), "ue8m0", CONFIG), (None, "float", CONFIG), ((16, 32), "float", EXPERTS),
    ((64, 64), "ue8m0", EXPERTS), (None, "float", EXPERTS), ((8, 8), "ue8m0 in bytes", CONFIG),
])  # fmt: skip
def test_fp8(
    block: tuple[int, int] | None, scales: str, model: TextConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matrices that are no whole blocks stay as they are; experts are packed together."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

    scale_format, *in_bytes = scales.split(" in ")
    how = SimpleNamespace(quantization_config=SimpleNamespace(weight_block_size=block, scale_fmt=scale_format))
    seen = set()

    def pack(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        made = Fp8Quantize(how)._quantize_one("weight", weight)
        if "weight_scale_inv" not in made:
            return {"": weight}, weight
        seen.add(weight.ndim)
        packed, scale = made["weight"], made["weight_scale_inv"]
        scale = scale.view(torch.uint8) if in_bytes else scale
        return {"": packed, "_scale_inv": scale}, Fp8Dequantize(how)._dequantize_one(packed, scale, F32)

    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "modules_to_not_convert": ["lm_head"],
              "weight_block_size": None if block is None else list(block), "scale_fmt": scale_format,
              "expert_dtype": "fp8"}  # fmt: skip
    write_foreign(tmp_path, pack, {"quantization_config": config}, BF16, model, also=["experts."], apart=False)
    assert seen == ({2, 3} if model is EXPERTS else {2})
    with pytest.raises(Exception, match="activations"):
        check_read(tmp_path, F32, monkeypatch)
    check_read(tmp_path, F32, monkeypatch, strict=False, stored=BF16)


def test_fp8_blocks_at_the_edges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As DeepSeek's tools write them: the last blocks of rows and columns are smaller."""
    rows, columns = 24, 40

    def pack(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        N, K = weight.shape
        scale = torch.rand(-(-N // rows), -(-K // columns), generator=torch.Generator().manual_seed(N)) * 0.01 + 0.001
        each = scale.repeat_interleave(rows, 0)[:N].repeat_interleave(columns, 1)[:, :K]
        packed = (weight.float() / each).clamp(-448, 448).to(torch.float8_e4m3fn)
        return {"": packed, "_scale_inv": scale}, packed.float() * each

    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [rows, columns],
              "fmt": "e4m3"}  # fmt: skip
    write_foreign(tmp_path, pack, {"quantization_config": config}, BF16)
    check_read(tmp_path, F32, monkeypatch, strict=False, stored=BF16)


@pytest.mark.parametrize("end", ["_scale", "_scale_inv"])
def test_fp8_with_one_scale(end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It can stay FP8 for kernels that multiply it."""

    def pack(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        scale = (weight.float().abs().amax() / 448).reshape(1)
        packed = (weight.float() / scale).to(torch.float8_e4m3fn)
        return {"": packed, end: scale, "/input_scale": torch.ones(1)}, packed.float() * scale

    config = {"quant_method": "fp8", "activation_scheme": "static"}
    write_foreign(tmp_path, pack, {"quantization_config": config}, BF16)
    check_read(tmp_path, F32, monkeypatch, strict=False, stored=BF16)
    kept = load_target(tmp_path, BF16, fp8=True).checkpoint_tensors().values()
    assert sum(isinstance(weight, Fp8) for weight in kept) > 10


# -- Google's mobile checkpoints, packed as the description of transformers' reader says (test_mobile has its own files)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_mobile(bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pack(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        table = weight.shape[0] == 61
        blocks = 4 if table else 1
        own = 4 if table else bits
        groups = weight.float().unflatten(1, (blocks, -1))
        scale = groups.abs().amax(-1) / (2 ** (own - 1) - 1)
        numbers = (groups / scale[..., None]).round().flatten(1).to(torch.int8)
        values = (numbers.unflatten(1, (blocks, -1)) * scale[..., None]).flatten(1)
        if own == 8:
            return {"": numbers, "_scale": scale}, values
        each = 8 // own
        lanes = (numbers.int() + 2 ** (own - 1)).unflatten(1, (-1, each))
        packed = sum(lanes[..., i] << (own * i) for i in range(each)).to(torch.uint8)
        if table:
            return {"/embedding_quantized": packed, "/embedding_scale": scale}, values
        return {"": packed, "_scale": scale, "/input_activation_scale": torch.zeros(())}, values

    config = {"quant_method": "gemma", "num_bits": bits, "quantize_embeddings": True,
              "module_quant_configs": {r"embed_tokens": {"num_bits": 4}}}  # fmt: skip
    write_foreign(tmp_path, pack, {"quantization_config": config}, F32, also=["embed_tokens.weight"])
    check_read(tmp_path, F32, monkeypatch)


# -- numbers


def test_floats_of_few_bits_are_the_formats() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    powers = torch.tensor([2.0 ** (i - 127) for i in range(255)], dtype=torch.float64)
    assert torch.equal(e8m0(codes)[:255].double(), powers)
    assert e8m0(codes)[255].isnan()
    assert torch.equal(e4m3(codes[:127]), codes[:127].view(torch.float8_e4m3fn).float())
    signs = torch.where(torch.arange(16) < 8, 1.0, -1.0)
    magnitudes = [(1 + m / 2) * 2.0 ** (e - 1) if e else m / 2 for e in range(4) for m in range(2)]
    assert torch.equal(E2M1, signs * torch.tensor(magnitudes * 2))
