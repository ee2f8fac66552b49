"""GGUF files as checkpoints: of every family's shape, of every type of blocks, alone, split and in directories."""

import array
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_files import blocks, rewritten
from hypothesis import given, settings
from hypothesis import strategies as st
from models import PLE, WIDE, random_drafter, random_target, same_weights, save_pair, wide_drafter
from transformers import AutoModelForCausalLM

from gemma_mtp import SamplingParams, load_pair
from gemma_mtp.checkpoint import (
    load_drafter,
    load_target,
    open_source,
    read_config,
    read_generation_config,
    stored_dtypes,
)
from gemma_mtp.checkpoint.gguf_names import OF_A_LAYER, WHOLE_MODEL, gguf_name, official_name
from gemma_mtp.checkpoint.quantised_copy import write_quantised_copy
from gemma_mtp.cli import main
from gemma_mtp.engine.pair import Pair, bundled_directory
from gemma_mtp.errors import CheckpointError, ConfigError, GemmaMtpError, QuantisationError, TrainingError
from gemma_mtp.files.gguf import read_header
from gemma_mtp.interop.gguf import FILE_TYPES, export_gguf
from gemma_mtp.json_files import read_json
from gemma_mtp.locate import find_drafter
from gemma_mtp.measure.memory import inspect_checkpoint
from gemma_mtp.training.settings import check_unquantised
from gemma_mtp.weight_types import parse_weight_types
from gemma_mtp.weights.int4 import Int4
from gemma_mtp.weights.int8x32 import Int8x32

