"""Checkpoint directories: what transformers wrote, what we write, what is refused, and what loading takes."""

import dataclasses
import json
import logging
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import TINY, random_drafter, random_target, same_weights, zero_target
from oracle import FAMILIES, build_drafter, build_target
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from gemma_mtp.checkpoint import (
    load_drafter,
    load_target,
    read_config,
    read_drafter_config,
    read_generation_config,
    read_headers,
    read_target_config,
    save_drafter,
    save_target,
    stored_tensors,
)
from gemma_mtp.config import PRESETS, DrafterConfig, TargetConfig
from gemma_mtp.config.generation import GenerationDefaults
from gemma_mtp.errors import CheckpointError, GemmaMtpError
from gemma_mtp.model.drafter import Drafter
from gemma_mtp.model.target import Target

Checkpoints = Callable[[str], tuple[Path, Path]]
Load = Callable[[Path, torch.dtype], Any]
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
ORDERING = "masked_embedding.token_ordering"


def same_tensors(stored: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert stored.keys() == expected.keys()
    assert [name for name in stored if not torch.equal(stored[name], expected[name])] == []
    assert [name for name in stored if stored[name].dtype != expected[name].dtype] == []


def write_shards(directory: Path, tensors: dict[str, Tensor], count: int = 3) -> None:
    """Replace model.safetensors by shards and their index."""
    (directory / SINGLE).unlink()
    names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    weight_map = {name: names[i % count] for i, name in enumerate(tensors)}
    for file in names:
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, directory / file)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")


def edit(directory: Path, **changes: Tensor | None) -> None:
    """Rewrite model.safetensors with tensors replaced, or dropped where None; `__` stands for a dot."""
    tensors = load_file(directory / SINGLE)
    for name, tensor in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    save_file(tensors, directory / SINGLE)


# -- the official layout


