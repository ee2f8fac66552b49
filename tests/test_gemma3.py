"""Gemma 3 as users have it: safetensors and GGUF, text-only and multimodal, drafted, trained for, quantised."""

import dataclasses
import json
import random
import shutil
import string
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gemma3 import IDS, LAYERS, LINEAR, SCALAR, VOCAB, WINDOW, build, build_multimodal, write_gguf
from gguf_files import rewritten
from models import letters, random_drafter, same_weights
from oracle import F, S
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

from gemma_mtp import SamplingParams, load_pair
from gemma_mtp.checkpoint import load_target, open_source, read_config, read_target_config, save_drafter, save_target
from gemma_mtp.checkpoint.quantised_copy import write_quantised_copy
from gemma_mtp.cli import main
from gemma_mtp.config import parse_target_config
from gemma_mtp.config.pairing import check_pair
from gemma_mtp.engine.pair import Pair
from gemma_mtp.errors import CheckpointError, ConfigError
from gemma_mtp.interop.gguf import export_gguf
from gemma_mtp.measure.memory import inspect_checkpoint
from gemma_mtp.model.layers import RMSNorm
from gemma_mtp.model.target import Target
from gemma_mtp.sizes.weights import weight_bytes
from gemma_mtp.training.shapes import DrafterShape, new_drafter_config
from gemma_mtp.weight_types import WeightTypes, parse_weight_types


@pytest.fixture(scope="module")
def theirs() -> Gemma3ForCausalLM:
    return build()