TARGET, DRAFTER = bundled_directory() / "target", bundled_directory() / "drafter"
PROMPT = "def quicksort(items):"
Directories = Callable[[str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """The bundled pair as files of a type, written once."""
    root = tmp_path_factory.mktemp("bundled")

    def files(kind: str) -> tuple[Path, Path]:
        pair = root / f"target-{kind}.gguf", root / f"drafter-{kind}.gguf"
        if not pair[0].exists():
            for directory, file in zip((TARGET, DRAFTER), pair, strict=True):
                export_gguf(directory, file, kind)
        return pair

    return files


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pair wide enough for blocks, in directories and as float32 files."""
    root = tmp_path_factory.mktemp("wide")
    save_pair(root, random_target(config=PLE), wide_drafter(PLE))
    for kind in ("target", "drafter"):
        export_gguf(root / kind, root / f"{kind}.gguf", "F32")
    return root


@pytest.fixture(scope="module")
def files(wide: Path) -> Callable[[str], Path]:
    """The tiny target as a file of a type, written once."""

    def file(kind: str) -> Path:
        made = wide / f"target-{kind}.gguf"
        if not made.exists():
            export_gguf(wide / "target", made, kind)
        return made

    return file


def tokens(pair: Pair, draft_tokens: int = 0, **params: Any) -> list[int]:
    prompt: Any = PROMPT if pair.tokenizer is not None else [5, 6, 7, 8]
    chosen = SamplingParams(max_tokens=24, ignore_eos=True, **params)
    return pair.generate(prompt, chosen, draft_tokens=draft_tokens).token_ids


# -- names and configurations


def test_names_are_the_packages() -> None:
    """Those that the package's table has; it lacks the drafter's projections and tells scales by their ends."""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA4, 4)
    known = 0
    for official in (*WHOLE_MODEL, *(f"model.layers.3.{name}" for name in OF_A_LAYER)):
        ours = gguf_name(official)
        assert ours is not None
        assert official_name(ours) == official
        theirs = table.get_name(official, try_suffixes=(".weight",))
        if theirs is not None and not official.endswith("router.scale"):
            known += 1
            assert ours.removesuffix(".weight") == theirs.removesuffix(".weight")
    assert known >= len(WHOLE_MODEL) + len(OF_A_LAYER) - 4
    assert gguf_name("masked_embedding.centroids.weight") is None
    assert official_name("blk.1.unheard_of.weight") is None


@pytest.mark.parametrize("family", ["e2b", "e4b", "12b", "26b", "31b", "text"])
def test_every_family_comes_back(checkpoints: Directories, family: str, tmp_path: Path) -> None:
    """Config and weights of what transformers wrote, through a file."""
    loads: tuple[Any, Any] = load_target, load_drafter
    for kind, directory, load in zip(("t", "d"), checkpoints(family), loads, strict=True):
        file = tmp_path / f"{kind}.gguf"
        losses = export_gguf(directory, file, "F32").losses
        centroids = read_json(directory / "config.json").get("use_ordered_embeddings", False)
        assert losses == (["GGUF has no centroid head: the file's drafter scores the whole vocabulary."] * centroids)
        theirs = load(directory, torch.float32).checkpoint_tensors()
        expected = {name: weight for name, weight in theirs.items() if not name.startswith("masked_embedding")}
        same_weights(load(file, torch.float32, strict=True).checkpoint_tensors(), expected)
        ours, config = read_config(file), read_config(directory)
        for name in ("layer_types", "sliding_rope", "full_rope", "head_dim", "global_head_dim", "rms_norm_eps",
                     "final_logit_softcapping", "num_kv_shared_layers", "sliding_window"):  # fmt: skip
            assert getattr(ours.text, name) == getattr(config.text, name), name
    assert main(["inspect", str(tmp_path / "t.gguf"), str(tmp_path / "d.gguf"), "--strict"]) == 0


def test_transformers_reads_a_copy_of_it(checkpoints: Directories, tmp_path: Path) -> None:
    """Its logits of what `quantize` would write beside a file are those of what the file was made of."""
    directory, _ = checkpoints("text")
    export_gguf(directory, tmp_path / "t.gguf", "F32")
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "config.json").write_text(json.dumps(open_source(tmp_path / "t.gguf").config()))
    shutil.copy(directory / "model.safetensors", tmp_path / "copy")
    ids = torch.tensor([[3, 5, 7, 9]])
    read: Any = AutoModelForCausalLM
    first, second = (
        read.from_pretrained(path, dtype=torch.float32)(ids).logits for path in (directory, tmp_path / "copy")
    )
    assert torch.equal(first, second)


def test_older_names_of_the_drafters_architecture(wide: Path, tmp_path: Path) -> None:
    expected = load_drafter(wide / "drafter", torch.float32).checkpoint_tensors()
    for name in ("gemma4_assistant", "gemma4_mtp"):
        file = rewritten(wide / "drafter.gguf", tmp_path / f"{name}.gguf", architecture=name)
        same_weights(load_drafter(file, torch.float32).checkpoint_tensors(), expected)


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "no layers": ({"gemma4.block_count": None}, "has no 'gemma4.block_count' in its metadata"),
    "layers in words": ({"gemma4.block_count": "six"}, "block_count = 'six', but a whole number was expected"),
    "other values": ({"gemma4.attention.value_length": 8}, "value_length = 8, but 32, as of keys"),
    "a part of sliding dimensions": ({"gemma4.rope.dimension_count_swa": 8}, "dimension_count_swa = 8, but 16"),
    "scaled rotation": ({"gemma4.rope.scaling.type": "yarn"}, "rope.scaling.type = 'yarn', but none"),
    "scaled by a factor": ({"gemma4.rope.scaling.factor": 8.0}, "rope.scaling.factor = 8.0, but 1"),
    "kinds of layers": ({"gemma4.attention.sliding_window_pattern": [True, False]}, "but a flag for each of 6"),
    "key heads": ({"gemma4.attention.head_count_kv": [2, 1, 2, 2, 2, 2]}, "one number for all sliding layers"),
    "heads": ({"gemma4.attention.head_count": [4, 4, 4, 4, 4, 2]}, "but one number for all layers"),
    "widths": ({"gemma4.feed_forward_length": [128, 64, 128, 128, 128, 128]}, "one width, doubled at most"),
    "another model": ({"general.architecture": "llama"}, "architecture 'llama', which can not be read; supported are"),
    "billions of layers": ({"gemma4.block_count": 2**32 - 1}, "4294967295, but a number above 0 and no more than"),
    "no epsilon": ({"gemma4.attention.layer_norm_rms_epsilon": float("nan")}, "but a number was expected"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_metadata_that_can_not_be_meant(
    wide: Path, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed, reason = CHANGES[name]
    file = rewritten(wide / "target.gguf", tmp_path / "file.gguf", metadata=changed)
    with pytest.raises(ConfigError, match=reason):
        read_config(file)
    assert main(["generate", "--token-ids", "5 6", "--target", str(file)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_key_that_is_not_known(wide: Path, tmp_path: Path) -> None:
    file = rewritten(wide / "target.gguf", tmp_path / "file.gguf", metadata={"gemma4.attention.twist": 3})
    note = "its metadata has the key gemma4.attention.twist, which is not known and not applied."
    assert inspect_checkpoint(file).notes == [note]
    with pytest.raises(CheckpointError, match=r"attention\.twist"):
        load_target(file, torch.float32, strict=True)
    load_target(file, torch.float32)


def test_rotations(wide: Path, tmp_path: Path) -> None:
    """Which dimensions rotate is read of the factors: all where there are none; others than 1 and then 1e30 are not."""
    whole = rewritten(wide / "target.gguf", tmp_path / "whole.gguf", {"rope_freqs.weight": None})
    assert read_config(whole).text.full_rope.rope_type == "default"
    for factors in ([1.0] * 8 + [2.0] * 8, [1e30] * 16, [1.0] * 4, [1e30, *[1.0] * 15]):
        file = tmp_path / "file.gguf"
        rewritten(wide / "target.gguf", file, {"rope_freqs.weight": (np.array(factors, np.float32), "F32")})
        with pytest.raises(ConfigError, match="rope_freqs"):
            read_config(file)


def test_softcap_where_the_file_does_not_say(wide: Path, tmp_path: Path) -> None:
    """As in llama.cpp: 30 of a target, none where it is 0."""
    for given_cap, cap in ((None, 30.0), (0.0, None), (20.0, 20.0)):
        file = tmp_path / "file.gguf"
        rewritten(wide / "target.gguf", file, metadata={"gemma4.final_logit_softcapping": given_cap})
        assert read_config(file).text.final_logit_softcapping == cap


# -- tensors


def test_fused_and_divided_tensors(tmp_path: Path) -> None:
    """Queries, keys and values in one tensor, and experts' gates in a tensor of their own, are the same model."""
    moe = random_target(config=WIDE["moe"])
    save_pair(tmp_path, moe, random_drafter())
    whole, other = tmp_path / "whole.gguf", tmp_path / "other.gguf"
    export_gguf(tmp_path / "target", whole, "F32")
    stored = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(whole).tensors}
    changed: dict[str, tuple[np.ndarray, str] | None] = {}
    for layer in range(6):
        parts = [name for name in (f"blk.{layer}.attn_{part}.weight" for part in "qkv") if name in stored]
        if len(parts) == 3:
            changed[f"blk.{layer}.attn_qkv.weight"] = np.concatenate([stored[name] for name in parts]), "F32"
            changed |= dict.fromkeys(parts)
        both = stored[f"blk.{layer}.ffn_gate_up_exps.weight"]
        width = both.shape[1] // 2
        changed[f"blk.{layer}.ffn_gate_exps.weight"] = np.ascontiguousarray(both[:, :width]), "F32"
        changed[f"blk.{layer}.ffn_up_exps.weight"] = np.ascontiguousarray(both[:, width:]), "F32"
        changed[f"blk.{layer}.ffn_gate_up_exps.weight"] = None
    rewritten(whole, other, changed)
    names = read_header(other).tensors
    assert "blk.0.attn_qkv.weight" in names
    assert "blk.0.attn_q.weight" not in names
    same_weights(load_target(other, torch.float32, strict=True).checkpoint_tensors(), moe.checkpoint_tensors())


def test_fused_tensors_that_can_not_be_split(wide: Path, tmp_path: Path) -> None:
    file = tmp_path / "file.gguf"
    for name, rows in (("blk.0.attn_qkv.weight", 65), ("blk.0.attn_qkv.weight", 3), ("blk.x.attn_qkv.weight", 128)):
        rewritten(wide / "target.gguf", file, {name: (np.zeros((rows, 64), np.float32), "F32")})
        with pytest.raises(CheckpointError, match="can not be split"):
            inspect_checkpoint(file)


def test_pieces_of_any_size(files: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = load_target(files("Q4_0"), torch.float32).checkpoint_tensors()
    monkeypatch.setattr("gemma_mtp.checkpoint.tensors.PIECE_BYTES", 3000)
    same_weights(load_target(files("Q4_0"), torch.float32).checkpoint_tensors(), expected)


def test_a_tensor_of_another_shape(wide: Path, tmp_path: Path) -> None:
    zeros = np.zeros((3, 64), np.float32), "F32"
    file = rewritten(wide / "target.gguf", tmp_path / "file.gguf", {"blk.1.attn_q.weight": zeros})
    with pytest.raises(CheckpointError, match=r"q_proj\.weight of shape \[3, 64\]"):
        load_target(file, torch.float32)
    file = rewritten(wide / "target.gguf", tmp_path / "less.gguf", {"blk.1.attn_q.weight": None})
    with pytest.raises(CheckpointError, match=r"no tensor model\.layers\.1\.self_attn\.q_proj\.weight"):
        load_target(file, torch.float32)


@given(st.data())
@settings(max_examples=60)
def test_damaged_files_give_typed_errors(wide: Path, data: st.DataObject) -> None:
    """Whatever bits are flipped before the tensors, and wherever the file is cut off."""
    content = bytearray((wide / "drafter.gguf").read_bytes())
    end = min(entry.offset for entry in read_header(wide / "drafter.gguf").tensors.values())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(24, end - 1))] ^= 1 << data.draw(st.integers(0, 7))
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(content))))
    path = wide / "damaged.gguf"
    path.write_bytes(content if cut is None else content[:cut])
    try:
        load_drafter(path, torch.float32)
        source = open_source(path)
        read_generation_config(source)
        if source.has_tokenizer:
            source.tokenizer()
    except GemmaMtpError:
        pass


