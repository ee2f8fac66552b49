"""Checkpoints in other tools' quantisations: a tiny target whose matrices a tool's own functions packed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import PLE, F, S, random_target
from safetensors.torch import load_file, save_file
from torch import Tensor

from gemma_mtp.checkpoint import load_target, save_target, stored_dtypes
from gemma_mtp.checkpoint.quantised_copy import write_quantised_copy
from gemma_mtp.config import TargetConfig, TextConfig
from gemma_mtp.measure.memory import inspect_checkpoint
from gemma_mtp.weight_types import parse_weight_types

#: a layer of each kind, and one that reads another's keys
CONFIG = dataclasses.replace(PLE, num_hidden_layers=3, layer_types=(S, F, F), num_kv_shared_layers=1)
SINGLE = "model.safetensors"
EXPECTED = "expected.pt"
#: what a tool stores of a weight [out, in], by what comes after `weight` in their names ("" for the weight itself;
#: "/name" for what stands beside it), and the values that its own functions make of that
Pack = Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]


def write_foreign(
    directory: Path, pack: Pack, changes: dict[str, Any], dtype: torch.dtype = torch.bfloat16,
    config: TextConfig = CONFIG, also: Iterable[str] = (),
) -> None:  # fmt: skip
    """Write a target whose linear layers are packed, and those named in `also`; `changes` go to config.json."""
    save_target(random_target(config=config), TargetConfig(config), directory, dtype)
    stored, expected = load_file(directory / SINGLE), {}
    written: dict[str, Tensor] = {}
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
    torch.save(expected, directory / EXPECTED)


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
    (line,) = inspect_checkpoint(directory).read_as
    assert "read as floats" in line
    write_quantised_copy(directory, directory / "copy", types)
    copied = load_target(directory / "copy", stored or dtype)
    ids = torch.arange(12)[None] * 5 % PLE.vocab_size
    with torch.inference_mode():
        assert torch.equal(*(each.logits(each.forward_sequence(ids).hidden_BTD) for each in (loaded, copied)))
