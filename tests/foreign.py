"""Checkpoints in other tools' quantisations: a tiny target whose matrices a tool's own functions packed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

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
ONE_BY_ONE = "experts are stored one by one, and put together as they are read"
PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
SINGLE = "model.safetensors"
EXPECTED = "expected.pt"
#: what a tool stores of a weight [out, in], by what comes after `weight` in their names ("" for the weight itself;
#: "/name" for what stands beside it), and the values that its own functions make of that
Pack = Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]


def write_foreign(
    directory: Path, pack: Pack, changes: dict[str, Any], dtype: torch.dtype = torch.bfloat16,
    config: TextConfig = CONFIG, also: Iterable[str] = (),
) -> None:  # fmt: skip
    """Write a target whose linear layers are packed, those of experts one by one, and those named in `also`; `changes`
    go to config.json."""
    save_target(random_target(config=config), TargetConfig(config), directory, dtype)
    stored, expected = load_file(directory / SINGLE), {}
    written: dict[str, Tensor] = {}
    for name, tensor in one_by_one(stored, between="moe." if dtype == torch.float16 else "").items():
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
    torch.save(together(expected), directory / EXPECTED)


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
    assert "read as floats" in line and more == ([ONE_BY_ONE] if any("experts." in name for name in expected) else [])
    write_quantised_copy(directory, directory / "copy", types)
    copied = load_target(directory / "copy", stored or dtype)
    ids = torch.arange(12)[None] * 5 % PLE.vocab_size
    with torch.inference_mode():
        assert torch.equal(*(each.logits(each.forward_sequence(ids).hidden_BTD) for each in (loaded, copied)))