# -- blocks


@pytest.mark.parametrize("kind", ["Q5_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q4_0"])
def test_blocks_of_every_kind(kind: str, tmp_path: Path) -> None:
    """What is loaded are the package's values, whether they are kept as blocks or made float32."""
    config = dataclasses.replace(PLE, hidden_size=256, intermediate_size=256)
    save_pair(tmp_path, random_target(config=config), random_drafter(config))
    export_gguf(tmp_path / "target", tmp_path / "f32.gguf", "F32")
    changed: dict[str, Any] = {
        name: (blocks(kind, rows, 256, seed), kind)
        for seed, (name, rows) in enumerate([
            ("token_embd.weight", 61), ("blk.0.ffn_gate.weight", 256), ("blk.0.ffn_up.weight", 256),
            ("blk.1.attn_q.weight", 64), ("blk.5.ffn_down.weight", 256),
        ])
    }  # fmt: skip
    changed["blk.5.ffn_down.weight"] = blocks(kind, 256, 512, 9), kind
    file = rewritten(tmp_path / "f32.gguf", tmp_path / "blocks.gguf", changed)
    weights = load_target(file, torch.float32).checkpoint_tensors()
    for name, (data, _) in changed.items():
        official = official_name(name)
        assert official is not None
        expected = gguf.dequantize(data, gguf.GGMLQuantizationType[kind])
        assert np.array_equal(weights[official].values().numpy(), expected), name
    kept = {name for name, weight in weights.items() if weight.quantised}
    alone = {"model.embed_tokens.weight", "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight",
             "model.layers.5.mlp.down_proj.weight"}  # fmt: skip
    assert kept == (alone if kind in ("Q8_0", "Q4_0") else set())  # queries lie beside keys of another type
    assert stored_dtypes(file) == {"F32", kind}