@pytest.fixture(scope="module")
def root(theirs: Gemma3ForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories `target` (float32), `narrow` (bfloat16) and `drafter` (random), and the file `target.gguf`."""
    root = tmp_path_factory.mktemp("gemma3")
    theirs.save_pretrained(root / "target")
    build().to(torch.bfloat16).save_pretrained(root / "narrow")
    write_gguf(theirs, root / "target.gguf", metadata={"gemma3.attention.key_length": 16})
    config = new_drafter_config(read_target_config(root / "target"), DrafterShape(hidden=16, heads=4))
    drafter = random_drafter(dataclasses.replace(config.text, hidden_size=64))
    drafter.config = dataclasses.replace(drafter.config, text=dataclasses.replace(config.text, intermediate_size=32))
    save_drafter(drafter, drafter.config, root / "drafter", torch.float32)
    return root


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return bool((ours - theirs).abs().max() <= 2e-5 * theirs.abs().max())


@torch.inference_mode()
def logits(target: Target) -> torch.Tensor:
    return target.logits(target.forward_sequence(IDS[None]).hidden_BTD[0])


def tokens(pair: Pair, draft_tokens: int = 0, **params: Any) -> list[int]:
    chosen = SamplingParams(max_tokens=24, ignore_eos=True, **params)
    return pair.generate(IDS.tolist(), chosen, draft_tokens=draft_tokens).token_ids


def reference(model: Any) -> list[int]:
    made = model.generate(IDS[None], max_new_tokens=24, min_new_tokens=24, do_sample=False)
    return made[0, len(IDS) :].tolist()


# -- what is computed


@torch.inference_mode()
def test_logits_and_tokens_are_theirs(theirs: Gemma3ForCausalLM, root: Path) -> None:
    """In float32, beyond the window; of a pair with any drafter, greedy and sampled, the tokens of plain decoding."""
    assert close(logits(load_target(root / "target", torch.float32, strict=True)), theirs(IDS[None]).logits[0])
    pair = load_pair(root / "target", root / "drafter", dtype="float32", device="cpu", strict=True)
    assert tokens(pair) == reference(theirs)
    drawn: tuple[dict[str, Any], ...] = ({}, {"temperature": 0.9, "seed": 5})
    for params in drawn:
        assert [tokens(pair, K, **params) for K in (1, 3, 6)] == [tokens(pair, **params)] * 3


@torch.inference_mode()
def test_norms_are_rounded_after_their_product() -> None:
    """In bfloat16, bit for bit as transformers has it; with the sum 1 + w rounded first, many results are others."""
    generator = torch.Generator().manual_seed(0)
    theirs = Gemma3RMSNorm(64).bfloat16()
    theirs.weight.copy_(torch.randn(64, generator=generator) * 0.3)
    x = torch.randn(200, 64, generator=generator).bfloat16()
    ours = RMSNorm(64, 1e-6)
    ours.weight.copy_(1 + theirs.weight.float())
    assert torch.equal(ours(x), theirs(x))
    assert (ours.bfloat16()(x) != theirs(x)).float().mean() > 0.05


@torch.inference_mode()
def test_bfloat16_keeps_the_norms(root: Path) -> None:
    """Whole: 1 + w in float32, whatever the rest is kept in; and the logits come nearer to transformers' for it."""
    target = load_target(root / "narrow", torch.bfloat16, strict=True)
    model = Gemma3ForCausalLM.from_pretrained(root / "narrow", dtype=torch.bfloat16)
    stored, norms = model.state_dict(), 0
    for name, weight in target.checkpoint_tensors().items():
        norm = "norm" in name
        norms += norm
        assert torch.equal(weight.values(), 1 + stored[name].float() if norm else stored[name].float()), name
    assert norms == 6 * LAYERS + 1
    expected = model(IDS[None]).logits[0].float()
    rounded = load_target(root / "narrow", torch.bfloat16).to(torch.bfloat16)
    ours, other = ((logits(each).float() - expected).norm() for each in (target, rounded))
    assert ours < 0.05 * expected.norm()
    assert ours < other


# -- what configurations say


@torch.inference_mode()
def test_a_multimodal_checkpoint(tmp_path: Path) -> None:
    model = build_multimodal()
    model.save_pretrained(tmp_path / "mm")
    target = load_target(tmp_path / "mm", torch.float32, strict=True)
    assert close(logits(target), model(input_ids=IDS[None]).logits[0])
    report = inspect_checkpoint(tmp_path / "mm")
    assert (report.model_type, report.notes) == ("gemma3", [])
    assert report.skipped_tensors > 0
    int8 = parse_weight_types("int8")
    write_quantised_copy(tmp_path / "mm", tmp_path / "copy", int8, strict=True)
    same_weights(
        load_target(tmp_path / "copy", torch.float32).checkpoint_tensors(),
        load_target(tmp_path / "mm", torch.float32, types=int8).checkpoint_tensors(),
    )


def test_what_the_hubs_multimodal_files_leave_out() -> None:
    """gemma-3-4b-it's config.json of 2025 names seven fields of its text model."""
    text = {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    }  # fmt: skip
    ours = parse_target_config({"model_type": "gemma3", "eos_token_id": [1, 106], "text_config": text}).text
    theirs = Gemma3ForCausalLM.config_class(**text)
    for name in ("vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings",
                 "sliding_window", "bos_token_id", "pad_token_id", "rms_norm_eps"):  # fmt: skip
        assert getattr(ours, name) == getattr(theirs, name), name
    assert list(ours.layer_types) == theirs.layer_types
    assert ours.options.score_scale == theirs.query_pre_attn_scalar**-0.5
    for kind, rope in ((S, ours.sliding_rope), (F, ours.full_rope)):
        stated = theirs.rope_parameters[kind]
        assert (rope.rope_theta, rope.rope_type) == (stated["rope_theta"], stated["rope_type"])
        assert rope.factor == stated.get("factor", 1.0)
    assert ours.eos_token_ids == (1, 106)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"use_bidirectional_attention": True}, "cannot decode"),
        ({"num_kv_shared_layers": 2}, "num_kv_shared_layers = 2, which no Gemma 3 has"),
        ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar = 0, but a number from"),
        ({"query_pre_attn_scalar": "256"}, "= '256', but a number from"),
        ({"rope_parameters": [1]}, "no objects"),
        ({"rope_parameters": {F: 3}}, "no objects"),
        ({"rope_scaling": "linear"}, "no objects"),
        ({"rope_parameters": {F: {"rope_type": "yarn", "factor": 4.0}}}, "rope_type 'yarn'"),
        ({"attention_bias": True}, "Gemma 3 attention has no biases"),
        ({"num_hidden_layers": 5000, "layer_types": None}, "1 to 1024 were expected"),
        ({"num_hidden_layers": 10**12, "layer_types": None}, "2147483647 at most"),
        ({"num_hidden_layers": "7"}, "a int was expected"),
    ],
)
def test_configurations_that_can_not_be_decoded_with(root: Path, changes: dict[str, Any], reason: str) -> None:
    raw = json.loads((root / "target" / "config.json").read_text())
    with pytest.raises(ConfigError, match=reason):
        parse_target_config({**raw, **changes})


