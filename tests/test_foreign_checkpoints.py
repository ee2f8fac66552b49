"""Checkpoints as other tools write them: other names, other files, heads that contradict the configuration."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import TINY, random_target, same_weights
from oracle import build_drafter, build_target
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from gemma_mtp.checkpoint import load_drafter, load_target, read_drafter_config, save_drafter
from gemma_mtp.checkpoint.names import find_tensors
from gemma_mtp.checkpoint.quantised_copy import write_quantised_copy
from gemma_mtp.decoding.params import SamplingParams
from gemma_mtp.engine.pair import load_pair
from gemma_mtp.errors import CheckpointError
from gemma_mtp.interop.directory import export_directory
from gemma_mtp.interop.gguf import export_gguf
from gemma_mtp.measure.memory import inspect_checkpoint
from gemma_mtp.sizes.weights import weight_bytes
from gemma_mtp.weight_types import WeightTypes, parse_weight_types

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
IDS = torch.arange(24)[None] * 7 % 61
OFFICIAL = sorted(random_target().checkpoint_tensors())


def rewrite(directory: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, directory / SINGLE, metadata={"format": "pt"})


def renamed(directory: Path, rename: Callable[[str], str]) -> None:
    rewrite(directory, {rename(name): tensor for name, tensor in load_file(directory / SINGLE).items()})


def edit_config(directory: Path, **changes: Any) -> dict[str, Any]:
    path = directory / "config.json"
    raw = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps(raw), encoding="utf-8")
    return raw


def notes(directory: Path) -> list[str]:
    return inspect_checkpoint(directory).notes


# -- names


def instead(prefix: str) -> Callable[[str], str]:
    return lambda name: prefix + name.removeprefix("model.") if name.startswith("model.") else name


def before(prefix: str) -> Callable[[str], str]:
    return lambda name: prefix + name


def in_every_layer(wrapper: str) -> Callable[[str], str]:
    def rename(name: str) -> str:
        head, layers, rest = name.partition("layers.")
        index, dot, rest = rest.partition(".")
        return f"{head}{layers}{index}{dot}{wrapper}{rest}" if layers else name

    return rename


RENAMES = {
    "text model alone": instead(""),
    "language_model": instead("language_model."),
    "multimodal": instead("model.language_model."),
    "older multimodal": before("language_model."),
    "PEFT": before("base_model.model."),
    "torch.compile": before("_orig_mod."),
    "DDP": before("module."),
    "DDP of a compiled one": before("module._orig_mod."),
    "compiled PEFT of DDP": before("_orig_mod.base_model.model.module."),
    "PEFT of multimodal": lambda name: "base_model.model." + instead("model.language_model.")(name),
    "DDP of a bare text model": lambda name: "module." + instead("")(name),
    "compiled layers": in_every_layer("_orig_mod."),
    "FSDP with activation checkpointing": in_every_layer("_fsdp_wrapped_module._checkpoint_wrapped_module."),
}


@pytest.mark.parametrize("rename", RENAMES.values(), ids=RENAMES)
def test_prefixes(rename: Callable[[str], str], copied: Path, saved: Path) -> None:
    """Every weight is the plainly named checkpoint's."""
    for kind, load in (("target", load_target), ("drafter", load_drafter)):
        renamed(copied / kind, rename)
        plain = load(saved / kind, torch.float32).checkpoint_tensors()
        same_weights(load(copied / kind, torch.float32, strict=True).checkpoint_tensors(), plain)


def test_a_renamed_pair_generates_the_same_tokens(copied: Path, saved: Path) -> None:
    renamed(copied / "target", RENAMES["PEFT of multimodal"])
    renamed(copied / "drafter", RENAMES["DDP of a compiled one"])
    params = SamplingParams(max_tokens=24, temperature=0.7, seed=3)
    plain, foreign = (
        load_pair(root / "target", root / "drafter", device="cpu").generate([5, 6, 7], params, draft_tokens=3)
        for root in (saved, copied)
    )
    assert foreign.token_ids == plain.token_ids
    assert [(r.drafted, r.accepted) for r in foreign.rounds] == [(r.drafted, r.accepted) for r in plain.rounds]


WRAPPERS = ["module.", "_orig_mod.", "base_model.model.", "_fsdp_wrapped_module."]