def test_a_type_that_is_not_read(wide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = np.zeros((61, 64 // 32 * 20), np.uint8)
    file = rewritten(wide / "target.gguf", tmp_path / "file.gguf", {"token_embd.weight": (data, "Q4_1")})
    assert main(["inspect", str(file)]) == 2
    assert "stores model.embed_tokens.weight as Q4_1, but F32 or BF16" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_a_pair_of_blocks(bundled: Any, kind: str) -> None:
    """Kept as they are stored, bit for bit, and drafting changes no token."""
    target, drafter = bundled(kind)
    pair = load_pair(target, drafter)
    form = {"Q8_0": Int8x32, "Q4_0": Int4}[kind]
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(target).tensors}
    count = 0
    for name, weight in pair.target.checkpoint_tensors().items():
        tensor = stored[str(gguf_name(name))]
        expected = gguf.dequantize(np.array(tensor.data), tensor.tensor_type)
        assert np.array_equal(weight.values().numpy(), expected.reshape(tuple(weight.shape))), name
        assert isinstance(weight, form) == (tensor.tensor_type.name == kind and weight.shape[-1] % 64 == 0), name
        count += isinstance(weight, form)
    assert count > 80
    drawn: tuple[dict[str, Any], ...] = ({}, {"temperature": 0.8, "seed": 3})
    for params in drawn:
        plain = tokens(pair, **params)
        assert [tokens(pair, K, **params) for K in (1, 3, 6)] == [plain] * 3


def test_what_rounding_to_another_dtype_loses_is_said(files: Any, caplog: pytest.LogCaptureFixture) -> None:
    target = files("Q8_0")
    load_target(target, torch.float32, strict=True)
    load_target(target, torch.bfloat16)
    assert "its tensors of Q8_0 are rounded to bfloat16; float32 keeps their values" in caplog.text
    with pytest.raises(CheckpointError, match="rounded to bfloat16"):
        load_target(target, torch.bfloat16, strict=True)


def test_quantising_a_file_while_loading(bundled: Any, tmp_path: Path) -> None:
    """And a quantised copy of it, which has the same weights and the file's tokenizer and generation config."""
    file, types = bundled("BF16")[0], parse_weight_types("int8")
    expected = load_target(TARGET, torch.bfloat16, types=types).checkpoint_tensors()
    same_weights(load_target(file, torch.bfloat16, types=types).checkpoint_tensors(), expected)
    write_quantised_copy(file, tmp_path / "copy", types, strict=True)
    same_weights(load_target(tmp_path / "copy", torch.bfloat16).checkpoint_tensors(), expected)
    copy, original = open_source(tmp_path / "copy"), open_source(TARGET)
    assert copy.generation_config() == original.generation_config()
    assert copy.tokenizer().encode(PROMPT) == original.tokenizer().encode(PROMPT)
    assert copy.tokenizer().chat_template == original.tokenizer().chat_template
    assert copy.tokenizer().special_tokens == original.tokenizer().special_tokens


def test_blocks_are_quantised_anew_where_asked(files: Any) -> None:
    file = files("Q8_0")
    loaded = load_target(file, torch.float32, types=parse_weight_types("int4"))
    assert loaded.checkpoint_tensors()["model.layers.0.mlp.gate_proj.weight"].format == "int4"
    same = load_target(file, torch.float32, types=parse_weight_types("q8_0")).checkpoint_tensors()
    same_weights(
        {name: weight for name, weight in same.items() if weight.shape[-1] != 32},
        {name: w for name, w in load_target(file, torch.float32).checkpoint_tensors().items() if w.shape[-1] != 32},
    )


# -- exports


def test_the_bundled_pair_comes_back(bundled: Any) -> None:
    """As bfloat16 every bit: weights, tokens with their log-probabilities, and the ends of turns."""
    target, drafter = bundled("BF16")
    ours, original = load_pair(target, drafter, strict=True), load_pair()
    same_weights(ours.target.checkpoint_tensors(), original.target.checkpoint_tensors())
    assert ours.generation == original.generation
    params = SamplingParams(max_tokens=24, ignore_eos=True, logprobs=3)
    first, second = (pair.generate(PROMPT, params, draft_tokens=3) for pair in (ours, original))
    assert (first.prompt_token_ids, first.token_ids) == (second.prompt_token_ids, second.token_ids)
    assert first.logprobs == second.logprobs
    assert first.accepted == second.accepted


@pytest.mark.parametrize("kind", ["F32", "F16"])
def test_other_types_come_back(wide: Path, files: Any, kind: str) -> None:
    """float32 as it is; float16 holds what it can of it."""
    loaded = load_target(files(kind), torch.float32).checkpoint_tensors()
    original = load_target(wide / "target", torch.float32).checkpoint_tensors()
    for name, weight in original.items():
        rounded = weight.values().half().float() if kind == "F16" and weight.ndim > 1 else weight.values()
        assert torch.equal(loaded[name].values(), rounded)


def test_export_says_what_is_lost(wide: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert export_gguf(wide / "target", tmp_path / "t.gguf", "F32", strict=True).losses == []
    made = export_gguf(wide / "target", tmp_path / "t.gguf", "Q8_0")
    assert made.losses == ["its matrices of F32 are rounded to Q8_0."]
    assert made.losses[0] in caplog.text
    assert set(made.types) == {"Q8_0", "F32"}
    odd = random_target(config=WIDE["odd"])
    save_pair(tmp_path, odd, random_drafter())
    losses = export_gguf(tmp_path / "target", tmp_path / "odd.gguf", "Q4_0").losses
    assert any(
        "matrices are written as float32, such as blk.0.proj.weight, which Q4_0 can not hold" in s for s in losses
    )
    with pytest.raises(CheckpointError, match="rounded to Q8_0"):
        export_gguf(wide / "target", tmp_path / "no.gguf", "Q8_0", strict=True)
    assert not (tmp_path / "no.gguf").exists()


def test_exports_that_are_refused(wide: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantisationError, match="type 'Q9' can not be written to GGUF; use one of F32, F16"):
        export_gguf(wide / "target", tmp_path / "t.gguf", "Q9")
    with pytest.raises(CheckpointError, match=r"t.bin must end in .gguf"):  # without which nobody reads it again
        export_gguf(wide / "target", tmp_path / "t.bin")
    write_quantised_copy(wide / "target", tmp_path / "int8", parse_weight_types("int8"))
    with pytest.raises(QuantisationError, match="is quantised already"):
        export_gguf(tmp_path / "int8", tmp_path / "t.gguf", "F32")
    shutil.copytree(wide / "target", tmp_path / "linear")
    raw = read_json(wide / "target" / "config.json")
    raw["rope_parameters"]["full_attention"]["factor"] = 2.0
    (tmp_path / "linear" / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match="with a factor"):
        export_gguf(tmp_path / "linear", tmp_path / "t.gguf", "F32")
    assert not list(tmp_path.glob("*.gguf"))
    assert not list(tmp_path.glob(".*partial"))


def test_export_of_a_file(files: Any, tmp_path: Path) -> None:
    """A file written again, and blocks made floats and blocks again, are the same."""
    for kind in ("BF16", "Q8_0"):
        first = files(kind)
        export_gguf(first, tmp_path / "second.gguf", kind)
        assert (tmp_path / "second.gguf").read_bytes() == first.read_bytes()


def test_export_on_the_command_line(wide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "drafter.gguf"
    arguments = ["export", str(wide / "drafter"), "--to", "gguf", "--out", str(out), "--type", "q4_0"]
    assert main([*arguments, "--tokenizer", str(TARGET)]) == 2  # it has more tokens than this model
    assert "the tokenizer has ids up to" in capsys.readouterr().err
    assert main(arguments) == 0
    assert f"{out}: gguf, " in capsys.readouterr().out
    assert main([*arguments[:-1], "q3_k"]) == 2
    assert "type 'Q3_K' can not be written" in capsys.readouterr().err
    assert set(FILE_TYPES) == {"F32", "F16", "BF16", "Q8_0", "Q4_0"}


def test_a_drafter_takes_a_tokenizer_along(tmp_path: Path) -> None:
    words = open_source(TARGET).tokenizer()
    export_gguf(DRAFTER, tmp_path / "d.gguf", "Q8_0", tokenizer=words)
    assert open_source(tmp_path / "d.gguf").tokenizer().encode(PROMPT) == words.encode(PROMPT)


# -- places and defaults


def test_directories_that_hold_files(bundled: Any, tmp_path: Path) -> None:
    target, drafter = bundled("Q8_0")
    shutil.copy(target, tmp_path / "model-Q8_0.gguf")
    (tmp_path / "mmproj-model.gguf").write_bytes(b"towers")
    (tmp_path / "config.json").write_text("{}")
    assert read_config(tmp_path) == read_config(target)
    shutil.copy(drafter, tmp_path / "mtp-model.gguf")
    assert read_config(tmp_path) == read_config(target)
    shutil.copy(target, tmp_path / "model-Q4_0.gguf")
    with pytest.raises(CheckpointError, match=r"several GGUF files, model-Q4_0\.gguf, model-Q8_0\.gguf; give one"):
        open_source(tmp_path)
    shutil.copy(DRAFTER / "model.safetensors", tmp_path)
    shutil.copy(DRAFTER / "config.json", tmp_path)
    assert read_config(tmp_path) == read_config(DRAFTER)


def test_a_split_checkpoint(wide: Path, tmp_path: Path) -> None:
    reader = gguf.GGUFReader(wide / "target.gguf")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "gemma4", split_max_tensors=20)
    for key, field in reader.fields.items():
        if "." in key and key != "general.architecture":
            writer.add_key_value(
                key, field.contents(), field.types[0], field.types[1] if len(field.types) > 1 else None
            )
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) > 2
    expected = load_target(wide / "target", torch.float32).checkpoint_tensors()
    for place in (parts[0], parts[-1], tmp_path):
        same_weights(load_target(place, torch.float32, strict=True).checkpoint_tensors(), expected)
    parts[1].unlink()
    with pytest.raises(CheckpointError, match="lacks m-00002-of"):
        load_target(parts[0], torch.float32)


def test_a_drafter_beside_a_target_is_found(bundled: Any, tmp_path: Path) -> None:
    """By its name: of the same type first, and of no other model."""
    target = tmp_path / "gemma-4-tiny-Q8_0.gguf"
    shutil.copy(bundled("Q8_0")[0], target)
    (tmp_path / "mtp-gemma-4-other-Q8_0.gguf").write_bytes(b"")
    assert find_drafter(target) is None
    for kind in ("BF16", "Q8_0"):
        shutil.copy(bundled(kind)[1], tmp_path / f"mtp-gemma-4-tiny-{kind}.gguf")
        assert find_drafter(target) == tmp_path / f"mtp-gemma-4-tiny-{kind}.gguf"
    assert find_drafter(tmp_path / "gemma-4-tiny-Q8_0.gguf") == tmp_path / "mtp-gemma-4-tiny-Q8_0.gguf"
    assert load_pair(target).drafter is not None


def test_no_such_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "absent.gguf")]) == 2
    assert "absent.gguf does not exist; give a GGUF file." in capsys.readouterr().err


