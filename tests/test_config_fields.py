"""Fields of a config.json: every one that transformers writes is known, what is applied is read, the rest is named."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import TINY, random_drafter, random_target, save_pair
from oracle import COMMON, FAMILIES, F, S, build_drafter, build_target, randomise
from transformers import (
    Gemma4Config,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    Gemma4UnifiedAudioConfig,
    Gemma4UnifiedConfig,
    Gemma4UnifiedVisionConfig,
    GenerationConfig,
)

from gemma_mtp.checkpoint import load_target
from gemma_mtp.cli import main
from gemma_mtp.config import PRESETS, TargetConfig, drafter_config_to_hf, parse_drafter_config, parse_target_config
from gemma_mtp.config import target_config_to_hf as to_hf
from gemma_mtp.config.fields import (
    APPLIED_OF_DRAFTERS,
    APPLIED_OF_TARGETS,
    APPLIED_OF_TEXT,
    IRRELEVANT,
    SAMPLING,
    config_notes,
)
from gemma_mtp.engine.pair import load_pair
from gemma_mtp.errors import CheckpointError, ConfigError

DEFAULT = {"rope_type": "default", "rope_theta": 1e4}
PROPORTIONAL = {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25}
IDS = torch.arange(40)[None] * 3 % 256
TEXT = to_hf(TargetConfig(TINY))
NESTED = to_hf(TargetConfig(TINY, "gemma4"))
DRAFTER = drafter_config_to_hf(random_drafter(centroids=True).config)


# -- known fields


def as_json(config: Any) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return content


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_writes_is_known(family: str) -> None:
    """With towers, with all fields, and with per_layer_config, as it is written since 5.20."""
    for model in (build_target(family), build_drafter(family, centroids=True)):
        for raw in (model.config.to_dict(), as_json(model.config)):
            assert "per_layer_config" in raw.get("text_config", raw)
            assert config_notes(raw) == []


def test_default_configurations_of_transformers_are_known() -> None:
    unified = Gemma4UnifiedConfig(vision_config=Gemma4UnifiedVisionConfig(), audio_config=Gemma4UnifiedAudioConfig())
    for config in (Gemma4Config(), Gemma4TextConfig(), unified):
        assert config_notes(as_json(config)) == []


@pytest.mark.parametrize("name", PRESETS)
def test_what_we_write_is_known(name: str) -> None:
    config = PRESETS[name]
    raw = to_hf(config) if isinstance(config, TargetConfig) else drafter_config_to_hf(config)
    assert config_notes(json.loads(json.dumps(raw))) == []


def test_sampling_fields_of_older_tools_are_those_that_transformers_drops() -> None:
    assert SAMPLING == set(GenerationConfig()._get_default_generation_params()) - IRRELEVANT


class Recorded(dict[str, Any]):
    """An object that remembers which fields were asked for."""

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__(content)
        self.asked: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        self.asked.add(name)
        return super().get(name, default)

    def __getitem__(self, name: str) -> Any:
        self.asked.add(name)
        return super().__getitem__(name)


#: what other modules read: weight_types.py, and `layers.py` where there is a per_layer_config
ELSEWHERE = {"quantization_config"}


def test_applied_fields_are_read_and_no_others() -> None:
    text, outer = Recorded(NESTED["text_config"]), Recorded(NESTED)
    outer["text_config"] = text
    parse_target_config(outer)
    assert outer.asked | ELSEWHERE == APPLIED_OF_TARGETS
    per_layer = Recorded({**NESTED["text_config"], "per_layer_config": {}, "global_head_dim": None})
    parse_target_config({**NESTED, "text_config": per_layer})
    k_eq_v = Recorded({**NESTED["text_config"], "attention_k_eq_v": True})
    parse_target_config({**NESTED, "text_config": k_eq_v})
    top_level = {"rope_theta", "partial_rotary_factor"}  # only to refuse them, where an entry has none
    assert text.asked | per_layer.asked | k_eq_v.asked <= APPLIED_OF_TEXT | top_level
    assert text.asked | per_layer.asked | k_eq_v.asked >= APPLIED_OF_TEXT
    drafter = Recorded(DRAFTER)
    parse_drafter_config(drafter)
    assert drafter.asked | ELSEWHERE == APPLIED_OF_DRAFTERS


# -- what is named


@given(st.text(min_size=1, max_size=12), st.sampled_from(["", "text_config."]))
def test_any_other_field_is_named(name: str, place: str) -> None:
    for raw in (NESTED, DRAFTER):
        known = (APPLIED_OF_TEXT if place else APPLIED_OF_DRAFTERS) | IRRELEVANT | SAMPLING
        changed = copy.deepcopy(raw)
        (changed["text_config"] if place else changed)[name] = 1
        if name not in known:
            assert [f"the field {place}{name}," in note for note in config_notes(changed)] == [True]
            (changed["text_config"] if place else changed)[name] = None
        assert config_notes(changed) == []


@pytest.mark.parametrize(("entry", "named"), [
    ({**DEFAULT, "factor": 4.0}, "factor"), ({**DEFAULT, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({**PROPORTIONAL, "beta_fast": 32}, "beta_fast"), ({**PROPORTIONAL, "attention_factor": 2.0}, "attention_factor"),
    ({**DEFAULT, "factor": 1.0}, None), ({**PROPORTIONAL, "factor": 4.0}, None),
    ({**DEFAULT, "rope_type": "linear", "factor": 4.0}, None), ({**DEFAULT, "beta_fast": None}, None),
])  # fmt: skip
def test_what_a_rotary_embedding_does_not_apply_is_named(entry: dict[str, Any], named: str | None) -> None:
    raw = {**TEXT, "rope_parameters": {S: entry, F: PROPORTIONAL}}
    parse_target_config(raw)
    path = f"rope_parameters.{S}.{named}"
    assert [path in note for note in config_notes(raw)] == [True] * (named is not None)


def test_a_field_that_is_not_known_is_a_warning_or_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    save_pair(tmp_path, random_target(), random_drafter())
    target, drafter = tmp_path / "target", tmp_path / "drafter"
    load_pair(target, drafter, device="cpu", strict=True)
    assert caplog.records == []
    for directory in (target, drafter):
        path = directory / "config.json"
        raw = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**raw, "attn_logit_softcapping": 50.0}), encoding="utf-8")
    load_pair(target, drafter, device="cpu")
    assert [(record.levelname, str(directory) in record.getMessage()) for record, directory in zip(
        caplog.records, (target, drafter), strict=True)] == [("WARNING", True)] * 2  # fmt: skip
    with pytest.raises(CheckpointError, match=r"attn_logit_softcapping.*not known.*\.$"):
        load_pair(target, device="cpu", strict=True)
    capsys.readouterr()
    commands = [
        ["generate", "--token-ids", "3", "--target", target], ["inspect", target], ["inspect", drafter],
        ["quantize", drafter, "--out", tmp_path / "copy"], ["serve", "--target", target, "--port", "0"],
        ["acceptance", path, "--target", target, "--drafter", drafter],
    ]  # fmt: skip
    for command in commands:
        assert main([str(word) for word in [*command, "--strict"]]) == 2, command
        assert "attn_logit_softcapping" in capsys.readouterr().err
    assert main(["inspect", str(target), "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)["checkpoints"]
    assert len(report["notes"]) == 1


# -- rotary embeddings


def text_model(**changes: Any) -> Gemma4ForCausalLM:
    settings = json.loads(json.dumps({**COMMON, **FAMILIES["text"], "num_hidden_layers": 2, "layer_types": [S, F]}))
    return randomise(Gemma4ForCausalLM(Gemma4TextConfig(**settings, **changes)), 0)


@pytest.mark.filterwarnings("ignore:.rope_scaling. is deprecated")
@pytest.mark.parametrize("changes", [
    {}, {"rope_parameters": {S: DEFAULT, F: {**PROPORTIONAL, "factor": 4.0}}},
    {"rope_parameters": {S: DEFAULT, F: {**PROPORTIONAL, "factor": 0.5}}},
    {"rope_parameters": {S: {**DEFAULT, "factor": 4.0}, F: PROPORTIONAL}},
    {"rope_parameters": {S: {**DEFAULT, "rope_type": "linear", "factor": 8.0}, F: PROPORTIONAL}},
    {"rope_parameters": {S: DEFAULT, F: {"rope_type": "linear", "rope_theta": 1e6, "factor": 8}}},
    {"rope_parameters": {S: {**DEFAULT, "partial_rotary_factor": 0.5}, F: PROPORTIONAL}},
    {"rope_parameters": {S: DEFAULT, F: {"rope_type": "proportional", "rope_theta": 1e6}}},
    {"rope_parameters": {S: {"rope_theta": 500.0}, F: {"rope_theta": 1e6, "partial_rotary_factor": 0.25}}},
    {"rope_parameters": {S: DEFAULT, F: {"type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25}}},
    {"rope_scaling": {S: DEFAULT, F: {**PROPORTIONAL, "factor": 4.0}}}, {"rope_theta": 500.0},
    {"rope_local_base_freq": 500.0}, {"partial_rotary_factor": 0.5},
])  # fmt: skip
def test_rotary_embeddings_are_transformers(changes: dict[str, Any], tmp_path: Path) -> None:
    """Whatever it applies or ignores: the logits are theirs, with the file as the user has it."""
    text_model().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    if "rope_scaling" in changes:
        del raw["rope_parameters"]
    path.write_text(json.dumps({**raw, **changes}), encoding="utf-8")
    with torch.inference_mode():
        theirs = text_model(**copy.deepcopy(changes))(IDS).logits
        ours = load_target(tmp_path, torch.float32)
        got = ours.logits(ours.forward_sequence(IDS).hidden_BTD)
    torch.testing.assert_close(got, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("changes", "named"), [
    ({"rope_parameters": PROPORTIONAL}, ["rope_parameters", S]),
    ({"rope_parameters": {}}, ["rope_parameters", S]),
    ({"rope_parameters": {S: DEFAULT}}, ["rope_parameters", F]),
    ({"rope_parameters": {S: DEFAULT, F: None}}, ["rope_parameters", F]),
    ({"rope_parameters": {S: {"rope_type": "default"}, F: PROPORTIONAL}}, ["rope_theta"]),
    ({"rope_parameters": {S: {"rope_type": "default"}, F: PROPORTIONAL}, "rope_theta": 5.0}, ["rope_theta = 5.0", S]),
    ({"rope_parameters": {S: DEFAULT, F: {"rope_type": "proportional", "rope_theta": 1.0}},
      "partial_rotary_factor": 0.5}, ["partial_rotary_factor = 0.5", F]),
    ({"rope_parameters": {S: {**DEFAULT, "rope_type": "linear"}, F: PROPORTIONAL}}, ["factor"]),
    ({"rope_parameters": {S: DEFAULT, F: {**PROPORTIONAL, "rope_type": "linear", "factor": 2.0}}},
     ["partial_rotary_factor = 0.25", "linear"]),
    ({"rope_parameters": {S: DEFAULT, F: {**PROPORTIONAL, "factor": 0}}}, ["factor = 0"]),
    ({"rope_parameters": {S: DEFAULT, F: {**PROPORTIONAL, "factor": "2"}}}, ["factor", "'2'"]),
    ({"rope_parameters": {S: DEFAULT, F: {**PROPORTIONAL, "type": "linear"}}}, ["'proportional'", "'linear'"]),
    *(({"rope_parameters": {S: DEFAULT, F: {"rope_type": kind, "rope_theta": 1e6, "factor": 4.0}}}, [f"'{kind}'", F])
      for kind in ("yarn", "llama3", "dynamic", "longrope")),
    ({"rope_scaling": {"rope_type": "linear", "factor": 8.0}}, ["rope_scaling", "rope_parameters", "differ"]),
    ({"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_parameters": None}, ["rope_scaling", S]),
    ({"layer_types": [S, S, F, S, F, S]}, ["layer_types", "'sliding_attention'", "'full_attention'"]),
    ({"per_layer_config": {"0": {"head_dim": 4}}}, ["per_layer_config", "'0'", "head_dim = 4", "head_dim = 8"]),
    ({"per_layer_config": {"2": {"intermediate_size": 4}}}, ["per_layer_config", "intermediate_size = 4"]),
    ({"per_layer_config": {"6": {}}}, ["per_layer_config", "'6'"]),
    ({"per_layer_config": {"2": {"head_dim": 32}, "5": {"head_dim": 32}}}, ["global_head_dim = 16", "head_dim = 32"]),
    ({"per_layer_config": {str(i): {"head_dim": 16, "num_key_value_heads": 1} for i in (2, 5)},
      "num_global_key_value_heads": 2, "attention_k_eq_v": True}, ["num_global_key_value_heads = 2", "= 1"]),
])  # fmt: skip
def test_fields_that_contradict_are_refused(changes: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_target_config({**TEXT, **changes})
    message = str(caught.value)
    assert [part for part in named if part not in message] == []
    assert "\n" not in message
    assert message.endswith(".")


@pytest.mark.parametrize(
    "field", ["hidden_size_per_layer_input", "max_position_embeddings", "eos_token_id", "rms_norm_eps"]
)
@pytest.mark.parametrize("model_type", ["gemma4", "gemma4_unified"])
def test_what_is_left_out_is_as_in_transformers(field: str, model_type: str) -> None:
    config = {"gemma4": Gemma4Config, "gemma4_unified": Gemma4UnifiedConfig}[model_type]
    raw = json.loads(json.dumps(to_hf(TargetConfig(TINY, model_type))))
    raw["text_config"]["model_type"] = f"{model_type}_text"
    del raw["text_config"][field]
    theirs = getattr(config.from_dict(copy.deepcopy(raw)).text_config, field, 0)
    ours = parse_target_config(raw).text
    assert (ours.eos_token_ids if field == "eos_token_id" else getattr(ours, field)) == (
        (theirs,) if field == "eos_token_id" else theirs
    )
