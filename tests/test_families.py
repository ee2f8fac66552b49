"""A family is a table: Gemma 3 loads, decodes and is written by its own, as transformers has it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import TINY, random_target, same_weights
from oracle import F, S, randomise
from safetensors.torch import load_file, save_file
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from gemma_mtp import SamplingParams, load_pair
from gemma_mtp.checkpoint import load_target, read_target_config, save_target
from gemma_mtp.config import TargetConfig, TextConfig, parse_target_config
from gemma_mtp.config.fields import config_notes
from gemma_mtp.errors import ConfigError
from gemma_mtp.families import known
from gemma_mtp.families.base import Family
from gemma_mtp.families.gemma3 import GEMMA3
from gemma_mtp.families.gemma4 import GEMMA4
from gemma_mtp.measure.memory import inspect_checkpoint

VOCAB, LAYERS = 61, 7
#: as the hub's files of 2025 say it
OLDER = {
    "rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "sliding_window_pattern": 6, "rope_parameters": None, "layer_types": None,
}  # fmt: skip
IDS = torch.randint(3, VOCAB, (40,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def theirs() -> Gemma3ForCausalLM:
    """Seven layers, of which the last is a sliding one, as in Gemma 3 1B and in no Gemma 4."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=8, max_position_embeddings=512, query_pre_attn_scalar=24,
        rope_parameters={S: {"rope_type": "default", "rope_theta": 1e4},
                         F: {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}},
    )  # fmt: skip
    return randomise(Gemma3ForCausalLM(config), 0)


def known_with(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known, "FAMILIES", (GEMMA4, family))


def saved(theirs: Gemma3ForCausalLM, directory: Path, **changes: Any) -> Path:
    theirs.save_pretrained(directory)
    config = directory / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    return directory


@pytest.mark.parametrize("changes", [{}, OLDER], ids=["new", "older"])
@torch.inference_mode()
def test_a_checkpoint_loads_by_its_table(theirs: Gemma3ForCausalLM, changes: dict[str, Any], tmp_path: Path) -> None:
    """Whatever form its configuration has: nothing is left over, and the logits are theirs, beyond the window."""
    directory = saved(theirs, tmp_path / "gemma3", **changes)
    target = load_target(directory, torch.float32, strict=True)
    expected, logits = theirs(IDS[None]).logits[0], target.logits(target.forward_sequence(IDS[None]).hidden_BTD[0])
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert target.config.layer_types[-1] == S
    assert inspect_checkpoint(directory).parameters == sum(p.numel() for p in theirs.parameters())


def test_its_engine_decodes_what_transformers_does(theirs: Gemma3ForCausalLM, tmp_path: Path) -> None:
    pair = load_pair(saved(theirs, tmp_path / "gemma3"), dtype="float32", device="cpu", strict=True)
    ours = pair.generate(IDS.tolist(), SamplingParams(max_tokens=12, ignore_eos=True))
    expected = theirs.generate(IDS[None], max_new_tokens=12, min_new_tokens=12, do_sample=False)[0, len(IDS) :]
    assert ours.token_ids == expected.tolist()


def test_norms_without_their_offset_are_others(
    theirs: Gemma3ForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = saved(theirs, tmp_path / "gemma3")
    known_with(dataclasses.replace(GEMMA3, norm_offset=0.0), monkeypatch)
    plain = load_target(directory, torch.float32).state_dict()
    known_with(GEMMA3, monkeypatch)
    for name, tensor in load_target(directory, torch.float32).state_dict().items():
        assert torch.equal(tensor, plain[name] + 1 if "norm" in name else plain[name])


def test_what_a_table_can_not_translate_is_refused_or_named(theirs: Gemma3ForCausalLM, tmp_path: Path) -> None:
    raw = json.loads((saved(theirs, tmp_path / "gemma3") / "config.json").read_text())
    assert config_notes(raw) == []
    assert ["unheard_of" in note for note in config_notes({**raw, "unheard_of": 1})] == [True]
    with pytest.raises(ConfigError, match="attn_logit_softcapping"):
        parse_target_config({**raw, "attn_logit_softcapping": 50.0})
    nested = parse_target_config({"model_type": "gemma3", "text_config": raw})
    assert nested.text == parse_target_config(raw).text


def test_a_family_that_nobody_has_a_table_of_is_refused(theirs: Gemma3ForCausalLM, tmp_path: Path) -> None:
    directory = saved(theirs, tmp_path / "gemma2", model_type="gemma2")
    with pytest.raises(ConfigError, match="'gemma2', which is not a Gemma 4 or Gemma 3 target"):
        load_target(directory, torch.float32)


def test_a_table_without_architectures_is_read_only(
    theirs: Gemma3ForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known_with(dataclasses.replace(GEMMA3, architectures={}), monkeypatch)
    directory = saved(theirs, tmp_path / "gemma3")
    target = load_target(directory, torch.float32)
    with pytest.raises(ConfigError, match="'gemma3_text' can not be written"):
        save_target(target, read_target_config(directory), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_table_renames_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another spelling of tensors loads as the official one."""
    renames = {"mlp": "ffn", "o_proj": "out"}
    known_with(dataclasses.replace(GEMMA4, targets={"other": None}, drafters=(), renames=renames), monkeypatch)
    target = random_target()
    save_target(target, TargetConfig(TINY), tmp_path, torch.float32)
    file, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    tensors = {name.replace(".mlp.", ".ffn.").replace(".o_proj.", ".out."): x for name, x in load_file(file).items()}
    assert "model.layers.0.ffn.up_proj.weight" in tensors
    save_file(tensors, file)
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "other"}))
    loaded = load_target(tmp_path, torch.float32, strict=True)
    assert isinstance(loaded.config, TextConfig)
    same_weights(loaded.checkpoint_tensors(), target.checkpoint_tensors())