def test_generation_defaults_of_the_formats_own_keys(wide: Path, tmp_path: Path) -> None:
    given = {
        "gemma_mtp.generation_config": None, "general.sampling.temp": 0.7, "general.sampling.top_k": 40,
        "general.sampling.top_p": 0.9, "general.sampling.penalty_repeat": 1.1, "general.sampling.mirostat": 2,
        "tokenizer.ggml.suppress_tokens": [3, 4], "tokenizer.ggml.eos_token_id": 7, "tokenizer.ggml.eot_token_id": 9,
    }  # fmt: skip
    file = rewritten(wide / "target.gguf", tmp_path / "file.gguf", metadata=given)
    defaults = read_generation_config(file)
    assert (defaults.temperature, defaults.top_k, defaults.top_p) == (0.7, 40, 0.9)
    assert (defaults.repetition_penalty, defaults.suppress_tokens, defaults.eos_token_ids) == (1.1, (3, 4), (7, 9))
    (note,) = defaults.notes
    assert "general.sampling.mirostat = 2" in note
    with pytest.raises(CheckpointError, match="mirostat"):
        load_pair(file, strict=True)
    rewritten(wide / "target.gguf", file, metadata={"gemma_mtp.generation_config": "[1"})
    with pytest.raises(ConfigError, match="a JSON object"):
        read_generation_config(file)
    rewritten(wide / "target.gguf", file, metadata={**given, "tokenizer.ggml.suppress_tokens": "none"})
    with pytest.raises(ConfigError, match=r"suppress_tokens = 'none', but whole numbers"):
        read_generation_config(file)


