"""Damaged, hostile and unknown checkpoints of other tools' quantisations: refused in one sentence, or read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from gemma_mtp.checkpoint import open_source
from gemma_mtp.errors import GemmaMtpError

WEIGHTS: dict[str, Any] = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
GROUP: dict[str, Any] = {"targets": ["Linear"], "weights": WEIGHTS}
CT: dict[str, Any] = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"a": GROUP}}
I32, U8, F32, F8 = torch.int32, torch.uint8, torch.float32, torch.float8_e4m3fn
STATE = torch.tensor(list(json.dumps({"quant_type": "nf4", "blocksize": 64, "shape": [8, 64]}).encode()), dtype=U8)


def zeros(*shape: int, dtype: torch.dtype = I32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


#: a sound matrix "m" of every format, by its configuration and its tensors
SOUND: dict[str, tuple[dict[str, Any], dict[str, Tensor]]] = {
    "packed": (CT, {"m.weight_packed": zeros(8, 8), "m.weight_scale": zeros(8, 2, dtype=F32),
                    "m.weight_shape": torch.tensor([8, 64])}),
    "FP8": ({**CT, "format": "float-quantized"}, {
        "m.weight": zeros(8, 64, dtype=F8), "m.weight_scale": zeros(8, 1, dtype=F32)}),
    "NVFP4": ({**CT, "format": "nvfp4-pack-quantized"}, {
        "m.weight_packed": zeros(8, 32, dtype=U8), "m.weight_scale": zeros(8, 4, dtype=F8),
        "m.weight_global_scale": torch.ones(1)}),
    "MXFP6": ({**CT, "format": "mxfp6-pack-quantized"}, {
        "m.weight_packed": zeros(8, 48, dtype=U8), "m.weight_scale": zeros(8, 2, dtype=U8)}),
    "MXFP8": ({**CT, "format": "mxfp8-quantized"}, {
        "m.weight": zeros(8, 64, dtype=F8), "m.weight_scale": zeros(8, 2, dtype=U8)}),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, {
        "m.weight": zeros(256, 1, dtype=U8), "m.weight.absmax": zeros(8, dtype=F32),
        "m.weight.quant_map": zeros(16, dtype=F32), "m.weight.quant_state.bitsandbytes__nf4": STATE}),
    "AWQ": ({"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}, {
        "m.qweight": zeros(64, 1), "m.qzeros": zeros(2, 1), "m.scales": zeros(2, 8, dtype=F32)}),
    "GPTQ": ({"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}, {
        "m.qweight": zeros(8, 8), "m.qzeros": zeros(2, 1), "m.scales": zeros(2, 8, dtype=F32), "m.g_idx": zeros(64)}),
    "ModelOpt": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, {
        "m.weight": zeros(8, 32, dtype=U8), "m.weight_scale": zeros(8, 4, dtype=F8), "m.weight_scale_2": torch.ones(()),
    }),
    "AutoRound": ({"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True, "data_type": "int",
                   "packing_format": "auto_round:auto_gptq", "extra_config": {"n": {"bits": 8}}}, {
        "m.qweight": zeros(8, 8), "m.qzeros": zeros(2, 1), "m.scales": zeros(2, 8, dtype=F32)}),
    "FP8 of transformers": ({"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [8, 32]}, {
        "m.weight": zeros(8, 64, dtype=F8), "m.weight_scale_inv": zeros(1, 2, dtype=F32)}),
    "MLX": ({"group_size": 32, "bits": 4}, {
        "m.weight": zeros(8, 8, dtype=torch.uint32), "m.scales": zeros(8, 2, dtype=F32),
        "m.biases": zeros(8, 2, dtype=F32)}),
    "mobile": ({"quant_method": "gemma", "num_bits": 4}, {
        "m.weight": zeros(8, 32, dtype=U8), "m.weight_scale": zeros(8, 1, dtype=F32)}),
}  # fmt: skip


def written(directory: Path, config: Any, tensors: dict[str, Tensor]) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"quantization_config": config}))
    save_file(tensors, directory / "model.safetensors")
    return directory


def matrix(directory: Path) -> Tensor:
    source = open_source(directory)
    (value,) = source.read([(source.tensors()["m.weight"], None)])
    return value


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("place")


@pytest.mark.parametrize("name", SOUND)
def test_the_sound_ones_are_read(name: str, tmp_path: Path) -> None:
    assert matrix(written(tmp_path, *SOUND[name])).shape == (8, 64)


@pytest.mark.parametrize("name", SOUND)
def test_tensors_that_are_missing_or_of_another_shape(name: str, tmp_path: Path) -> None:
    config, tensors = SOUND[name]
    for part, tensor in tensors.items():
        others = {
            "missing": {n: t for n, t in tensors.items() if n != part},
            "longer": {**tensors, part: torch.zeros(77, dtype=torch.float64)},
            "one more": {**tensors, part: tensor.new_zeros((3, *tensor.shape))},
            "empty": {**tensors, part: tensor.new_zeros((0,))},
        }
        for damage in others.values():
            directory = written(tmp_path, config, damage)
            try:
                value = matrix(directory)
            except (GemmaMtpError, KeyError) as error:  # KeyError: no matrix is found, as its name says
                assert "\n" not in str(error)  # noqa: PT017
            else:
                assert value.ndim >= 2


@pytest.mark.parametrize("name", SOUND)
def test_an_unknown_field_is_refused_by_name(name: str, tmp_path: Path) -> None:
    config, tensors = SOUND[name]
    with pytest.raises(GemmaMtpError, match="of the future"):
        matrix(written(tmp_path, {**config, "of the future": 3}, tensors))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=5,
)  # fmt: skip


@settings(max_examples=150)
@given(st.sampled_from(sorted(SOUND)), st.data())
def test_any_configuration_is_read_or_refused(place: Path, name: str, data: st.DataObject) -> None:
    config, tensors = SOUND[name]
    fields = sorted(
        {*config, "bits", "group_size", "config_groups", "mode", "num_bits", "module_quant_configs", "dynamic"}
    )
    changes = data.draw(st.dictionaries(st.sampled_from(fields), JSON, max_size=3))
    changed = {field: value for field, value in changes.items() if field != "quant_method"}
    directory = written(place, {**config, **changed}, tensors)
    try:
        value = matrix(directory)
    except GemmaMtpError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert value.is_floating_point()


@settings(max_examples=100)
@given(st.sampled_from(["packed", "FP8", "NVFP4"]), st.data())
def test_any_group_of_a_configuration_is_read_or_refused(place: Path, name: str, data: st.DataObject) -> None:
    config, tensors = SOUND[name]
    fields = sorted({*GROUP["weights"], "block_structure", "dynamic", "actorder"})
    weights = {**GROUP["weights"], **data.draw(st.dictionaries(st.sampled_from(fields), JSON, max_size=2))}
    directory = written(place, {**config, "config_groups": {"a": {**GROUP, "weights": weights}}}, tensors)
    try:
        value = matrix(directory)
    except GemmaMtpError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert value.shape == (8, 64)