# -- GGUF


@torch.inference_mode()
def test_gguf_files_are_the_same_model(root: Path, tmp_path: Path) -> None:
    """Norms come back without the 1 inside, whole; what the file does not say is llama.cpp's own."""
    ours, stored = read_config(root / "target.gguf").text, read_config(root / "target").text
    for name in ("layer_types", "sliding_rope", "full_rope", "head_dim", "global_head_dim", "sliding_window",
                 "rms_norm_eps", "final_logit_softcapping", "num_key_value_heads", "tie_word_embeddings"):  # fmt: skip
        assert getattr(ours, name) == getattr(stored, name), name
    assert ours.options.score_scale == 16**-0.5
    plain = build(query_pre_attn_scalar=16)
    write_gguf(plain, tmp_path / "t.gguf")
    target = load_target(tmp_path / "t.gguf", torch.float32, strict=True)
    assert close(logits(target), plain(IDS[None]).logits[0])
    pair = load_pair(tmp_path / "t.gguf", root / "drafter", dtype="float32", device="cpu", strict=True)
    assert tokens(pair, 3) == tokens(pair) == reference(plain)


def test_transformers_reads_the_same_of_the_file(tmp_path: Path) -> None:
    """Its own reading of a file with blocks, where the file says what it does not know by itself."""
    model = build(query_pre_attn_scalar=256, rope_parameters={S: {"rope_type": "default", "rope_theta": 1e4},
                                                              F: {"rope_type": "default", "rope_theta": 1e6}},
                  head_dim=256, num_hidden_layers=6)  # fmt: skip
    scaling = dict.fromkeys(("gemma3.rope.scaling.type", "gemma3.rope.scaling.factor"))
    file = write_gguf(model, tmp_path / "t.gguf", "Q8_0", scaling)
    read: Any = AutoModelForCausalLM
    other = read.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    target = load_target(file, torch.float32)
    for name, weight in target.checkpoint_tensors().items():
        expected = other.state_dict()[name] + ("norm" in name)
        assert torch.allclose(weight.values(), expected, rtol=0, atol=1e-6), name


GGUF_CHANGES: dict[str, tuple[dict[str, Any], str, Any]] = {
    "a pattern": ({"attention.sliding_window_pattern": 2}, "layer_types", (S, F, S, F, S, F, S)),
    "flags": ({"attention.sliding_window_pattern": [True] * 6 + [False]}, "layer_types", (S,) * 6 + (F,)),
    "no window": ({"attention.sliding_window": None}, "layer_types", (F,) * LAYERS),
    "softcap": ({"final_logit_softcapping": 30.0}, "final_logit_softcapping", 30.0),
    "no scaling": ({"rope.scaling.factor": None}, "full_rope.factor", 1.0),
    "older scaling": ({"rope.scaling.factor": None, "rope.scale_linear": 4.0}, "full_rope.factor", 4.0),
    "scaling of no kind": ({"rope.scaling.type": "none"}, "full_rope.factor", 1.0),
    "local base": ({"rope.freq_base_swa": 5000.0}, "sliding_rope.rope_theta", 5000.0),
}  # fmt: skip


@pytest.mark.parametrize("name", GGUF_CHANGES)
def test_what_a_file_says_otherwise(root: Path, name: str, tmp_path: Path) -> None:
    changed, attribute, expected = GGUF_CHANGES[name]
    metadata = {f"gemma3.{key}": value for key, value in changed.items()}
    found: Any = read_config(rewritten(root / "target.gguf", tmp_path / "t.gguf", metadata=metadata)).text
    for part in attribute.split("."):
        found = getattr(found, part)
    assert found == expected