def test_sampling_defaults_are_written_in_the_formats_keys(tmp_path: Path) -> None:
    save_pair(tmp_path, random_target(config=PLE), random_drafter())
    written = {"temperature": 0.5, "top_k": 20, "suppress_tokens": [3], "max_new_tokens": 9, "eos_token_id": [1, 5]}
    (tmp_path / "target" / "generation_config.json").write_text(json.dumps(written))
    export_gguf(tmp_path / "target", tmp_path / "t.gguf", "F32")
    metadata = read_header(tmp_path / "t.gguf").metadata
    assert (metadata["general.sampling.temp"], metadata["general.sampling.top_k"]) == (0.5, 20)
    assert metadata["tokenizer.ggml.suppress_tokens"] == array.array("i", [3])
    assert read_generation_config(tmp_path / "t.gguf") == read_generation_config(tmp_path / "target")


# -- commands


def test_commands_take_files(bundled: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target, drafter = map(str, bundled("Q4_0"))
    assert main(["inspect", target, drafter]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "pair: fits" in shown
    assert "stored dtypes Q4_0 128, F32 117" in shown
    assert "GGUF files have no centroid head: the drafter scores the whole vocabulary." in shown
    assert "(128 of Q4_0): those of Q4_0 and Q8_0 stay so" in shown
    models = ["--target", target, "--drafter", drafter]
    assert main(["generate", "import", "-n", "8", "--compare", *models]) == 0
    data = tmp_path / "text.py"
    data.write_text("import os\n\n\ndef main():\n    pass\n")
    assert main(["acceptance", str(data), *models, "--max-tokens", "8", "--json"]) == 0
    assert main(["quantize", target, "--out", str(tmp_path / "int8")]) == 0


def test_a_drafter_of_blocks_is_not_trained(bundled: Any) -> None:
    with pytest.raises(TrainingError, match="is a quantised drafter, which can not be trained"):
        check_unquantised(bundled("Q8_0")[1])
    check_unquantised(bundled("BF16")[1])