@pytest.mark.parametrize(("size", "parameters", "file_bytes"), [
    ("E2B", 77_731_332, 157_565_344),
    ("E4B", 78_517_764, 159_138_208),
    ("12B", 422_856_964, 845_719_296),
    ("26B-A4B", 419_711_236, None),
    ("31B", 469_518_596, 939_042_560),
])  # fmt: skip
def test_drafters_have_the_official_parameters_and_bytes(size: str, parameters: int, file_bytes: int | None) -> None:
    """Every floating tensor counts, layer_scalar too; token_ordering does not. The file's size is exact as its header
    holds the tensors' names and shapes."""
    config = PRESETS[f"gemma-4-{size}-it-assistant"]
    assert isinstance(config, DrafterConfig)
    with torch.device("meta"):
        tensors = Drafter(config).checkpoint_tensors()
    assert sum(tensor.numel() for tensor in tensors.values() if tensor.dtype.is_floating_point) == parameters
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(tensors, key=lambda name: (tensors[name].dtype.is_floating_point, name)):  # int64 first
        start, end = end, end + tensors[name].numel() * (2 if tensors[name].dtype.is_floating_point else 8)
        dtype = "BF16" if tensors[name].dtype.is_floating_point else "I64"
        header[name] = {"dtype": dtype, "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    header_bytes = len(json.dumps(header, separators=(",", ":")))
    total = 8 + -(-header_bytes // 8) * 8 + end
    if file_bytes is None:  # known as "about 839.4e6"
        assert round(total / 1e6, 1) == 839.4
    else:
        assert total == file_bytes


def official_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The text tensors of a model of transformers, by their text-only names and without the tied head."""
    state = {name.replace("model.language_model.", "model.", 1): tensor for name, tensor in model.state_dict().items()}
    outside = ("vision", "audio", "lm_head", "rotary_emb", "embed_scale")
    return {name: tensor for name, tensor in state.items() if not any(part in name for part in outside)}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_wrote_loads_exactly(checkpoints: Checkpoints, family: str) -> None:
    target_dir, drafter_dir = checkpoints(family)
    target, drafter = load_target(target_dir, torch.float32), load_drafter(drafter_dir, torch.float32)
    same_tensors(stored_tensors(target.checkpoint_tensors()), official_tensors(build_target(family)))
    theirs = official_tensors(build_drafter(family, centroids=family in ("e2b", "e4b")))
    same_tensors(stored_tensors(drafter.checkpoint_tensors()), theirs)
    assert not target.training
    assert not any(parameter.requires_grad for model in (target, drafter) for parameter in model.parameters())


@pytest.mark.parametrize("family", ["e2b", "12b", "26b", "text"])
def test_shards_that_transformers_wrote_load_exactly(checkpoints: Checkpoints, family: str, tmp_path: Path) -> None:
    build_target(family).save_pretrained(tmp_path / "target", max_shard_size="90KB")
    build_drafter(family, centroids=family == "e2b").save_pretrained(tmp_path / "drafter", max_shard_size="20KB")
    loaders: tuple[Callable[..., Target | Drafter], ...] = (load_target, load_drafter)
    for kind, load, single in zip(("target", "drafter"), loaders, checkpoints(family), strict=True):
        assert len(list((tmp_path / kind).glob("*.safetensors"))) > 2
        assert not (tmp_path / kind / SINGLE).exists()
        ours = load(tmp_path / kind, torch.float32)
        same_weights(ours.checkpoint_tensors(), load(single, torch.float32).checkpoint_tensors())


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asked", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip(stored: torch.dtype, asked: torch.dtype, tmp_path: Path) -> None:
    """Loaded weights are the saved ones rounded to the stored dtype, then to the one asked for."""
    target, drafter = random_target(), random_drafter(centroids=True)
    target_config = TargetConfig(TINY, "gemma4")
    save_target(target, target_config, tmp_path / "t", stored)
    save_drafter(drafter, drafter.config, tmp_path / "d", stored)
    assert (read_target_config(tmp_path / "t"), read_drafter_config(tmp_path / "d")) == (target_config, drafter.config)
    assert {h.dtype for h in read_headers(tmp_path / "t").values()} == {
        {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[stored]
    }
    dtype_name = json.loads((tmp_path / "t" / "config.json").read_text(encoding="utf-8"))["dtype"]
    assert f"torch.{dtype_name}" == str(stored)
    for original, loaded in (
        (target, load_target(tmp_path / "t", asked)), (drafter, load_drafter(tmp_path / "d", asked)),
    ):  # fmt: skip
        expected = stored_tensors(original.checkpoint_tensors()).items()
        same_tensors(
            stored_tensors(loaded.checkpoint_tensors()),
            {name: x.to(stored).to(asked) if x.is_floating_point() else x for name, x in expected},
        )
    assert {file.name for file in (tmp_path / "t").iterdir()} == {SINGLE, "config.json"}


@pytest.mark.parametrize(("model_type", "prefix"), [("gemma4_text", "model."), ("gemma4", "model.language_model.")])
def test_target_tensors_have_the_layouts_prefix(model_type: str, prefix: str, tmp_path: Path) -> None:
    save_target(random_target(), TargetConfig(TINY, model_type), tmp_path, torch.float32)
    assert all(name.startswith(prefix) for name in read_headers(tmp_path))
    assert f"{prefix}embed_tokens.weight" in read_headers(tmp_path)


def test_untied_heads_survive(tmp_path: Path) -> None:
    untied = dataclasses.replace(TINY, tie_word_embeddings=False)
    for model_type in ("gemma4_text", "gemma4"):
        target = random_target(config=untied)
        save_target(target, TargetConfig(untied, model_type), tmp_path / model_type, torch.float32)
        assert "lm_head.weight" in read_headers(tmp_path / model_type)
        loaded = load_target(tmp_path / model_type, torch.float32)
        same_weights(loaded.checkpoint_tensors(), target.checkpoint_tensors())


def test_vision_and_audio_tensors_are_skipped_with_one_notice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    target = random_target()
    save_target(target, TargetConfig(TINY, "gemma4"), tmp_path, torch.float32)
    towers = {
        "model.vision_tower.encoder.weight": torch.zeros(300, 1000),
        "model.vision_tower.std_bias": torch.zeros(250, dtype=torch.int8),
        "model.audio_tower.layers.0.weight": torch.zeros(500, 100, dtype=torch.bfloat16),
    }
    save_file({**load_file(tmp_path / SINGLE), **towers}, tmp_path / SINGLE)
    with caplog.at_level(logging.DEBUG, logger="gemma_mtp"):
        loaded = load_target(tmp_path, torch.float32)
    assert [(record.name, record.levelname) for record in caplog.records] == [("gemma_mtp", "INFO")]
    assert "skipped 3 tensors (1.30 MB)" in caplog.messages[0]
    same_weights(loaded.checkpoint_tensors(), target.checkpoint_tensors())


def test_a_text_checkpoint_is_loaded_without_a_notice(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="gemma_mtp"):
        load_target(saved / "target", torch.float32)
    assert caplog.records == []


def test_read_config_tells_targets_from_drafters(saved: Path) -> None:
    assert isinstance(read_config(saved / "target"), TargetConfig)
    assert isinstance(read_config(saved / "drafter"), DrafterConfig)


# -- what is refused


def refused(load: Load, directory: Path, *named: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load(directory, torch.float32)
    message = str(caught.value)
    assert [part for part in named if part not in message] == []
    assert "\n" not in message
    assert message.endswith(".")


@pytest.mark.parametrize("load", [load_target, load_drafter])
def test_no_such_directory(load: Load, tmp_path: Path) -> None:
    refused(load, tmp_path / "absent", str(tmp_path / "absent"), "does not exist")
    (tmp_path / "file").write_text("{}", encoding="utf-8")
    refused(load, tmp_path / "file", str(tmp_path / "file"), "is a file")


KINDS = [("target", load_target), ("drafter", load_drafter)]


@pytest.mark.parametrize(("kind", "load"), KINDS)
@pytest.mark.parametrize(("content", "named"), [
    (None, ["has no config.json"]),
    (b'{\n "model_type": "gemma4_text",\n "a" 1}', ["config.json", "not valid JSON", "line 3, column 6"]),
    (b"", ["config.json", "not valid JSON", "line 1"]),
    (b'{"model_type": "\xff"}', ["config.json", "can not be read"]),
])  # fmt: skip
def test_config_json(kind: str, load: Load, content: bytes | None, named: list[str], copied: Path) -> None:
    (copied / kind / "config.json").unlink()
    if content is not None:
        (copied / kind / "config.json").write_bytes(content)
    refused(load, copied / kind, str(copied / kind), *named)


@pytest.mark.parametrize("content", ["[" * 200_000, '{"hidden_size": 1' + "0" * 5000 + "}"], ids=["deep", "huge int"])
def test_json_beyond_what_python_parses(content: str, copied: Path) -> None:
    (copied / "target" / "config.json").write_text(content, encoding="utf-8")
    refused(load_target, copied / "target", "config.json")


@pytest.mark.parametrize(("kind", "load"), KINDS)
def test_missing_weights(kind: str, load: Load, copied: Path) -> None:
    (copied / kind / SINGLE).unlink()
    refused(load, copied / kind, str(copied / kind), SINGLE, INDEX)


@pytest.mark.parametrize(("kind", "load"), KINDS)
def test_index(kind: str, load: Load, copied: Path) -> None:
    directory = copied / kind
    before = load(directory, torch.float32).checkpoint_tensors()
    write_shards(directory, load_file(directory / SINGLE))
    same_weights(load(directory, torch.float32).checkpoint_tensors(), before)
    (directory / "model-00002-of-00003.safetensors").unlink()
    refused(load, directory, str(directory), "model-00002-of-00003.safetensors", INDEX)
    for content in ("{}", "[]", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": null}'):
        (directory / INDEX).write_text(content, encoding="utf-8")
        refused(load, directory, INDEX, "weight_map")
    (directory / INDEX).write_text('{"weight_map": {\n', encoding="utf-8")
    refused(load, directory, INDEX, "not valid JSON", "line 2")


@pytest.mark.parametrize(("kind", "load"), KINDS)
def test_truncated_anywhere(kind: str, load: Load, saved: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    whole = (saved / kind / SINGLE).read_bytes()
    directory = shutil.copytree(saved / kind, tmp_path_factory.mktemp("cut") / kind)

    @given(st.integers(0, len(whole) - 1) | st.integers(0, 16))
    def check(size: int) -> None:
        (directory / SINGLE).write_bytes(whole[:size])
        refused(load, directory, str(directory / SINGLE), "truncated or damaged")

    check()


@pytest.mark.parametrize(("kind", "load"), KINDS)
def test_a_damaged_header_is_refused_or_harmless(
    kind: str, load: Load, saved: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole = (saved / kind / SINGLE).read_bytes()
    header_end = 8 + int.from_bytes(whole[:8], "little")
    directory = shutil.copytree(saved / kind, tmp_path_factory.mktemp("damaged") / kind)
    before = load(saved / kind, torch.float32).checkpoint_tensors()

    @given(st.integers(0, header_end - 1) | st.integers(0, 7), st.integers(0, 255))
    def check(at: int, value: int) -> None:
        (directory / SINGLE).write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
        try:
            loaded = load(directory, torch.float32)
        except CheckpointError:
            return
        assert loaded.checkpoint_tensors().keys() == before.keys()

    check()


@pytest.mark.parametrize(("kind", "load"), KINDS)
def test_tensors_that_do_not_fit(kind: str, load: Load, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of each kind is refused before any weight is copied, wherever in the file it is."""
    monkeypatch.setattr("gemma_mtp.checkpoint.load.copy_tensors", lambda *_: pytest.fail("weights were read"))
    directory = copied / kind
    whole = load_file(directory / SINGLE)
    of_each_kind = {re.sub(r"\d+", "N", name): name for name in whole}
    for name in of_each_kind.values():
        tensor = whole[name]
        wrong = tensor[:-1].clone() if tensor.numel() > 1 else tensor.repeat(2)
        save_file({**whole, name: wrong}, directory / SINGLE)
        refused(load, directory, SINGLE, f" {name} ", str(list(wrong.shape)), str(list(tensor.shape)))
        save_file({other: x for other, x in whole.items() if other != name}, directory / SINGLE)
        refused(load, directory, f"no tensor {name},", "config.json")
        save_file({**whole, name: tensor.to(torch.int8)}, directory / SINGLE)
        refused(load, directory, SINGLE, f" {name} ", "I8", "F32" if tensor.is_floating_point() else "I64")
    save_file(whole, directory / SINGLE)
    with pytest.raises(pytest.fail.Exception, match="weights were read"):  # the trap is where weights are read
        load(directory, torch.float32)


def test_a_transposed_weight_is_refused(copied: Path) -> None:
    weight = load_file(copied / "drafter" / SINGLE)["pre_projection.weight"]
    edit(copied / "drafter", pre_projection__weight=weight.t().contiguous())
    refused(load_drafter, copied / "drafter", "pre_projection.weight", "[64, 16]", "[16, 64]")


def test_quantised_weights_are_refused(copied: Path) -> None:
    for dtype, name in ((torch.uint8, "U8"), (torch.float8_e4m3fn, "F8_E4M3")):
        edit(copied / "target", **{Q_PROJ.replace(".", "__"): torch.zeros(32, 32).to(dtype)})
        refused(load_target, copied / "target", Q_PROJ, name, "F32 or BF16 or F16 or F64")


@pytest.mark.parametrize(("kind", "load"), KINDS)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickles_are_never_opened(kind: str, load: Load, name: str, copied: Path) -> None:
    marker = copied / "unpickled"
    trap = pickle.dumps(Trap(marker))
    (copied / kind / SINGLE).unlink()
    (copied / kind / name).write_bytes(trap)
    refused(load, copied / kind, str(copied / kind), name, "safetensors")
    assert not marker.exists()
    pickle.loads(trap)
    assert marker.exists()  # the trap works


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("damage", ["repeated", "negative", "too large", "zero"])
def test_damaged_token_ordering(damage: str, copied: Path) -> None:
    ordering = load_file(copied / "drafter" / SINGLE)[ORDERING]
    if damage == "zero":
        ordering = torch.zeros_like(ordering)
    else:
        ordering[3] = {"repeated": int(ordering[4]), "negative": -1, "too large": TINY.vocab_size}[damage]
    edit(copied / "drafter", masked_embedding__token_ordering=ordering)
    refused(load_drafter, copied / "drafter", str(copied / "drafter"), ORDERING)


def test_token_ordering_may_be_stored_in_int32(copied: Path) -> None:
    ordering = load_file(copied / "drafter" / SINGLE)[ORDERING]
    edit(copied / "drafter", masked_embedding__token_ordering=ordering.int())
    loaded = stored_tensors(load_drafter(copied / "drafter", torch.bfloat16).checkpoint_tensors())
    assert torch.equal(loaded[ORDERING], ordering)


def test_a_target_is_no_drafter(saved: Path) -> None:
    for load, kind in ((load_target, "drafter"), (load_drafter, "target")):
        with pytest.raises(GemmaMtpError, match=f"model_type .*it is a {kind}"):
            load(saved / kind, torch.float32)


# -- saving to a bad place


@pytest.fixture(params=["target", "drafter"])
def save(request: pytest.FixtureRequest) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        if request.param == "target":
            save_target(random_target(), TargetConfig(TINY), directory)
        else:
            save_drafter(random_drafter(), random_drafter().config, directory)

    return write


def test_saving_below_a_file(save: Callable[[Path], None], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept", encoding="utf-8")
    try:
        with pytest.raises(CheckpointError, match="file"):
            save(tmp_path / "file" / "model")
    finally:
        assert [file.name for file in tmp_path.iterdir()] == ["file"]
        assert (tmp_path / "file").read_text(encoding="utf-8") == "kept"


def test_weights_that_can_not_be_replaced(save: Callable[[Path], None], tmp_path: Path) -> None:
    (tmp_path / SINGLE).mkdir()
    with pytest.raises(CheckpointError, match=SINGLE):
        save(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [SINGLE]


def test_a_failed_write_keeps_the_old_weights(
    save: Callable[[Path], None], saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = shutil.copytree(saved / "target", tmp_path / "model")
    before = {file.name: file.read_bytes() for file in directory.iterdir()}

    def full_disk(writer: Any, name: str, values: memoryview, first_byte: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gemma_mtp.files.safetensors.SafetensorsWriter.write", full_disk)
    with pytest.raises(CheckpointError, match=r"model\.safetensors can not be written.*No space left"):
        save(directory)
    assert {file.name: file.read_bytes() for file in directory.iterdir()} == before


def test_a_config_that_can_not_be_replaced(save: Callable[[Path], None], tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        save(tmp_path)
    assert not list(tmp_path.glob(".*"))


# -- generation_config.json


def generation(directory: Path, content: Any) -> GenerationDefaults:
    (directory / "generation_config.json").write_text(json.dumps(content), encoding="utf-8")
    return read_generation_config(directory)


def test_generation_config(copied: Path) -> None:
    target = copied / "target"
    assert read_generation_config(target) == GenerationDefaults(TINY.eos_token_ids)
    assert generation(target, {}) == GenerationDefaults(TINY.eos_token_ids)
    assert generation(target, {"eos_token_id": 7}).eos_token_ids == (7,)
    assert generation(
        target, {"eos_token_id": [1, 106, 50], "temperature": 1.0, "top_k": 64, "top_p": 0.95,
                 "suppress_tokens": [8, 9], "num_assistant_tokens": 6},
    ) == GenerationDefaults((1, 106, 50), 1.0, 64, 0.95, (8, 9))  # fmt: skip


def test_end_of_sequence_ids_fall_back_to_config_json(copied: Path) -> None:
    path = copied / "target" / "config.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**raw, "eos_token_id": [5, 6]}), encoding="utf-8")
    assert read_generation_config(copied / "target").eos_token_ids == (5, 6)
    assert generation(copied / "target", {"eos_token_id": [3]}).eos_token_ids == (3,)
    assert read_generation_config(copied / "drafter").eos_token_ids == (1,)


@pytest.mark.parametrize(("content", "named"), [
    ([], ["list"]),
    ("x", ["str"]),
    ({"eos_token_id": "1"}, ["eos_token_id", "'1'"]),
    ({"eos_token_id": [1, 2.5]}, ["eos_token_id", "2.5"]),
    ({"eos_token_id": True}, ["eos_token_id", "True"]),
    ({"suppress_tokens": {"a": 1}}, ["suppress_tokens"]),
    ({"suppress_tokens": [None]}, ["suppress_tokens"]),
    ({"temperature": "1"}, ["temperature", "'1'"]),
    ({"temperature": True}, ["temperature", "True"]),
    ({"top_k": [64]}, ["top_k", "[64]"]),
    ({"top_k": "64"}, ["top_k", "'64'"]),
    ({"top_p": {}}, ["top_p", "{}"]),
])  # fmt: skip
def test_generation_config_refused(content: Any, named: list[str], copied: Path) -> None:
    refused(lambda directory, _: generation(directory, content), copied / "target", "generation_config.json", *named)


def test_malformed_generation_config(copied: Path) -> None:
    (copied / "target" / "generation_config.json").write_text("{\n]", encoding="utf-8")
    refused(
        lambda directory, _: read_generation_config(directory), copied / "target", "generation_config.json", "line 2"
    )


# -- memory

MEASURE = """
import sys, torch
from pathlib import Path
from gemma_mtp.checkpoint import load_target

def peak():  # not ru_maxrss, which a child inherits from its parent across exec
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines()
                if line.startswith("VmHWM"))

directory, warm_up, dtype = sys.argv[1], sys.argv[2], getattr(torch, sys.argv[3])
load_target(warm_up, dtype)  # imports and pools that any load takes
before = peak()
model = load_target(directory, dtype)
print(peak() - before, sum(tensor.nbytes for tensor in model.checkpoint_tensors().values()))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target of 350 MB in bf16, of which one tensor alone is larger than what may be mapped at once."""
    config = dataclasses.replace(
        TINY, vocab_size=120_000, hidden_size=1024, intermediate_size=8192, num_hidden_layers=2,
        layer_types=TINY.layer_types[1:3],
        num_kv_shared_layers=0, use_double_wide_mlp=False, hidden_size_per_layer_input=0,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("large")
    save_target(zero_target(config), TargetConfig(config), directory)
    assert (directory / SINGLE).stat().st_size > 300e6
    return directory


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux' /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_peak_memory_of_loading(large: Path, saved: Path, dtype: str) -> None:
    """At most the weights in the dtype asked for and 10%; pages of mapped files count as resident."""
    command = [sys.executable, "-c", MEASURE, str(large), str(saved / "target"), dtype]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    growth, weights = map(int, ran.stdout.split())
    limit = 1.1 * weights
    figures = f"{dtype}: peak grew by {growth / 1e6:.0f} MB, weights {weights / 1e6:.0f} MB, limit {limit / 1e6:.0f} MB"
    assert weights <= growth <= limit, figures
    print(figures)


def test_a_dtype_that_can_not_be_stored(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"torch\.float64; use one of float32, bfloat16, float16"):
        save_target(random_target(), TargetConfig(TINY), tmp_path / "new", torch.float64)
    assert not (tmp_path / "new").exists()
