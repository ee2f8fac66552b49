"""Checkpoints in other tools' quantisations: a tiny target whose matrices a tool's own functions packed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import PLE, WIDE, F, S, random_target
from safetensors.torch import load_file, save_file
from torch import Tensor

from gemma_mtp.checkpoint import load_target, save_target, stored_dtypes
from gemma_mtp.checkpoint.quantised_copy import write_quantised_copy
from gemma_mtp.config import TargetConfig, TextConfig
from gemma_mtp.measure.memory import inspect_checkpoint
from gemma_mtp.weight_types import parse_weight_types

#: a layer of each kind, and one that reads another's keys
CONFIG = dataclasses.replace(PLE, num_hidden_layers=3, layer_types=(S, F, F), num_kv_shared_layers=1)
#: whose experts are stored one by one, as tools do that quantise linear layers alone
EXPERTS = dataclasses.replace(WIDE["moe"], num_hidden_layers=2, layer_types=(S, F), num_experts=3)
AWQ_ORDER, AWQ_REVERSE_ORDER = [0, 2, 4, 6, 1, 3, 5, 7], [0, 4, 1, 5, 2, 6, 3, 7]
ONE_BY_ONE = "experts are stored one by one, and put together as they are read"
PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
SINGLE = "model.safetensors"
EXPECTED = "expected.pt"
#: what a tool stores of a weight [out, in], by what comes after `weight` in their names ("" for the weight itself;
#: "/name" for what stands beside it), and the values that its own functions make of that
Pack = Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]


def write_foreign(
    directory: Path, pack: Pack, changes: dict[str, Any], dtype: torch.dtype = torch.bfloat16,
    config: TextConfig = CONFIG, also: Iterable[str] = (), apart: bool = True,
) -> None:  # fmt: skip
    """Write a target whose linear layers are packed, those of experts one by one unless not `apart`, and those named in
    `also`; `changes` go to config.json."""
    save_target(random_target(config=config), TargetConfig(config), directory, dtype)
    stored, expected = load_file(directory / SINGLE), {}
    written: dict[str, Tensor] = {}
    if apart:
        stored = one_by_one(stored, between="moe." if dtype == torch.float16 else "")
    for name, tensor in stored.items():
        linear = tensor.ndim == 2 and ("_proj" in name or "_gate" in name or "per_layer_pro" in name) and (
            "router" not in name
        )  # fmt: skip
        if not linear and not any(part in name for part in also):
            written[name] = expected[name] = tensor
            continue
        parts, expected[name] = pack(tensor)
        for end, part in parts.items():
            place = name.removesuffix(".weight") + "." + end[1:] if end.startswith("/") else name + end
            written[place] = part.contiguous().clone()
    save_file(written, directory / SINGLE)
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**raw, **changes}))
    torch.save(together(expected) if apart else expected, directory / EXPECTED)


def one_by_one(tensors: dict[str, Tensor], between: str = "") -> dict[str, Tensor]:
    """The same with every expert's matrices apart, as llm-compressor's modeling/gemma4.py takes them; some tools have
    `moe.` before `experts.`."""
    apart: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.ndim != 3:
            apart[name] = tensor
            continue
        layer, product = name.split("experts.")
        for expert, matrix in enumerate(tensor):
            parts = matrix.chunk(2) if product == "gate_up_proj" else [matrix]
            for part, rows in zip(PARTS[product], parts, strict=True):
                apart[f"{layer}{between}experts.{expert}.{part}.weight"] = rows.contiguous()
    return apart


def together(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse."""
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if "experts." not in name:
            whole[name] = tensor
        elif "experts.0." in name and ".up_proj" not in name:
            layer, _, part = name.removesuffix(".weight").partition("experts.0.")
            product = "down_proj" if part == "down_proj" else "gate_up_proj"
            rows = []
            for expert in range(EXPERTS.num_experts):
                matrices = [tensors[f"{layer}experts.{expert}.{each}.weight"] for each in PARTS[product]]
                rows.append(torch.cat(matrices))
            whole[f"{layer.removesuffix('moe.')}experts.{product}"] = torch.stack(rows)
    return whole


def check_read(
    directory: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, exact: bool = True, strict: bool = True,
    stored: torch.dtype | None = None,
) -> None:  # fmt: skip
    """Hold what is loaded against what the tool makes of the file, read whole and in pieces, and quantised.

    Not `exact`: the tool rounds on its way. `stored`: the dtype of what is not packed.
    """
    expected = torch.load(directory / EXPECTED, weights_only=True)
    most, near = (0.0, 0.0) if exact else (1e-6, 1e-6 if dtype == torch.float32 else 1e-2)
    for nbytes in (1 << 25, 7000):
        monkeypatch.setattr("gemma_mtp.checkpoint.tensors.PIECE_BYTES", nbytes)
        weights = load_target(directory, dtype, strict=strict).checkpoint_tensors()
        ours = {name: weight.dense() for name, weight in weights.items()}
        assert ours.keys() == expected.keys()
        for name, tensor in ours.items():
            assert tensor.dtype == dtype
            try:
                torch.testing.assert_close(tensor, expected[name].to(dtype), atol=most, rtol=near)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from None
    types = parse_weight_types("int8")
    loaded = load_target(directory, stored or dtype, types=types)
    monkeypatch.setattr("gemma_mtp.checkpoint.tensors.PIECE_BYTES", 1 << 25)  # what is copied below
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    assert stored_dtypes(directory) == {names[stored or dtype]}
    line, *more = inspect_checkpoint(directory).read_as
    apart = any("experts.0." in name for name in load_file(directory / SINGLE))
    assert "read as floats" in line and more == ([ONE_BY_ONE] if apart else [])
    write_quantised_copy(directory, directory / "copy", types)
    copied = load_target(directory / "copy", stored or dtype)
    ids = torch.arange(12)[None] * 5 % PLE.vocab_size
    with torch.inference_mode():
        assert torch.equal(*(each.logits(each.forward_sequence(ids).hidden_BTD) for each in (loaded, copied)))


