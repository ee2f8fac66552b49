"""AutoRound's checkpoints: one that auto-round 0.15.1 wrote (interop/make_auto_round.py), and its other layouts.

`expected.safetensors` has the values that AutoRound's own layers compute with, in half precision.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import (
    CONFIG,
    EXPERTS,
    ONE_BY_ONE,
    awq_parts,
    awq_values,
    check_read,
    gptq_parts,
    one_by_one,
    rounded,
    write_foreign,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from gemma_mtp.checkpoint import load_target
from gemma_mtp.cli import main
from gemma_mtp.config import TextConfig
from gemma_mtp.errors import QuantisationError
from gemma_mtp.measure.memory import inspect_checkpoint

CHECKPOINT = Path(__file__).parent / "auto_round_checkpoint"
BASE = {"quant_method": "auto-round", "autoround_version": "0.15.1", "bits": 4, "group_size": 32, "sym": True,
        "data_type": "int", "block_name_to_quantize": "model.layers", "enable_quanted_input": False}  # fmt: skip


def test_its_own_file() -> None:
    """Matrices of 2, 3, 4 and 8 bits, experts one by one: what its layers make of them, and no more is packed."""
    expected = load_file(CHECKPOINT / "expected.safetensors")
    weights = load_target(CHECKPOINT, torch.float32, strict=True).checkpoint_tensors()
    ours = one_by_one({name: weight.dense() for name, weight in weights.items()})
    assert len(expected) == 25 and expected.keys() <= ours.keys()
    for name, values in expected.items():
        assert torch.equal(ours[name].half(), values), name
    line, *more = inspect_checkpoint(CHECKPOINT).read_as
    kinds = ((1, 2, "rows"), (1, 3, "rows"), (2, 4, "groups of 32"), (19, 4, "rows"), (2, 8, "rows"))
    assert ", ".join(f"{count} of {bits} bits in {parts} with zero points" for count, bits, parts in kinds) in line
    assert more == [ONE_BY_ONE]


@pytest.mark.parametrize(("packing", "model"), [
    ("auto_round", CONFIG), ("auto_round:gptqmodel", CONFIG), ("auto_round:auto_gptq", CONFIG),
    ("auto_round:auto_gptq", EXPERTS),
])  # fmt: skip
@pytest.mark.parametrize("group", [16, 128])
def test_integers(packing: str, group: int, model: TextConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an order of columns; a group that is longer than a row is the row."""

    def pack(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        size = min(group, weight.shape[1])
        numbers, zeros, scales = rounded(weight, size, 4)
        values = (numbers - zeros.repeat_interleave(size, 1)) * scales.repeat_interleave(size, 1)
        return gptq_parts(numbers, zeros, scales, 4, less_one=packing == "auto_round:auto_gptq"), values

    config = {**BASE, "packing_format": packing, "group_size": group, "sym": False}
    write_foreign(tmp_path, pack, {"quantization_config": config}, torch.float16, model)
    check_read(tmp_path, torch.float32, monkeypatch, stored=torch.float16)


def test_awq(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pack(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        numbers, zeros, scales = rounded(weight, 32, 4)
        parts = awq_parts(numbers, zeros, scales)
        return parts, awq_values(parts["/qweight"], parts["/qzeros"], parts["/scales"].float(), 32).T

    config = {**BASE, "packing_format": "auto_round:auto_awq", "extra_config": {"model.layers.0.x": {"bits": 16}}}
    write_foreign(tmp_path, pack, {"quantization_config": config}, torch.float16)
    check_read(tmp_path, torch.float32, monkeypatch, stored=torch.float16)


@pytest.mark.parametrize(("kind", "data_type", "bits"), [
    ("NVFP4", "nv_fp4_with_static_gs", 4), ("MXFP4", "mx_fp", 4), ("MXFP8", "mx_fp", 8),
])  # fmt: skip
def test_floats_of_few_bits(
    kind: str, data_type: str, bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("compressed_tensors")
    from test_compressed_tensors import packer

    def pack(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        parts, values = packer(kind)(weight)
        return {**parts, **({"/input_global_scale": torch.ones(1)} if kind == "NVFP4" else {})}, values

    config = {**BASE, "packing_format": "auto_round:llm_compressor", "data_type": data_type, "bits": bits,
              "act_bits": bits, "act_dynamic": True, "act_data_type": data_type}  # fmt: skip
    write_foreign(tmp_path, pack, {"quantization_config": config}, torch.bfloat16)
    with pytest.raises(Exception, match="activations"):
        check_read(tmp_path, torch.bfloat16, monkeypatch)
    check_read(tmp_path, torch.bfloat16, monkeypatch, strict=False)
    assert len(inspect_checkpoint(tmp_path).notes) == 1  # that, and no tensor without a use


def test_fp8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of 128 as transformers has them, the last of which are smaller."""

    def pack(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        scale = (weight.float().abs().amax().reshape(1, 1) / 448).bfloat16()
        packed = (weight.float() / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
        return {"": packed, "_scale_inv": scale}, packed.float() * scale.float()

    config = {**BASE, "packing_format": "auto_round:fp8", "data_type": "fp", "bits": 8, "act_bits": 8, "fmt": "e4m3",
              "group_size": [128, 128], "weight_block_size": [128, 128], "activation_scheme": "dynamic"}  # fmt: skip
    write_foreign(tmp_path, pack, {"quantization_config": config}, torch.bfloat16)
    check_read(tmp_path, torch.float32, monkeypatch, strict=False, stored=torch.bfloat16)
    assert len(inspect_checkpoint(tmp_path).notes) == 1


@pytest.mark.parametrize(("method", "change"), [
    ("auto-round", {"act_bits": 8}), ("auto-round", {"extra_config": {"model.layers.0.x": {"act_bits": 8}}}),
    ("awq", {"act_bits": 8, "version": "gemm"}), ("gptq", {"act_bits": 8}),
])  # fmt: skip
def test_what_is_rounded_besides_is_said(method: str, change: dict[str, Any], tmp_path: Path) -> None:
    """Also where AutoRound writes another method's format."""

    def pack(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        made = rounded(weight, 16, 4)
        return awq_parts(*made) if method == "awq" else gptq_parts(*made, 4), weight

    config = {**BASE, "quant_method": method, "group_size": 16, "static_kv_dtype": "fp8", **change}
    config |= {"packing_format": "auto_round:auto_gptq"} if method == "auto-round" else {}
    write_foreign(tmp_path, pack, {"quantization_config": config}, torch.float16)
    activations, keys = inspect_checkpoint(tmp_path).notes
    assert "activations" in activations and "keys and values" in keys


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no layout": ({"packing_format": None}, "with packing_format 'None'"),
    "another layout": ({"packing_format": "auto_round:exllamav9"}, "with packing_format 'auto_round:exllamav9'"),
    "no text": ({"packing_format": ["auto_round"]}, "with packing_format"),
    "rotated": ({"rotation_config": {"mode": "hadamard"}}, "with rotation_config"),
    "other bits": ({"bits": 5, "extra_config": {}}, r"qweight of \[.*\] and .*qzeros of"),
    "odd bits": ({"bits": [4], "extra_config": {}}, r"qweight of \[.*\] and .*qzeros of"),
    "bits of one are not said": ({"extra_config": {}}, r"layers\.0\.\S+\.qweight of \[8, 32\] and \S+ of \[1, 8\]"),
    "odd exceptions": ({"extra_config": [1]}, r"with extra_config '\[1\]'"),
    "odd exception": ({"extra_config": {"a": 1}}, "with extra_config"),
    "odd group": ({"group_size": "32"}, r"o_proj\.qweight of \[8, 32\] and \S+ of \[2, 4\]"),
    "no floats of 4 bits": ({"packing_format": "auto_round:llm_compressor"}, "with data_type 'int' of"),
    "not AWQ's bits": ({"packing_format": "auto_round:auto_awq"}, "with other than 4 bits as AWQ's"),
    "nothing packed so": ({"packing_format": "auto_round:fp8"}, "has none that are stored so"),
}  # fmt: skip


@pytest.mark.parametrize("fault", REFUSED)
def test_what_is_not_known_is_refused(fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, said = REFUSED[fault]
    target = shutil.copytree(CHECKPOINT, tmp_path / "target")
    (target / "expected.safetensors").unlink()
    raw = json.loads((target / "config.json").read_text())
    raw["quantization_config"] |= change
    (target / "config.json").write_text(json.dumps(raw))
    with pytest.raises(QuantisationError, match=said):
        load_target(target, torch.float32)
    assert main(["inspect", str(target)]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("shape", [(), (1,), (0, 8), (1, 5), (3, 8)])
def test_zero_points_that_do_not_fit(shape: tuple[int, ...], tmp_path: Path) -> None:
    target = shutil.copytree(CHECKPOINT, tmp_path / "target")
    (target / "expected.safetensors").unlink()
    name = "model.layers.0.self_attn.q_proj.qzeros"
    stored = load_file(target / "model.safetensors")
    assert stored[name].shape == (1, 8)
    save_file({**stored, name: torch.zeros(shape, dtype=torch.int32)}, target / "model.safetensors")
    with pytest.raises(QuantisationError, match=r"q_proj\.qweight of \[4, 64\] and .*q_proj\.qzeros of"):
        load_target(target, torch.float32)