@given(
    st.lists(st.sampled_from(WRAPPERS), max_size=4),
    st.sampled_from(
        ["model.", "", "language_model.", "model.language_model.", "language_model.model.", "student.net."]
    ),
    st.booleans(),
)
def test_any_wrapping_of_any_place_is_found(wrappers: list[str], place: str, head: bool) -> None:
    outer = "".join(wrappers)
    stored = {name: outer + place + name.removeprefix("model.") for name in OFFICIAL}
    if head:
        stored["lm_head.weight"] = f"{outer}lm_head.weight"
    towers = [
        f"{outer}model.vision_tower.encoder.layers.0.input_layernorm.weight",
        f"{outer}model.audio_tower.norm.weight",
    ]
    assert find_tensors([*stored.values(), *towers], OFFICIAL, ["lm_head.weight"]) == stored


@given(st.sets(st.sampled_from(OFFICIAL), min_size=1))
def test_a_text_model_with_names_missing_is_found_in_part(missing: set[str]) -> None:
    """What is there is never taken for something else."""
    stored = [f"model.language_model.{name.removeprefix('model.')}" for name in OFFICIAL if name not in missing]
    for name, place in find_tensors(stored, OFFICIAL).items():
        assert place == f"model.language_model.{name.removeprefix('model.')}"
        assert name not in missing


def test_a_text_model_in_two_places_is_refused(copied: Path) -> None:
    tensors = load_file(copied / "target" / SINGLE)
    rewrite(copied / "target", {**tensors, **{f"ema.{name}": tensor.clone() for name, tensor in tensors.items()}})
    refused(copied / "target", "more than once", "'ema.model.'", "'model.'")
    rewrite(copied / "target", {**tensors, "module.model.norm.weight": tensors["model.norm.weight"].clone()})
    refused(copied / "target", "model.norm.weight twice", "module.model.norm.weight")


def test_the_refusal_lists_names_that_were_found(copied: Path) -> None:
    renamed(copied / "target", lambda name: name.replace("q_proj.weight", "q_proj.base_layer.weight"))
    refused(
        copied / "target", "no tensor model.layers.0.self_attn.q_proj.weight,", "config.json", "base_layer", " more"
    )
    rewrite(copied / "target", {"a.weight": torch.zeros(2), "b.weight": torch.zeros(2)})
    refused(copied / "target", "it holds a.weight, b.weight;")


def refused(directory: Path, *named: str, **options: Any) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_target(directory, torch.float32, **options)
    message = str(caught.value)
    assert [part for part in named if part not in message] == []
    assert "\n" not in message
    assert message.endswith(".")


# -- tensors that nothing is read from


