"""LoRA adapters merged while loading: PEFT is the oracle, and what it can not merge exactly is refused."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import random_drafter, random_target, save_pair
from oracle import VOCAB, build_target
from safetensors.torch import load_file, save_file
from torch import Tensor

from gemma_mtp import load_pair
from gemma_mtp.checkpoint import load_target, open_source, stored_tensors
from gemma_mtp.checkpoint.adapter import Adapter
from gemma_mtp.checkpoint.adapter_config import parse_adapter_config
from gemma_mtp.checkpoint.quantised_copy import write_quantised_copy
from gemma_mtp.cli import main
from gemma_mtp.decoding.params import SamplingParams
from gemma_mtp.errors import CheckpointError, GemmaMtpError
from gemma_mtp.measure.memory import inspect_checkpoint
from gemma_mtp.training.written import fingerprint
from gemma_mtp.weight_types import parse_weight_types

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

pytestmark = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="PEFT is not installed")
IDS = torch.arange(24)[None] * 7 % VOCAB
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TEXT = r".*(?<!tower)\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"

#: adapters that can be merged, by what is special about them: the family and PEFT's settings
MERGED: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("text", {"target_modules": ["q_proj", "down_proj"]}),
    "all linear": ("text", {"target_modules": "all-linear"}),
    "multimodal": ("e2b", {
        "target_modules": r".*language_model.*\.(q_proj|per_layer_(input_gate|projection|model_projection)|up_proj)",
    }),
    "rslora": ("text", {"target_modules": ["v_proj"], "use_rslora": True}),
    "dora": ("e4b", {"target_modules": r".*language_model.*(q_proj|gate_proj)", "use_dora": True}),
    "patterns": ("text", {
        "target_modules": ["q_proj", "k_proj", "up_proj"], "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 7},
        "alpha_pattern": {"k_proj": 3, r"layers\.[24]\.self_attn\.q_proj": 11},
    }),
    "saved": ("text", {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm", "o_proj"]}),
    "untied head": ("31b", {"target_modules": r".*language_model.*v_proj", "modules_to_save": ["lm_head"]}),
    "head": ("text", {"target_modules": ["q_proj", "lm_head"]}),
    "table": ("text", {"target_modules": ["q_proj", "embed_tokens"]}),
    "saved table": ("text", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "experts' neighbours": ("26b", {"target_modules": r".*language_model.*(q_proj|up_proj|router\.proj)"}),
    "fan_in_fan_out": ("text", {"target_modules": ["q_proj"], "fan_in_fan_out": True}),
}  # fmt: skip


def lora(**settings: Any) -> LoraConfig:
    """PEFT is imported where it is run: it takes seconds, in every process that only looks for its tests, too."""
    from peft import LoraConfig

    return LoraConfig(**{"r": 4, **settings})


def adapted(family: str, directory: Path, **settings: Any) -> PeftModel:
    """A target with a random adapter, both saved."""
    from peft import get_peft_model

    base = build_target(family)
    base.save_pretrained(directory / "base")
    model = get_peft_model(base, lora(**{"lora_alpha": 6, **settings}))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                noise = 0.3 * torch.randn(parameter.shape, generator=generator)
                parameter.copy_(parameter + noise if "magnitude" in name or "save" in name else noise)
    model.eval().save_pretrained(str(directory / "adapter"))
    return model


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("plain")
    adapted("text", root, target_modules=["q_proj", "down_proj"])
    return root


@pytest.fixture
def damaged(plain: Path, tmp_path: Path) -> Path:
    """A copy of the adapter, to be damaged."""
    return shutil.copytree(plain / "adapter", tmp_path / "adapter")


def edit_config(directory: Path, **changes: Any) -> None:
    raw = {**json.loads((directory / CONFIG).read_text()), **changes}
    (directory / CONFIG).write_text(json.dumps(raw))


def edit_weights(directory: Path, edit: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(edit(load_file(directory / WEIGHTS)), directory / WEIGHTS)


def logits(base: Path, adapter: Path, **options: Any) -> Tensor:
    with torch.inference_mode():
        target = load_target(open_source(base, adapter=adapter), torch.float32, **options)
        return target.logits(target.forward_sequence(IDS).hidden_BTD)


@pytest.mark.parametrize("name", MERGED)
def test_logits_are_pefts(name: str, tmp_path: Path) -> None:
    """Of the model as it was trained: with a tied head, PEFT's own merging would change the head with the table."""
    family, settings = MERGED[name]
    model = adapted(family, tmp_path, **settings)
    with torch.inference_mode():
        theirs = model(input_ids=IDS).logits
        without = build_target(family)(input_ids=IDS).logits
    assert (theirs - without).abs().max() > 0.05
    torch.testing.assert_close(logits(tmp_path / "base", tmp_path / "adapter"), theirs, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("name", ["plain", "dora", "patterns", "rslora"])
def test_weights_are_those_that_peft_merges(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is read at once."""
    family, settings = MERGED[name]
    theirs = adapted(family, tmp_path, **settings).merge_and_unload().state_dict()
    for nbytes in (1 << 20, 1500):
        monkeypatch.setattr("gemma_mtp.checkpoint.tensors.PIECE_BYTES", nbytes)
        ours = load_target(
            open_source(tmp_path / "base", adapter=tmp_path / "adapter"), torch.float32
        ).checkpoint_tensors()
        for official, tensor in stored_tensors(ours).items():
            stored = official.replace("model.", "model.language_model.", 1) if family != "text" else official
            torch.testing.assert_close(tensor, theirs[stored], atol=1e-6, rtol=1e-6, msg=official)


def test_quantised_while_loading_and_as_a_copy(plain: Path, tmp_path: Path) -> None:
    """What is quantised is the merged matrix, rounded once."""
    source = open_source(plain / "base", adapter=plain / "adapter")
    types = parse_weight_types("int8")
    write_quantised_copy(source, tmp_path / "copy", types)
    with torch.inference_mode():
        copied = load_target(tmp_path / "copy", torch.float32)
        assert torch.equal(
            copied.logits(copied.forward_sequence(IDS).hidden_BTD),
            logits(plain / "base", plain / "adapter", types=types),
        )
    with pytest.raises(CheckpointError, match=r"stores .*q_proj.weight as I8, into which an adapter can not be merged"):
        load_target(open_source(tmp_path / "copy", adapter=plain / "adapter"), torch.float32)


def test_every_command_takes_an_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = adapted("text", tmp_path, target_modules=["q_proj"])
    base, adapter = str(tmp_path / "base"), str(tmp_path / "adapter")
    with torch.inference_mode():
        generate: Any = model.generate
        theirs = generate(input_ids=IDS, max_new_tokens=12, do_sample=False, eos_token_id=None)[0, 24:].tolist()
    pair = load_pair(base, adapter=adapter, device="cpu")
    ours = pair.generate(IDS[0].tolist(), SamplingParams(max_tokens=12, ignore_eos=True))
    assert ours.token_ids == theirs
    assert main(["inspect", base, "--adapter", adapter, "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)["checkpoints"]
    assert report["read_as"] == ["LoRA adapter adapter: 6 matrices merged"]
    assert main(["quantize", base, "--adapter", adapter, "--out", str(tmp_path / "int8")]) == 0
    ids = " ".join(map(str, IDS[0].tolist()))
    given = ["--target", base, "--adapter", adapter, "-n", "12", "-q", "--ignore-eos"]
    capsys.readouterr()
    assert main(["generate", *given, "--token-ids", ids, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["token_ids"] == theirs


def test_texts_of_another_adapter_are_never_taken_for_this_ones(plain: Path, damaged: Path) -> None:
    """The cache of texts that a target wrote is named by its weights, the adapter's and their scale."""
    names = {fingerprint(plain / "base"), fingerprint(plain / "base", plain / "adapter")}
    edit_config(damaged, lora_alpha=7)
    names.add(fingerprint(plain / "base", damaged))
    edit_weights(damaged, lambda tensors: {name: tensor + 1 for name, tensor in tensors.items()})
    names.add(fingerprint(plain / "base", damaged))
    assert len(names) == 4


def test_an_adapter_of_a_tower_is_noted(plain: Path, damaged: Path) -> None:
    name = "base_model.model.model.vision_tower.encoder.layers.0.self_attn.q_proj.lora_A.weight"
    edit_weights(damaged, lambda tensors: {**tensors, name: torch.ones(2, 2)})
    (note,) = inspect_checkpoint(open_source(plain / "base", adapter=damaged)).notes
    assert name in note
    with pytest.raises(CheckpointError, match="vision or audio towers"):
        load_target(open_source(plain / "base", adapter=damaged), torch.float32, strict=True)


# -- what is refused


@pytest.mark.parametrize(("changes", "named"), [
    ({"peft_type": "LOHA"}, "LOHA"), ({"r": 0}, "r 0"), ({"r": 5}, "shape"), ({"lora_alpha": "x"}, "lora_alpha"),
    ({"use_dora": True}, "lengths"), ({"init_lora_weights": "pissa"}, "pissa"), ({"lora_bias": True}, "lora_bias"),
    ({"init_lora_weights": 1}, "init_lora_weights"),
    ({"target_parameters": ["experts.down_proj"]}, "target_parameters"), ({"layer_replication": [[0, 2]]}, "layer_rep"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices"), ({"of the future": 3}, "of the future"),
    ({"rank_pattern": {"(": 3}}, "no regular expression"), ({"alpha_pattern": [1]}, "alpha_pattern"),
    ({"alora_invocation_tokens": [1]}, "alora"), ({"bias": "some"}, "bias"), ({"use_rslora": "yes"}, "use_rslora"),
])  # fmt: skip
def test_settings_that_can_not_be_merged(changes: dict[str, Any], named: str, plain: Path, damaged: Path) -> None:
    edit_config(damaged, **changes)
    refused(plain, damaged, named)


Edit = Callable[[dict[str, Tensor]], dict[str, Tensor]]
A0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
EDITS: dict[str, tuple[Edit, str]] = {
    "half of a module": (lambda t: {n: x for n, x in t.items() if n != A0}, "two matrices"),
    "another width": (lambda t: {**t, A0: t[A0][:, :-1].contiguous()}, "shape"),
    "another layer": (lambda t: {n.replace("layers.0", "layers.77"): x for n, x in t.items()}, "layers.77"),
    "whole numbers": (lambda t: {**t, A0: t[A0].to(torch.int8)}, "as I8"),
    "a bias": (lambda t: {**t, A0.replace("lora_A.weight", "bias"): torch.ones(2)}, "q_proj.bias"),
    "experts": (lambda t: {**t, A0.replace("lora_A", "base_layer.lora_A"): t[A0].clone()}, "base_layer"),
    "twice": (lambda t: {**t, A0.removeprefix("base_model.model."): t[A0].clone()}, "two tensors"),
    "nothing": (lambda t: {}, "adapts nothing"),
    "tokens": (lambda t: {**t, "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": t[A0] + 1},
               "trainable_tokens_delta"),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_weights_that_can_not_be_merged(name: str, plain: Path, damaged: Path) -> None:
    edit, named = EDITS[name]
    edit_weights(damaged, edit)
    refused(plain, damaged, named)


def test_directories_that_are_no_adapters(plain: Path, damaged: Path, tmp_path: Path) -> None:
    refused(plain, plain / "base", "adapter_config.json")
    refused(plain, tmp_path / "absent", "does not exist")
    (damaged / WEIGHTS).rename(damaged / "adapter_model.bin")
    refused(plain, damaged, "pickled")
    (damaged / CONFIG).write_text("[")
    refused(plain, damaged, "not valid JSON")


def refused(plain: Path, adapter: Path, named: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_target(open_source(plain / "base", adapter=adapter), torch.float32)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
    assert main(["generate", "x", "--target", str(plain / "base"), "--adapter", str(adapter)]) == 2


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6,
)  # fmt: skip
FIELDS = st.deferred(lambda: st.sampled_from(sorted(vars(lora()))))


@given(st.dictionaries(FIELDS, JSON, max_size=4) | JSON)
def test_any_configuration_is_read_or_refused(changes: Any) -> None:
    raw = {**vars(lora()), "peft_type": "LORA", **changes} if isinstance(changes, dict) else changes
    try:
        config = parse_adapter_config(raw)
    except GemmaMtpError:
        return
    try:
        scales = config.of_modules(["model.layers.0.self_attn.q_proj"]).scales
    except CheckpointError:
        return
    assert abs(scales["model.layers.0.self_attn.q_proj"]) < 1e30


def test_an_adapter_is_for_a_target_alone(plain: Path, tmp_path: Path) -> None:
    """A drafter has none of its names."""
    save_pair(tmp_path, random_target(), random_drafter())
    with pytest.raises(CheckpointError, match="shape"):
        load_target(open_source(tmp_path / "target", adapter=plain / "adapter"), torch.float32)
    assert Adapter(plain / "adapter").config.of_modules(["anything"]).scales == {"anything": 1.5}


#: a name of a module as it stands in an adapter, and one that lets patterns go astray
NAMES = ["model.layers.11.self_attn.q_proj", "model.layers.1.mlp." + "a" * 60]
EXPLODING = (
    "(a+)+b", "(a|a)*b", "(.*a){25}b", "((a*)*)*b", "(a?){60}a{60}b", "(a|aa)+$b", "(?:(?:a+)?)+b",
    "(.*.*.*.*.*.*.*)*b",
)  # fmt: skip


@pytest.mark.parametrize("pattern", EXPLODING)
def test_patterns_that_explode_are_refused_soon(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name, within a second of processor time, here a twentieth; PEFT would match for years."""
    monkeypatch.setattr("gemma_mtp.checkpoint.module_patterns.LIMIT_SECONDS", 0.05)
    raw = {**vars(lora()), "peft_type": "LORA", "rank_pattern": {"q_proj": 2, pattern: 3}}
    with pytest.raises(CheckpointError, match="takes more than"):
        parse_adapter_config(raw).of_modules(NAMES)


@pytest.mark.parametrize(
    "pattern",
    ["q_proj", r"layers\.11\..*", r"layers\.(1|2)\.mlp.*", r"self_attn\.(q|k)_proj", "roj", "(?:model.)?layers.+", "",
     "mlp.a*", r"layers\.1\.mlp\..*"],
)  # fmt: skip
def test_patterns_match_as_pefts_do(pattern: str) -> None:
    from peft.utils.other import get_pattern_key

    config = parse_adapter_config({**vars(lora()), "peft_type": "LORA", "rank_pattern": {pattern: 3}})
    expected = {name: 3 if get_pattern_key([pattern], name) == pattern else 4 for name in NAMES}
    assert config.of_modules(NAMES).ranks == expected


def test_patterns_that_are_malformed_are_refused() -> None:
    raw = {**vars(lora()), "peft_type": "LORA"}
    for pattern, reason in (("a" * 3000, "3000 characters"), ("(", "no regular"), ("(?i)a", "no regular")):
        with pytest.raises(CheckpointError, match=reason):
            parse_adapter_config({**raw, "alpha_pattern": {pattern: 3}})