def awq_packed(numbers: Tensor) -> Tensor:
    """As WQLinear_GEMM.from_linear."""
    packed = torch.zeros(numbers.shape[0], numbers.shape[1] // 8, dtype=torch.int32)
    for column in range(numbers.shape[1] // 8):
        for i in range(8):
            packed[:, column] |= numbers[:, column * 8 + AWQ_ORDER[i]] << (i * 4)
    return packed


def awq_parts(numbers: Tensor, zeros: Tensor, scales: Tensor) -> dict[str, Tensor]:
    """What AWQ stores of what `rounded` returns."""
    return {"/qweight": awq_packed(numbers.T.contiguous()), "/qzeros": awq_packed(zeros.T.contiguous()),
            "/scales": scales.T.half()}  # fmt: skip


def awq_values(qweight: Tensor, qzeros: Tensor, scales: Tensor, group: int) -> Tensor:
    """As dequantize_gemm."""
    shifts = torch.arange(0, 32, 4)
    iweights = torch.bitwise_right_shift(qweight[:, :, None], shifts[None, None, :]).to(torch.int8).flatten(1)
    izeros = torch.bitwise_right_shift(qzeros[:, :, None], shifts[None, None, :]).to(torch.int8).flatten(1)
    order = torch.arange(iweights.shape[-1]).view(-1, 8)[:, AWQ_REVERSE_ORDER].view(-1)
    iweights, izeros = iweights[:, order] & 15, izeros[:, order] & 15
    return (iweights - izeros.repeat_interleave(group, 0)) * scales.repeat_interleave(group, 0)


def rounded(weight: Tensor, size: int, bits: int, order: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers [out, in], zero points and scales [out, groups]; column i is of group order[i]."""
    columns = weight.float() if order is None else weight.float()[:, torch.argsort(order, stable=True)]
    groups = columns.unflatten(1, (-1, size))
    low, high = groups.amin(-1), groups.amax(-1)
    scales = ((high - low) / (2**bits - 1)).half().float().clamp_min(1e-4)
    zeros = (-low / scales).round().clamp(0, 2**bits - 1)
    numbers = ((groups / scales[..., None]).round() + zeros[..., None]).clamp(0, 2**bits - 1).flatten(1).int()
    if order is not None:
        numbers = numbers[:, torch.argsort(torch.argsort(order, stable=True))]
    return numbers, zeros.int(), scales


def gptq_packed(numbers: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any]:
    """Along the first dimension."""
    packed = np.zeros((-(-numbers.shape[0] * bits // 32), numbers.shape[1]), dtype=np.uint32)
    numbers = numbers.astype(np.uint32)
    if bits != 3:
        each = 32 // bits
        for row in range(packed.shape[0]):
            for j in range(min(each, numbers.shape[0] - row * each)):
                packed[row] |= numbers[row * each + j] << np.uint32(bits * j)
        return packed
    i = row = 0
    while row < packed.shape[0]:
        for j in range(i, i + 10):
            packed[row] |= numbers[j] << np.uint32(3 * (j - i))
        i += 10
        packed[row] |= numbers[i] << np.uint32(30)
        row += 1
        packed[row] |= (numbers[i] >> np.uint32(2)) & np.uint32(1)
        i += 1
        for j in range(i, i + 10):
            packed[row] |= numbers[j] << np.uint32(3 * (j - i) + 1)
        i += 10
        packed[row] |= numbers[i] << np.uint32(31)
        row += 1
        packed[row] |= (numbers[i] >> np.uint32(1)) & np.uint32(3)
        i += 1
        for j in range(i, i + 10):
            packed[row] |= numbers[j] << np.uint32(3 * (j - i) + 2)
        i += 10
        row += 1
    return packed


def gptq_parts(numbers: Tensor, zeros: Tensor, scales: Tensor, bits: int, less_one: bool = False) -> dict[str, Tensor]:
    """What GPTQ stores of what `rounded` returns.

    The first format holds zero points less one: of whole words, so that one of 0 borrows from the next; of 3 bits, of
    each by itself (GPTQModel's utils/model.py, convert_gptq_v2_to_v1_format_module).
    """
    packed_zeros = gptq_packed((zeros.numpy() - (less_one and bits == 3)) & 2**bits - 1, bits)
    if less_one and bits != 3:
        packed_zeros = packed_zeros - np.uint32({2: 0x55555555, 4: 0x11111111, 8: 0x01010101}[bits])
    parts = {"/qweight": gptq_packed(numbers.T.numpy(), bits), "/qzeros": packed_zeros.T.copy()}
    made = {name: torch.from_numpy(array.view(np.int32)) for name, array in parts.items()}
    return {**made, "/scales": scales.T.half()}