@pytest.mark.parametrize("name", [
    "model.layers.0.self_attn.q_proj.bias", "model.layers.0.mlp.up_proj.lora_A.default.weight", "score.weight",
    "model.layers.9.mlp.up_proj.weight",
])  # fmt: skip
def test_tensors_without_a_use_are_named(name: str, copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    rewrite(copied / "target", {**load_file(copied / "target" / SINGLE), name: torch.ones(3)})
    load_target(copied / "target", torch.float32)
    (warning,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert name in warning.getMessage()
    refused(copied / "target", name, strict=True)


def test_keys_of_layers_that_share_them_are_expected(copied: Path) -> None:
    """The official E2B has them for all layers, and no model reads them."""
    tensors, last = load_file(copied / "target" / SINGLE), TINY.num_hidden_layers - 1
    for part in ("k_proj", "v_proj", "k_norm"):
        tensors[f"model.layers.{last}.self_attn.{part}.weight"] = torch.ones(2, 2)
    rewrite(copied / "target", tensors)
    assert notes(copied / "target") == []
    tensors["model.layers.0.self_attn.k_norm.bias"] = torch.ones(2)
    rewrite(copied / "target", tensors)
    assert len(notes(copied / "target")) == 1


# -- files


def test_a_single_file_is_taken_before_an_index(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As in transformers, whether the shards are there or gone."""
    build_target("text", seed=1).save_pretrained(tmp_path / "old", max_shard_size="90KB")
    build_target("text", seed=2).save_pretrained(tmp_path / "new")
    for file in (tmp_path / "old").glob("model*"):
        shutil.copy(file, tmp_path / "new")
    for _ in range(2):
        theirs = type(build_target("text")).from_pretrained(tmp_path / "new").state_dict()
        ours = load_target(tmp_path / "new", torch.float32).checkpoint_tensors()
        assert all(torch.equal(weight.dense(), theirs[name]) for name, weight in ours.items())
        assert SINGLE in caplog.text
        assert INDEX in caplog.text
        refused(tmp_path / "new", SINGLE, INDEX, strict=True)
        for shard in (tmp_path / "new").glob("model-*"):
            shard.unlink()


def test_an_adapter_beside_the_weights_is_refused(copied: Path) -> None:
    (copied / "target" / "adapter_config.json").write_text("{}", encoding="utf-8")
    refused(copied / "target", "adapter_config.json", "--adapter")


def test_weights_under_another_files_name_are_refused(copied: Path) -> None:
    edit_config(copied / "target", transformers_weights="other.safetensors")
    with pytest.raises(Exception, match=r"transformers_weights = 'other\.safetensors'"):
        load_target(copied / "target", torch.float32)


# -- what is stored


def test_a_quantization_config_without_a_method_says_nothing(copied: Path, saved: Path) -> None:
    edit_config(copied / "target", quantization_config={"bits": 4, "group_size": 32})
    plain = load_target(saved / "target", torch.float32).checkpoint_tensors()
    same_weights(load_target(copied / "target", torch.float32, strict=True).checkpoint_tensors(), plain)
    renamed(copied / "target", lambda name: f"{name}_packed" if "q_proj" in name else name)
    refused(copied / "target", "q_proj.weight,", "q_proj.weight_packed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float64_is_converted(dtype: torch.dtype, copied: Path, saved: Path) -> None:
    for kind, load in (("target", load_target), ("drafter", load_drafter)):
        tensors = load_file(copied / kind / SINGLE)
        rewrite(copied / kind, {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()})
        same_weights(load(copied / kind, dtype).checkpoint_tensors(), load(saved / kind, dtype).checkpoint_tensors())
    ours = load_pair(copied / "target", copied / "drafter", device="cpu")
    assert ours.target.embed_tokens.dtype == torch.float32
    write_quantised_copy(copied / "target", copied / "copy", parse_weight_types("int8"))
    assert inspect_checkpoint(copied / "copy").stored_dtypes["F32"] > 0


# -- a head beside the embedding


def with_head(directory: Path, model: PreTrainedModel, outer: bool | None, inner: bool | None, head: str) -> None:
    """Write a model's checkpoint with tie_word_embeddings at two places, and a head; None leaves a field out."""
    model.save_pretrained(directory)
    raw = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    for content, tied in ((raw, outer), (raw.get("text_config", {}), inner)):
        content.pop("tie_word_embeddings", None)
        content |= {} if tied is None else {"tie_word_embeddings": tied}
    (directory / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    tensors = load_file(directory / SINGLE)
    (embedding,) = (name for name in tensors if name.endswith("model.embed_tokens.weight"))
    heads = {"equal": tensors[embedding].clone(), "other": tensors[embedding].flip(0).contiguous()}
    tensors |= {} if head in ("absent", "alone") else {"lm_head.weight": heads[head]}
    if head == "alone":
        tensors["lm_head.weight"] = tensors.pop(embedding)
    rewrite(directory, tensors)


def logits_of(model: PreTrainedModel) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize(("family", "outer", "inner", "head"), [
    ("text", None, None, "other"), ("text", False, None, "other"), ("text", True, None, "equal"),
    ("text", False, None, "equal"), ("text", None, None, "alone"), ("31b", None, False, "other"),
    ("12b", True, True, "other"), ("12b", None, True, "other"), ("12b", True, False, "other"),
    ("12b", False, True, "other"), ("12b", True, False, "absent"), ("12b", None, None, "alone"),
])  # fmt: skip
def test_the_head_is_transformers(
    family: str, outer: bool | None, inner: bool | None, head: str, tmp_path: Path
) -> None:
    """Tied or not, by the outer field and by what is stored: the logits are theirs."""
    with_head(tmp_path / "model", build_target(family), outer, inner, head)
    theirs = logits_of(type(build_target(family)).from_pretrained(tmp_path / "model"))
    ours = load_target(tmp_path / "model", torch.float32)
    assert (ours.lm_head is None) == (outer is not False and head != "other")
    with torch.inference_mode():
        got = ours.logits(ours.forward_sequence(IDS).hidden_BTD)
    torch.testing.assert_close(got, theirs, atol=1e-4, rtol=1e-4)
    contradicts = outer is not False and head == "other"
    assert len(notes(tmp_path / "model")) == contradicts
    if contradicts:
        refused(tmp_path / "model", "tie_word_embeddings", "lm_head.weight", strict=True)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("centroids", [False, True])
def test_a_drafters_head_is_transformers(centroids: bool, tied: bool, tmp_path: Path) -> None:
    """And it is all that is kept, planned and written, because nothing is looked up in the embedding beside it."""
    with_head(tmp_path / "drafter", build_drafter("e2b", centroids), tied, None, "other")
    ours, kind = load_drafter(tmp_path / "drafter", torch.float32), type(build_drafter("e2b"))
    theirs = kind.from_pretrained(tmp_path / "drafter")
    assert len(notes(tmp_path / "drafter")) == tied  # a contradiction where config.json ties them
    assert torch.equal(ours.head.weight, theirs.lm_head.weight)
    kept = sum(weight.nbytes for weight in ours.checkpoint_tensors().values())
    all_of_theirs = sum(weight.nbytes for weight in load_file(tmp_path / "drafter" / SINGLE).values())
    assert all_of_theirs - kept == ours.head.weight.nbytes
    config = read_drafter_config(tmp_path / "drafter")
    assert weight_bytes(config, WeightTypes(), 4) == kept
    report = inspect_checkpoint(tmp_path / "drafter")
    assert (report.weight_bytes, report.skipped_bytes) == (kept, ours.head.weight.nbytes)

    save_drafter(ours, config, tmp_path / "saved", torch.float32)
    export_directory(tmp_path / "drafter", tmp_path / "exported", kind="F32")
    export_gguf(tmp_path / "drafter", tmp_path / "drafter.gguf", "F32", tokenizer=None)
    for place in ("saved", "exported"):
        again = kind.from_pretrained(tmp_path / place)
        assert torch.equal(again.lm_head.weight, theirs.lm_head.weight)
        assert again.config.tie_word_embeddings
    read = load_drafter(tmp_path / "drafter.gguf", torch.float32)
    assert torch.equal(read.head.weight, theirs.lm_head.weight)
    write_quantised_copy(tmp_path / "drafter", tmp_path / "copy", parse_weight_types("drafter-head=int8"))
    quantised = load_drafter(tmp_path / "drafter", torch.float32, types=parse_weight_types("drafter-head=int8"))
    copy = load_drafter(tmp_path / "copy", torch.float32)
    assert torch.equal(copy.head.stored.dense(), quantised.head.stored.dense())


def test_an_untied_model_without_a_head_is_refused(tmp_path: Path) -> None:
    """transformers would draw one at random."""
    with_head(tmp_path / "model", build_target("text"), False, None, "absent")
    refused(tmp_path / "model", "tie_word_embeddings false", "lm_head.weight")


@pytest.mark.parametrize("family", ["text", "31b"])
@pytest.mark.parametrize("kinds", ["int8", "target=int8"])
def test_a_quantised_copy_keeps_the_head(family: str, kinds: str, tmp_path: Path) -> None:
    with_head(tmp_path / "model", build_target(family), None, None, "other")
    types = parse_weight_types(kinds)
    write_quantised_copy(tmp_path / "model", tmp_path / "copy", types)
    expected = load_target(tmp_path / "model", torch.float32, types=types)
    copied = load_target(tmp_path / "copy", torch.float32, strict=True)
    same_weights(copied.checkpoint_tensors(), expected.checkpoint_tensors())
    assert copied.lm_head is not None


def test_heads_in_other_dtypes_are_compared_by_value(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(copied / "target" / SINGLE).items()}
    head = tensors["model.embed_tokens.weight"].float()
    rewrite(copied / "target", {**tensors, "lm_head.weight": head})
    assert load_target(copied / "target", torch.float32, strict=True).lm_head is None
    head[3, 2] += 2**-20
    rewrite(copied / "target", {**tensors, "lm_head.weight": head})
    assert load_target(copied / "target", torch.float32).lm_head is not None
    assert [record.levelno for record in caplog.records if record.levelno > logging.INFO] == [logging.WARNING]