def test_the_27b_has_another_scale(theirs: Gemma3ForCausalLM, tmp_path: Path) -> None:
    """llama.cpp knows it by its 62 layers."""
    model = build(num_hidden_layers=62, hidden_size=32, intermediate_size=16, num_attention_heads=2)
    file = write_gguf(model, tmp_path / "t.gguf")
    assert read_config(file).text.options.score_scale == (32 // 2) ** -0.5
    assert read_config(write_gguf(theirs, tmp_path / "u.gguf")).text.options.score_scale == 16**-0.5


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"attention.value_length": 8}, "value_length = 8, but 16, as of keys"),
        ({"rope.dimension_count": 8}, "dimension_count = 8, but 16"),
        ({"rope.scaling.type": "yarn"}, "rope.scaling.type = 'yarn', but none or linear"),
        ({"attention.head_count": [4, 4, 4, 4, 4, 4, 2]}, "one number for all layers"),
        ({"block_count": 2**32 - 1}, "no more than the"),
        ({"attention.head_count": 0}, "a number above 0"),
        ({"embedding_length": None}, "has no 'gemma3.embedding_length'"),
    ],
)
def test_metadata_that_can_not_be_meant(root: Path, changed: dict[str, Any], reason: str, tmp_path: Path) -> None:
    metadata = {f"gemma3.{key}": value for key, value in changed.items()}
    file = rewritten(root / "target.gguf", tmp_path / "t.gguf", metadata=metadata)
    with pytest.raises(ConfigError, match=reason):
        read_config(file)


def test_norms_in_blocks(root: Path, tmp_path: Path) -> None:
    """No tool writes them so; they are the package's values, without the 1. Of a type that is not read nothing is."""
    data = gguf.quantize(np.arange(1, 65, dtype=np.float32), gguf.GGMLQuantizationType.Q8_0)
    file = rewritten(root / "target.gguf", tmp_path / "t.gguf", {"output_norm.weight": (data, "Q8_0")})
    expected = gguf.dequantize(data, gguf.GGMLQuantizationType.Q8_0)
    loaded = load_target(file, torch.float32).norm.weight
    assert torch.allclose(loaded, torch.from_numpy(expected), rtol=0, atol=1e-5)
    file = rewritten(root / "target.gguf", tmp_path / "u.gguf", {"output_norm.weight": (np.ones(64, np.int8), "I8")})
    with pytest.raises(CheckpointError, match=r"norm\.weight as I8"):
        load_target(file, torch.float32)


# -- what else takes a target


def test_it_is_written_as_transformers_reads_it(root: Path, tmp_path: Path) -> None:
    target, config = load_target(root / "target", torch.float32), read_target_config(root / "target")
    save_target(target, config, tmp_path / "copy", torch.float32)
    first, second = (Gemma3ForCausalLM.from_pretrained(path) for path in (root / "target", tmp_path / "copy"))
    assert first.config.to_dict()["query_pre_attn_scalar"] == second.config.to_dict()["query_pre_attn_scalar"] == SCALAR
    for name, tensor in first.state_dict().items():
        assert torch.allclose(tensor, second.state_dict()[name], rtol=0, atol=2e-7), name
    assert close(second(IDS[None]).logits, first(IDS[None]).logits)
    assert parse_target_config(json.loads((tmp_path / "copy" / "config.json").read_text())).text == config.text


