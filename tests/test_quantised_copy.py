"""Quantised copies of checkpoints: the bits, the files, what loading recognises and refuses."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import PLE, WIDE, random_target, same_weights, wide_drafter
from oracle import FAMILIES
from safetensors.torch import load_file, save_file

from gemma_mtp import checkpoint
from gemma_mtp.checkpoint import (
    SINGLE_FILE,
    load_drafter,
    load_target,
    read_weight_types,
    save_drafter,
    save_target,
)
from gemma_mtp.checkpoint.quantised_copy import write_quantised_copy
from gemma_mtp.cli import main
from gemma_mtp.config import TargetConfig
from gemma_mtp.decoding.params import SamplingParams
from gemma_mtp.engine.pair import bundled_directory, load_pair
from gemma_mtp.errors import CheckpointError, GemmaMtpError, QuantisationError
from gemma_mtp.measure.memory import inspect_checkpoint
from gemma_mtp.model.drafter import Drafter
from gemma_mtp.model.target import Target
from gemma_mtp.weight_types import WeightTypes, parse_weight_types

Checkpoints = Callable[[str], tuple[Path, Path]]
SINGLE = SINGLE_FILE
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
KINDS = ["int8", "int4", "target=int4,embeddings=int4,drafter-head=int4"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wide pair in bf16, and beside its target what else a checkpoint has."""
    root = tmp_path_factory.mktemp("saved")
    drafter = wide_drafter(PLE, centroids=True)
    save_target(random_target(config=PLE), TargetConfig(PLE), root / "target")
    save_drafter(drafter, drafter.config, root / "drafter")
    for name in ("tokenizer_config.json", "generation_config.json", "chat_template.jinja", "README.md"):
        (root / "target" / name).write_text("{}", encoding="utf-8")
    (root / "target" / "additional_chat_templates").mkdir()
    (root / "target" / "additional_chat_templates" / "tool_use.jinja").write_text("{}", encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def copied(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("copied")
    for kind in ("target", "drafter"):
        write_quantised_copy(saved / kind, root / kind, parse_weight_types("int4"))
    return root


@pytest.fixture
def pair(copied: Path, tmp_path: Path) -> Path:
    """Copies of the copies, to be damaged."""
    return shutil.copytree(copied, tmp_path / "pair")


# -- what is written


@pytest.mark.parametrize(("kinds", "family"), [
    *(pytest.param(kinds, family, marks=[pytest.mark.slow] * (kinds != KINDS[0] and family not in ("e2b", "26b")))
      for kinds in KINDS for family in FAMILIES),
])  # fmt: skip
def test_a_copy_loads_as_its_source_quantised_while_loading(
    checkpoints: Checkpoints, family: str, kinds: str, tmp_path: Path
) -> None:
    """Of what transformers wrote, text and multimodal, in float32: tied, centroids, experts, per-layer embeddings."""
    types = parse_weight_types(kinds)
    loaders: tuple[Callable[..., Target | Drafter], ...] = (load_target, load_drafter)
    for source, load in zip(checkpoints(family), loaders, strict=True):
        if load is load_drafter and not types.of_drafter():
            continue
        copy = tmp_path / source.name
        write_quantised_copy(source, copy, types)
        loaded, expected = load(copy, torch.float32), load(source, torch.float32, types=types)
        same_weights(loaded.checkpoint_tensors(), expected.checkpoint_tensors())
        assert loaded.weight_types == expected.weight_types


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["untied", "moe"])
def test_what_is_not_quantised_keeps_its_dtype(name: str, stored: torch.dtype, tmp_path: Path) -> None:
    target = random_target(config=WIDE[name])
    save_target(target, TargetConfig(WIDE[name], "gemma4"), tmp_path / "source", stored)
    types = parse_weight_types("target=int8")
    write_quantised_copy(tmp_path / "source", tmp_path / "copy", types)
    for dtype in (torch.float32, torch.bfloat16):
        expected = load_target(tmp_path / "source", dtype, types=types).checkpoint_tensors()
        same_weights(load_target(tmp_path / "copy", dtype).checkpoint_tensors(), expected)
    short = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[stored]
    assert checkpoint.stored_dtypes(tmp_path / "copy") == {short}
    assert json.loads((tmp_path / "copy" / "config.json").read_text())["dtype"] == str(stored).removeprefix("torch.")


def test_a_copy_decodes_to_the_same_bits(saved: Path, copied: Path) -> None:
    """Tokens, and log-probabilities to the last bit."""
    params = SamplingParams(max_tokens=40, temperature=0.8, seed=3, logprobs=2)
    pairs = (load_pair(copied / "target", copied / "drafter"),
             load_pair(saved / "target", saved / "drafter", quantize="int4"))  # fmt: skip
    for draft_tokens in (0, 4):
        ours, theirs = (pair.generate([5, 6, 7], params, draft_tokens=draft_tokens) for pair in pairs)
        assert ours.token_ids == theirs.token_ids
        assert ours.logprobs == theirs.logprobs
        assert ours.rounds == theirs.rounds


def test_bytes_done_are_told_piece_by_piece(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a copy is written and when a model is loaded; each piece of a tensor counts."""
    monkeypatch.setattr("gemma_mtp.checkpoint.tensors.PIECE_BYTES", 4096)
    headers = checkpoint.text_headers(saved / "target")
    size = sum(header.nbytes for header in headers.values())
    copied: list[tuple[int, int]] = []
    loaded: list[tuple[int, int]] = []
    types = parse_weight_types("int4")
    write_quantised_copy(saved / "target", tmp_path / "copy", types, on_bytes=lambda *given: copied.append(given))
    load_target(saved / "target", torch.float32, on_bytes=lambda *given: loaded.append(given))
    assert copied == loaded and len(loaded) > len(headers)
    done = [0, *(count for count, _ in loaded)]
    assert all(before < after for before, after in itertools.pairwise(done)) and done[-1] == size
    assert {of for _, of in loaded} == {size}


def test_the_files_of_a_copy(saved: Path, copied: Path) -> None:
    names = {str(path.relative_to(copied / "target")) for path in (copied / "target").rglob("*") if path.is_file()}
    kept = {"tokenizer_config.json", "generation_config.json", "chat_template.jinja"}
    kept.add("additional_chat_templates/tool_use.jinja")
    assert names == {SINGLE, "config.json", *kept}
    before, after = (json.loads((root / "target" / "config.json").read_text()) for root in (saved, copied))
    assert after.pop("quantization_config") == {
        "quant_method": "gemma-mtp", "symmetric": True,
        "parts": {"target": {"bits": 4, "group_size": 32}, "embeddings": {"bits": 8, "group_size": 64}},
    }  # fmt: skip
    assert after == before
    tensors = load_file(copied / "target" / SINGLE)
    assert (tensors[Q_PROJ].dtype, tensors[Q_PROJ].shape) == (torch.uint8, (64, 32))
    scales = tensors[Q_PROJ + checkpoint.SCALES]
    assert (scales.dtype, scales.shape) == (torch.float32, (64, 2))


def test_inspect_counts_weights_and_bytes(saved: Path, copied: Path) -> None:
    for kind, parts in (("target", {"target": "int4", "embeddings": "int8"}),
                        ("drafter", {"drafter": "int4", "drafter-head": "int4"})):  # fmt: skip
        before, after = inspect_checkpoint(saved / kind), inspect_checkpoint(copied / kind)
        assert after.parameters == before.parameters
        assert (before.quantised, after.quantised) == ({}, parts)
        assert "quantised" not in before.to_dict()
        sizes = [tensor.nbytes for tensor in load_file(copied / kind / SINGLE).values()]
        assert after.weight_bytes == sum(sizes) < before.weight_bytes
        assert set(after.stored_dtypes) >= {"BF16", "F32", "U8"}


def test_a_copy_may_be_quantised_further(saved: Path, tmp_path: Path) -> None:
    write_quantised_copy(saved / "target", tmp_path / "first", WeightTypes(target="int4"))
    with pytest.raises(QuantisationError, match="part target is already int4 and can not become int8"):
        write_quantised_copy(tmp_path / "first", tmp_path / "second", parse_weight_types("int8"))
    with pytest.raises(QuantisationError, match="part target is already int4 and can not become int8"):
        load_target(tmp_path / "first", torch.bfloat16, types=parse_weight_types("int8"))
    assert not (tmp_path / "second").exists()
    made = write_quantised_copy(tmp_path / "first", tmp_path / "second", WeightTypes(embeddings="int8"))
    assert made == WeightTypes(target="int4", embeddings="int8") == read_weight_types(tmp_path / "second")
    expected = load_target(saved / "target", torch.bfloat16, types=made).checkpoint_tensors()
    same_weights(load_target(tmp_path / "second", torch.bfloat16).checkpoint_tensors(), expected)
    asked_again = load_target(tmp_path / "first", torch.bfloat16, types=made)
    same_weights(asked_again.checkpoint_tensors(), expected)


# -- what is refused


def test_a_directory_that_is_there(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("kept", encoding="utf-8")
    for out in (tmp_path, tmp_path / "kept"):
        with pytest.raises(CheckpointError, match="is there already and is no empty directory"):
            write_quantised_copy(saved / "target", out, parse_weight_types("int8"))
    assert [file.name for file in tmp_path.iterdir()] == ["kept"]
    (tmp_path / "empty").mkdir()
    write_quantised_copy(saved / "target", tmp_path / "empty", parse_weight_types("int8"))


@pytest.mark.parametrize("where", ["write", "copyfile", "rename"])
def test_a_failed_copy_leaves_nothing(where: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    if where == "write":
        monkeypatch.setattr("gemma_mtp.files.safetensors.SafetensorsWriter.write", full_disk)
    elif where == "copyfile":
        monkeypatch.setattr(shutil, "copyfile", full_disk)
    else:  # the last rename, of the directory
        rename = Path.replace
        monkeypatch.setattr(Path, "replace", lambda path, to: full_disk() if path.is_dir() else rename(path, to))
    with pytest.raises(CheckpointError, match=r"can not be written.*No space left"):
        write_quantised_copy(saved / "target", tmp_path / "copy", parse_weight_types("int8"))
    assert list(tmp_path.iterdir()) == []


def test_no_part_of_it(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantisationError, match="is a target, and no part of a target was asked"):
        write_quantised_copy(saved / "target", tmp_path / "copy", parse_weight_types("drafter=int8"))
    with pytest.raises(QuantisationError, match="is a drafter, and no part of a drafter"):
        write_quantised_copy(saved / "drafter", tmp_path / "copy", parse_weight_types("none"))
    assert list(tmp_path.iterdir()) == []


def refused(directory: Path, *named: str) -> None:
    """Loading and inspecting say the same, in one sentence."""
    load = load_target if directory.name == "target" else load_drafter
    messages = []
    for call in (lambda: load(directory, torch.bfloat16), lambda: inspect_checkpoint(directory)):
        with pytest.raises(GemmaMtpError) as caught:
            call()
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert [part for part in named if part not in messages[0]] == []


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}), encoding="utf-8")


@pytest.mark.parametrize("kind", ["target", "drafter"])
def test_damaged_copies(kind: str, pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is refused before any weight is read."""
    monkeypatch.setattr("gemma_mtp.checkpoint.load.copy_tensors", lambda *_: pytest.fail("weights were read"))
    directory = pair / kind
    whole, config = load_file(directory / SINGLE), json.loads((directory / "config.json").read_text())
    edit_config(directory, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    refused(directory, "'bitsandbytes'", "unquantised checkpoint")
    edit_config(directory, quantization_config=None)
    refused(directory, SINGLE, "shape" if kind == "drafter" else "F32 or BF16 or F16")
    edit_config(directory, **config)
    scale, data = Q_PROJ + checkpoint.SCALES, whole[Q_PROJ]
    for changed, named in (
        ({scale: None}, [f"no tensor {scale}"]),
        ({scale: whole[scale][:, :1].contiguous()}, [scale, str(list(whole[scale].shape))]),
        ({Q_PROJ: data[:, :16].contiguous()}, [Q_PROJ, str(list(data.shape))]),
        ({Q_PROJ: data.bfloat16()}, [Q_PROJ, "BF16", "U8"]),
    ):
        tensors = {name: tensor for name, tensor in {**whole, **changed}.items() if tensor is not None}
        save_file(tensors, directory / SINGLE)
        refused(directory, *named)


# -- the command


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The bundled pair, quantised by the command, generates what generate --quantize does."""
    for kind in ("target", "drafter"):
        source, out = bundled_directory() / kind, tmp_path / kind
        assert main(["quantize", str(source), "--out", str(out), "--quantize", "int4"]) == 0
        said = capsys.readouterr().out
        assert f"{out}: " in said
        assert ("target int4, embeddings int8" if kind == "target" else "drafter int4, drafter-head int4") in said
    prompt = ["generate", "import os\n", "-n", "24", "-q"]
    assert main([*prompt, "--target", str(tmp_path / "target"), "--drafter", str(tmp_path / "drafter")]) == 0
    ours = capsys.readouterr().out
    assert main([*prompt, "--quantize", "int4"]) == 0
    assert capsys.readouterr().out == ours
    assert main(["inspect", str(tmp_path / "target"), str(tmp_path / "drafter"), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["checkpoints"][0]["quantised"] == {"target": "int4", "embeddings": "int8"}
    assert content["pair"]["fits"]


@pytest.mark.parametrize(("arguments", "message"), [
    (["generate", "x", "--quantize", "int5"], "quantize 'int5' is not known; use none, int8, int4, q8_0, or PART=KIND"),
    (["generate", "x", "--quantize", "head=int8"], "the parts are target, embeddings, drafter, drafter-head"),
    (["quantize", "/absent", "--out", "y"], "checkpoint /absent does not exist"),
])  # fmt: skip
def test_bad_input(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    assert message in err