@pytest.mark.parametrize("source", [pytest.param("target", marks=pytest.mark.slow), "narrow", "target.gguf"])
def test_a_quantised_copy(root: Path, source: str, tmp_path: Path) -> None:
    types, dtype = parse_weight_types("int4"), torch.bfloat16 if source == "narrow" else torch.float32
    write_quantised_copy(root / source, tmp_path / "copy", types, strict=True)
    same_weights(
        load_target(tmp_path / "copy", dtype, strict=True).checkpoint_tensors(),
        load_target(root / source, dtype, types=types).checkpoint_tensors(),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_take_what_the_planner_says(root: Path, dtype: torch.dtype) -> None:
    for types in (WeightTypes(), parse_weight_types("int8")):
        target = load_target(root / "narrow", dtype, types=types)
        kept = sum(weight.nbytes for weight in target.checkpoint_tensors().values())
        assert kept == weight_bytes(read_target_config(root / "narrow"), types, dtype.itemsize)


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_a_gguf_file_is_the_packages(tmp_path: Path, kind: str) -> None:
    """The same tensors, byte for byte, and read as the same model; and of the file itself another one."""
    plain = build(query_pre_attn_scalar=16)
    plain.save_pretrained(tmp_path / "target")
    write_gguf(plain, tmp_path / "theirs.gguf", kind)
    assert not export_gguf(tmp_path / "target", tmp_path / "ours.gguf", "F32").losses
    export_gguf(tmp_path / "target", tmp_path / "ours.gguf", kind)
    ours, theirs = (gguf.GGUFReader(tmp_path / name) for name in ("ours.gguf", "theirs.gguf"))
    read = [{tensor.name: tensor.data.tobytes() for tensor in each.tensors} for each in (ours, theirs)]
    assert read[0] == read[1] and len(read[0]) > 6 * LAYERS
    assert read_config(tmp_path / "ours.gguf") == read_config(tmp_path / "theirs.gguf")
    again = export_gguf(tmp_path / "ours.gguf", tmp_path / "again.gguf", "F32")
    same = [load_target(tmp_path / f"{name}.gguf", torch.float32).checkpoint_tensors() for name in ("ours", "again")]
    assert all(torch.equal(weight.values(), same[1][name].values()) for name, weight in same[0].items())
    assert not again.losses


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "query_pre_attn_scalar: of this model it is 24, but 16 would be read"),
        ({"query_pre_attn_scalar": 16, "layer_types": [S, F, F, S, S, F, S]}, "can not say layer_types"),
        ({"query_pre_attn_scalar": 16, "rope_parameters": {
            S: {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
            F: {"rope_type": "default", "rope_theta": 1e6},
        }}, "can not say rope_parameters"),
    ],
)  # fmt: skip
def test_what_a_gguf_file_can_not_say(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    build(**changes).save_pretrained(tmp_path / "target")
    with pytest.raises(ConfigError, match=said):
        export_gguf(tmp_path / "target", tmp_path / "t.gguf", "F32")
    assert {path.name for path in tmp_path.iterdir()} == {"target"}


def test_a_gguf_file_says_which_layers_are_full(tmp_path: Path) -> None:
    layer_types = [S, F, S, F, S, F, S]
    build(query_pre_attn_scalar=16, layer_types=layer_types).save_pretrained(tmp_path / "target")
    export_gguf(tmp_path / "target", tmp_path / "t.gguf", "F32")
    assert read_config(tmp_path / "t.gguf").text.layer_types == tuple(layer_types)


def test_the_command_line(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A drafter is trained for it from scratch and drafts its tokens; inspect, plan and generate know it."""
    target = tmp_path / "target"
    target.mkdir()
    for file in (root / "target").iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    letters(target)
    random.seed(0)
    texts = ["".join(chr(ord("A") + random.randrange(58)) for _ in range(60)) for _ in range(12)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    out = tmp_path / "drafter"
    train = ["train", "--new", "--hidden", 16, "--heads", 4, "--steps", 3, "--lr", 0.02, "--target", target, "--data",
             tmp_path / "data.jsonl", "--out", out, "--length", 48, "--written-tokens", 200, "--gate-tokens", 8,
             "--dtype", "float32", "--draft-steps", 3, "--batch", 4, "--held-out-prompts", 4, "--cache",
             tmp_path / "cache", "--force"]  # fmt: skip
    assert main([str(word) for word in train]) == 0, capsys.readouterr().err
    config = read_config(out)
    check_pair(read_target_config(target), config)  # type: ignore[arg-type]
    assert config.text.full_rope.factor == LINEAR
    pair = load_pair(target, out, dtype="float32", device="cpu")
    assert tokens(pair, 4) == tokens(pair)
    assert main(["inspect", str(target), str(out), "--strict"]) == 0
    assert main(["plan", str(target), "--drafter", str(out)]) == 0
    both = ["--target", str(target), "--drafter", str(out), "--max-tokens", "8"]
    assert main(["generate", "ABCDEF", *both, "--compare"]) == 0
    assert "gemma3_text" in capsys.readouterr().out


@pytest.mark.slow
def test_acceptance_and_doctor(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both look at a Gemma 3 target with a drafter of Gemma 4's form; this one is random, which both say."""
    target, data = shutil.copytree(root / "target", tmp_path / "target"), tmp_path / "data.jsonl"
    letters(target)
    data.write_text(json.dumps({"text": string.ascii_uppercase * 3}) + "\n")
    both = ["--target", str(target), "--drafter", str(root / "drafter")]
    assert main(["acceptance", str(data), *both, "-n", "8", "-t", "0", "--prompt-tokens", "16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"][0]["mean_acceptance_length"] < 1.5
    assert main(["doctor", *both, "--data", str(data)]) == 1
    said = capsys.readouterr().out
    assert "fits the target" in said and "first drafts: cause" in said


def test_a_source_says_its_window(root: Path) -> None:
    config = open_source(root / "target.gguf").config()
    assert (config["sliding_window"], config["vocab_size"]) == (WINDOW, VOCAB)
