"""config.json read and written: the official geometries, transformers' own dictionaries, and what is refused."""

import copy
import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import TINY, random_drafter
from oracle import COMMON, FAMILIES, NO_PLE, F, S, build_drafter, build_target
from transformers import (
    Gemma4AssistantConfig,
    Gemma4Config,
    Gemma4TextConfig,
    Gemma4UnifiedAssistantConfig,
    Gemma4UnifiedConfig,
    PreTrainedConfig,
)

from gemma_mtp.config import (
    PRESETS,
    DrafterConfig,
    LayerType,
    TargetConfig,
    TextConfig,
    drafter_config_to_hf,
    parse_drafter_config,
    parse_target_config,
    target_config_to_hf,
)
from gemma_mtp.config.rope import RopeConfig
from gemma_mtp.errors import ConfigError

THEIRS: dict[str, type[PreTrainedConfig]] = {
    "gemma4": Gemma4Config,
    "gemma4_unified": Gemma4UnifiedConfig,
    "gemma4_assistant": Gemma4AssistantConfig,
    "gemma4_unified_assistant": Gemma4UnifiedAssistantConfig,
}

#: FACTS.md, "Targets": hidden, intermediate, pattern (S, repeats), query heads, KV heads (S, F), window, donors (S, F),
#: shared layers, double-wide, k = v, per-layer embeddings, context, model_type
TARGETS = {
    "E2B": (1536, 6144, (4, 7), 8, (1, 1), 512, (13, 14), 20, True, False, 256, 131072, "gemma4"),
    "E4B": (2560, 10240, (5, 7), 8, (2, 2), 512, (22, 23), 18, False, False, 256, 131072, "gemma4"),
    "12B": (3840, 15360, (5, 8), 16, (8, 1), 1024, (46, 47), 0, False, True, 0, 262144, "gemma4_unified"),
    "26B-A4B": (2816, 2112, (5, 5), 16, (8, 2), 1024, (28, 29), 0, False, True, 0, 262144, "gemma4"),
    "31B": (5376, 21504, (5, 10), 32, (16, 4), 1024, (58, 59), 0, False, True, 0, 262144, "gemma4"),
}
#: FACTS.md, "Drafters": hidden, intermediate, query heads, centroid head, model_type
DRAFTERS = {
    "E2B": (256, 2048, 4, True, "gemma4_assistant"),
    "E4B": (256, 2048, 4, True, "gemma4_assistant"),
    "12B": (1024, 8192, 16, False, "gemma4_unified_assistant"),
    "26B-A4B": (1024, 8192, 16, False, "gemma4_assistant"),
    "31B": (1024, 8192, 32, False, "gemma4_assistant"),
}


def preset_target(size: str) -> TargetConfig:
    config = PRESETS[f"gemma-4-{size}-it"]
    assert isinstance(config, TargetConfig)
    return config


def preset_drafter(size: str) -> DrafterConfig:
    config = PRESETS[f"gemma-4-{size}-it-assistant"]
    assert isinstance(config, DrafterConfig)
    return config


def written(config: TargetConfig | DrafterConfig) -> dict[str, Any]:
    raw = target_config_to_hf(config) if isinstance(config, TargetConfig) else drafter_config_to_hf(config)
    content: dict[str, Any] = json.loads(json.dumps(raw))
    return content


def parsed(raw: dict[str, Any]) -> TargetConfig | DrafterConfig:
    return parse_drafter_config(raw) if "assistant" in raw["model_type"] else parse_target_config(raw)


def read_by_transformers(config: TargetConfig | DrafterConfig) -> dict[str, Any]:
    """What transformers writes of a config.json of ours."""
    content: dict[str, Any] = json.loads(json.dumps(THEIRS[config.model_type].from_dict(written(config)).to_dict()))
    return content


# -- the official geometries


def test_the_presets_are_the_ten_official_checkpoints() -> None:
    assert set(PRESETS) == {f"gemma-4-{s}-it" for s in TARGETS} | {f"gemma-4-{s}-it-assistant" for s in DRAFTERS}


@pytest.mark.parametrize("size", TARGETS)
def test_target_presets_are_those_of_the_facts(size: str) -> None:
    config, c = preset_target(size), preset_target(size).text
    (sliding, repeats), donors = TARGETS[size][2], TARGETS[size][6]
    assert (
        c.hidden_size, c.intermediate_size, (sliding, repeats), c.num_attention_heads,
        (c.num_key_value_heads, c.num_global_key_value_heads), c.sliding_window, (c.donor_layers[S], c.donor_layers[F]),
        c.num_kv_shared_layers, c.use_double_wide_mlp, c.attention_k_eq_v, c.hidden_size_per_layer_input,
        c.max_position_embeddings, config.model_type,
    ) == TARGETS[size]  # fmt: skip
    assert c.layer_types == ((S,) * sliding + (F,)) * repeats
    assert c.num_hidden_layers == len(c.layer_types)
    assert (c.vocab_size, c.head_dim, c.global_head_dim, c.final_logit_softcapping) == (262144, 256, 512, 30.0)
    assert (c.tie_word_embeddings, c.rms_norm_eps, c.eos_token_ids) == (True, 1e-6, (1, 106, 50))
    assert (c.pad_token_id, c.bos_token_id) == (0, 2)
    assert (c.sliding_rope, c.full_rope) == (RopeConfig(1e4, "default"), RopeConfig(1e6, "proportional", 0.25))
    assert c.vocab_size_per_layer_input == (262144 if c.hidden_size_per_layer_input else 0)
    moe = (c.enable_moe_block, c.num_experts, c.top_k_experts, c.moe_intermediate_size)
    assert moe == ((True, 128, 8, 704) if size == "26B-A4B" else (False, 0, 0, 0))
    # the layers that share KV read the donors' of their own type
    shared = range(c.num_hidden_layers - c.num_kv_shared_layers, c.num_hidden_layers)
    assert [c.kv_layer(i) for i in shared] == [donors[c.layer_types[i] == F] for i in shared]
    assert [i for i in range(c.num_hidden_layers) if c.layer_intermediate_size(i) != c.intermediate_size] == (
        list(range(15, 35)) if size == "E2B" else []
    )
    assert c.layer_intermediate_size(34 if size == "E2B" else 0) == (12288 if size == "E2B" else c.intermediate_size)


@pytest.mark.parametrize("size", DRAFTERS)
def test_drafter_presets_are_those_of_the_facts(size: str) -> None:
    config, target = preset_drafter(size), preset_target(size).text
    c = config.text
    got = c.hidden_size, c.intermediate_size, c.num_attention_heads, config.use_ordered_embeddings, config.model_type
    assert got == DRAFTERS[size]
    assert (config.backbone_hidden_size, c.sliding_window) == (TARGETS[size][0], TARGETS[size][5])
    assert (c.num_key_value_heads, c.num_global_key_value_heads) == TARGETS[size][4]
    assert (c.layer_types, c.num_hidden_layers, c.num_kv_shared_layers) == ((S, S, S, F), 4, 4)
    assert (config.num_centroids, config.centroid_intermediate_top_k) == (2048, 32)
    assert (c.vocab_size, c.head_dim, c.global_head_dim, c.final_logit_softcapping) == (262144, 256, 512, None)
    assert (c.sliding_rope, c.full_rope) == (target.sliding_rope, target.full_rope)
    assert (c.tie_word_embeddings, c.hidden_size_per_layer_input, c.enable_moe_block) == (True, 0, False)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_a_config_json(name: str) -> None:
    assert parsed(written(PRESETS[name])) == PRESETS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_transformers_reads_our_config_json_and_we_read_its_own(name: str) -> None:
    assert parsed(read_by_transformers(PRESETS[name])) == PRESETS[name]


# -- transformers' dictionaries


def check_values(text: TextConfig, settings: dict[str, Any]) -> None:
    """Every setting the configuration was built with is in `text`; what was left out has transformers' default."""
    settings = {**settings, "layer_types": tuple(settings["layer_types"])}
    settings.setdefault("num_key_value_heads", 4)
    settings.setdefault("num_global_key_value_heads", settings["num_key_value_heads"])
    settings.setdefault("num_kv_shared_layers", 0)
    if not settings.get("hidden_size_per_layer_input"):  # Gemma4Unified's text model has no such fields
        settings["hidden_size_per_layer_input"] = 0
        settings.pop("vocab_size_per_layer_input", None)
    assert {name: getattr(text, name) for name in settings} == settings
    assert (text.eos_token_ids, text.pad_token_id, text.bos_token_id) == ((1,), 0, 2)
    assert (text.sliding_rope, text.full_rope) == (RopeConfig(1e4, "default"), RopeConfig(1e6, "proportional", 0.25))


def hub_form(raw: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The same dictionary as files on the hub have it: full layers' sizes as fields, none by layer."""
    raw = copy.deepcopy(raw)
    text = raw.get("text_config", raw)
    assert set(text.pop("per_layer_config")) == {str(i) for i, kind in enumerate(settings["layer_types"]) if kind == F}
    text["global_head_dim"] = settings["global_head_dim"]
    text["num_global_key_value_heads"] = settings.get("num_global_key_value_heads")
    return raw


@pytest.mark.parametrize("family", FAMILIES)
def test_targets_of_transformers(family: str) -> None:
    settings = {**COMMON, **FAMILIES[family]}
    raw = build_target(family).config.to_dict()
    config = parse_target_config(raw)
    check_values(config.text, settings)
    assert config.model_type == {"text": "gemma4_text", "12b": "gemma4_unified"}.get(family, "gemma4")
    assert parse_target_config(hub_form(raw, settings)) == config


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("centroids", [False, True])
def test_drafters_of_transformers(family: str, centroids: bool) -> None:
    settings = {
        **COMMON, **FAMILIES[family], **NO_PLE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
        "num_kv_shared_layers": 4, "layer_types": [S, S, S, F], "final_logit_softcapping": None,
        "use_double_wide_mlp": False, "enable_moe_block": False,
    }  # fmt: skip
    raw = build_drafter(family, centroids).config.to_dict()
    config = parse_drafter_config(raw)
    check_values(config.text, settings)
    assert (config.backbone_hidden_size, config.use_ordered_embeddings) == (64, centroids)
    assert (config.num_centroids, config.centroid_intermediate_top_k) == (16, 4)
    assert parse_drafter_config(hub_form(raw, settings)) == config
    raw["text_config"]["num_kv_shared_layers"] = 0  # as transformers writes it where it was left to the default
    assert parse_drafter_config(raw) == config


TWO_LAYERS: dict[str, Any] = {**COMMON, "num_hidden_layers": 2, "layer_types": [S, F], "num_key_value_heads": 2}


def test_transformers_writes_no_entry_where_full_layers_are_as_the_others() -> None:
    raw = Gemma4TextConfig(**{**TWO_LAYERS, "head_dim": 32, "global_head_dim": 32}).to_dict()
    assert raw["per_layer_config"] == {}
    assert parse_target_config(raw).text.global_head_dim == 32


@pytest.mark.parametrize(("k_eq_v", "kv_heads"), [(True, 1), (False, 2)])
def test_kv_heads_of_full_layers_need_keys_that_are_values(k_eq_v: bool, kv_heads: int) -> None:
    """As in transformers, the field num_global_key_value_heads says nothing where attention_k_eq_v is false."""
    settings = {**TWO_LAYERS, "attention_k_eq_v": k_eq_v, "num_global_key_value_heads": 1}
    assert Gemma4TextConfig(**settings).per_layer_config[1].num_key_value_heads == kv_heads
    assert parse_target_config({**settings, "model_type": "gemma4_text"}).text.num_global_key_value_heads == kv_heads


@pytest.mark.parametrize("layers", [1, 5, 6, 7, 12, 13, 35])
def test_layer_types_left_out_are_those_of_transformers(layers: int) -> None:
    settings = {name: value for name, value in TWO_LAYERS.items() if name != "layer_types"}
    theirs = Gemma4TextConfig(**{**settings, "num_hidden_layers": layers})
    raw = {**settings, "num_hidden_layers": layers, "model_type": "gemma4_text"}
    assert list(parse_target_config(raw).text.layer_types) == theirs.layer_types


# -- any configuration


@st.composite
def text_configs(draw: st.DrawFn) -> TextConfig:
    size, heads = st.integers(1, 300), draw(st.sampled_from([1, 2, 6, 8]))
    divisors = st.sampled_from([d for d in range(1, heads + 1) if heads % d == 0])
    kinds: list[LayerType] = [S, F]
    owned = [*draw(st.lists(st.sampled_from(kinds), max_size=8)), F]
    shared = draw(st.just([]) | st.lists(st.sampled_from(owned), max_size=4).map(lambda kinds: [*kinds, F]))
    kv_heads, k_eq_v, experts = draw(divisors), draw(st.booleans()), draw(st.integers(1, 9))
    theta, factor = st.floats(1, 1e7), st.floats(0.1, 100)
    ropes = (
        st.builds(RopeConfig, theta)
        | st.builds(RopeConfig, theta, st.just("linear"), st.just(1.0), factor)
        | st.builds(RopeConfig, theta, st.just("proportional"), st.sampled_from([0.25, 0.5, 1.0]), factor)
    )
    vocab = draw(size)
    return TextConfig(
        vocab_size=vocab, hidden_size=draw(size), intermediate_size=draw(size), num_attention_heads=heads,
        num_hidden_layers=len(owned + shared), layer_types=tuple(owned + shared), num_kv_shared_layers=len(shared),
        num_key_value_heads=kv_heads, num_global_key_value_heads=draw(divisors) if k_eq_v else kv_heads,
        head_dim=2 * draw(size), global_head_dim=2 * draw(size), sliding_window=draw(size), attention_k_eq_v=k_eq_v,
        use_double_wide_mlp=draw(st.booleans()), hidden_size_per_layer_input=draw(st.integers(0, 9)),
        vocab_size_per_layer_input=vocab + draw(size), enable_moe_block=draw(st.booleans()), num_experts=experts,
        top_k_experts=draw(st.integers(1, experts)), moe_intermediate_size=draw(size),
        final_logit_softcapping=draw(st.none() | st.floats(1, 99)), rms_norm_eps=draw(st.floats(1e-9, 1e-3)),
        max_position_embeddings=draw(size), sliding_rope=draw(ropes), full_rope=draw(ropes),
        tie_word_embeddings=draw(st.booleans()), pad_token_id=draw(st.none() | size),
        bos_token_id=draw(st.none() | size), eos_token_ids=tuple(draw(st.lists(st.integers(0, 299), max_size=3))),
    )  # fmt: skip


@given(text_configs(), st.sampled_from(["gemma4", "gemma4_text", "gemma4_unified"]))
def test_any_target_survives_a_config_json(text: TextConfig, model_type: str) -> None:
    config = TargetConfig(text, model_type)
    assert parsed(written(config)) == config


def test_full_layers_with_kv_heads_of_their_own_survive_a_config_json() -> None:
    """transformers builds such a model, with per_layer_config, and we load it: saving it must not lose the sizes."""
    raw = Gemma4TextConfig(**TWO_LAYERS, per_layer_config={1: {"head_dim": 32, "num_key_value_heads": 1}}).to_dict()
    config = parse_target_config(raw)
    assert (config.text.num_key_value_heads, config.text.num_global_key_value_heads) == (2, 1)
    assert parsed(written(config)) == config


#: without rope_parameters, which must be an object (see `not_yet` below)
def fields(raw: dict[str, Any]) -> st.SearchStrategy[str]:
    return st.sampled_from(list(raw))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 99) | st.floats(-9, 99) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from([S, F, "1"]), inner, max_size=2),
)
TARGET = written(TargetConfig(TINY))
DRAFTER = written(random_drafter(centroids=True).config)


@given(fields(TARGET), JSON)
def test_any_value_in_a_target_is_read_or_refused_by_a_sentence(name: str, value: Any) -> None:
    check_read_or_refused({**TARGET, name: value})


@given(fields({**DRAFTER, **DRAFTER["text_config"]}), JSON)
def test_any_value_in_a_drafter_is_read_or_refused_by_a_sentence(name: str, value: Any) -> None:
    raw = copy.deepcopy(DRAFTER)
    (raw if name in raw else raw["text_config"])[name] = value
    check_read_or_refused(raw)


def check_read_or_refused(raw: dict[str, Any]) -> None:
    try:
        config = parsed(raw) if isinstance(raw["model_type"], str) else parse_target_config(raw)
    except ConfigError as error:
        message = str(error)
    else:
        message = f"read as {type(config).__name__}."
    assert message.endswith(".")
    assert "\n" not in message


# -- what is refused


@pytest.mark.parametrize(("changes", "named"), [
    ({"model_type": "llama"}, ["model_type", "'llama'", "gemma4_text"]),
    ({"model_type": None}, ["model_type"]),
    ({"model_type": 4}, ["model_type"]),
    ({"model_type": "gemma4_assistant"}, ["model_type", "it is a drafter"]),
    ({"model_type": "gemma4_unified_assistant"}, ["model_type", "it is a drafter"]),
    ({"model_type": "gemma4"}, ["text_config"]),
    ({"num_hidden_layers": None}, ["num_hidden_layers"]),
    ({"vocab_size": None}, ["vocab_size"]),
    ({"sliding_window": None}, ["sliding_window"]),
    ({"hidden_size": "32"}, ["hidden_size", "'32'", "int"]),
    ({"hidden_size": True}, ["hidden_size", "True", "int"]),
    ({"hidden_size": 32.0}, ["hidden_size", "32.0", "int"]),
    ({"hidden_size": [32]}, ["hidden_size", "[32]", "int"]),
    ({"rms_norm_eps": "small"}, ["rms_norm_eps", "'small'", "float"]),
    ({"rms_norm_eps": True}, ["rms_norm_eps", "True", "float"]),
    ({"use_double_wide_mlp": 1}, ["use_double_wide_mlp", "1", "bool"]),
    ({"head_dim": 0}, ["head_dim", "0", "positive"]),
    ({"max_position_embeddings": -5}, ["max_position_embeddings", "-5", "positive"]),
    ({"layer_types": [S, F]}, ["layer_types", "num_hidden_layers 6"]),
    ({"layer_types": [S, S, "chunked_attention", S, S, F]}, ["layer_types", S, F]),
    ({"layer_types": "sliding"}, ["layer_types"]),
    ({"num_kv_shared_layers": 7}, ["num_kv_shared_layers", "7", "6"]),
    ({"num_kv_shared_layers": -1}, ["num_kv_shared_layers", "-1"]),
    ({"num_kv_shared_layers": 4, "layer_types": [S, S, S, S, S, F]}, ["num_kv_shared_layers", "full_attention"]),
    ({"num_attention_heads": 3}, ["num_key_value_heads", "2", "num_attention_heads", "3"]),
    ({"attention_k_eq_v": True, "num_global_key_value_heads": 3}, ["num_global_key_value_heads", "3", "4"]),
    ({"enable_moe_block": True}, ["enable_moe_block", "num_experts"]),
    ({"enable_moe_block": True, "num_experts": 4, "top_k_experts": 5, "moe_intermediate_size": 8}, ["top_k_experts"]),
    ({"hidden_activation": "silu"}, ["hidden_activation", "'silu'"]),
    ({"attention_bias": True}, ["attention_bias"]),
    ({"use_bidirectional_attention": "all"}, ["use_bidirectional_attention"]),
    ({"eos_token_id": "</s>"}, ["eos_token_id", "'</s>'"]),
    ({"eos_token_id": [1, "2"]}, ["eos_token_id", "'2'"]),
    ({"rope_parameters": {S: "default"}}, ["rope_parameters", "'default'"]),
    ({"rope_parameters": {F: {"rope_type": "yarn"}}}, ["rope_type", "'yarn'"]),
    ({"rope_parameters": {F: {"rope_theta": "1e6"}}}, ["rope_theta", "'1e6'"]),
    ({"per_layer_config": {"2": {"head_dim": 16}, "5": {"head_dim": 32}}}, ["per_layer_config"]),
    ({"per_layer_config": {"2": 16, "5": 16}}, ["per_layer_config"]),
    ({"rope_parameters": "default"}, ["rope_parameters"]),
    ({"eos_token_id": True}, ["eos_token_id", "True"]),
    ({"per_layer_config": [16]}, ["per_layer_config"]),
    ({"hidden_size_per_layer_input": -4}, ["hidden_size_per_layer_input", "-4"]),
    ({"final_logit_softcapping": 0.0}, ["final_logit_softcapping", "0"]),
    ({"rope_parameters": {F: {"rope_theta": -1.0}}}, ["rope_theta", "-1"]),
])  # fmt: skip
def test_targets_refused(changes: dict[str, Any], named: list[str]) -> None:
    check_refused(parse_target_config, {**TARGET, **changes}, named)


@pytest.mark.parametrize(("changes", "named"), [
    ({"model_type": "gemma4"}, ["model_type", "it is a target"]),
    ({"model_type": "gemma4_text"}, ["model_type", "it is a target"]),
    ({"model_type": "mtp"}, ["model_type", "'mtp'", "gemma4_assistant"]),
    ({"text_config": None}, ["text_config"]),
    ({"num_centroids": 60}, ["num_centroids", "60", "vocab_size", "61"]),
    ({"num_centroids": 0}, ["num_centroids", "0"]),
    ({"num_centroids": False}, ["num_centroids", "False", "int"]),
    ({"centroid_intermediate_top_k": 62}, ["centroid_intermediate_top_k", "62", "61"]),
    ({"centroid_intermediate_top_k": 0}, ["centroid_intermediate_top_k", "0"]),
    ({"backbone_hidden_size": 0}, ["backbone_hidden_size", "0"]),
    ({"backbone_hidden_size": "32"}, ["backbone_hidden_size", "'32'", "int"]),
    ({"use_ordered_embeddings": 1}, ["use_ordered_embeddings", "1", "bool"]),
    ({"text_config": {**DRAFTER["text_config"], "num_hidden_layers": None}}, ["num_hidden_layers"]),
    ({"text_config": {**DRAFTER["text_config"], "num_kv_shared_layers": 3, "layer_types": [F] * 4}},
     ["num_kv_shared_layers", "num_hidden_layers = 4"]),
    ({"text_config": {**DRAFTER["text_config"], "num_kv_shared_layers": 5}}, ["num_kv_shared_layers", "5", "4"]),
    ({"text_config": {**DRAFTER["text_config"], "num_kv_shared_layers": "4"}}, ["num_kv_shared_layers", "'4'", "int"]),
    ({"text_config": {**DRAFTER["text_config"], "hidden_size_per_layer_input": 8}}, ["hidden_size_per_layer_input"]),
])  # fmt: skip
def test_drafters_refused(changes: dict[str, Any], named: list[str]) -> None:
    check_refused(parse_drafter_config, {**DRAFTER, **changes}, named)


@pytest.mark.parametrize("parse", [parse_target_config, parse_drafter_config])
@pytest.mark.parametrize(("raw", "named"), [([1], ["list"]), ("gemma4", ["str"]), (None, ["NoneType"]),
                                            ({}, ["model_type"])])  # fmt: skip
def test_a_config_json_without_an_object_is_refused(parse: Any, raw: Any, named: list[str]) -> None:
    check_refused(parse, raw, ["config.json", *named])


def test_centroids_are_not_checked_where_they_are_not_used() -> None:
    raw = {**DRAFTER, "use_ordered_embeddings": False, "num_centroids": 60}
    assert parse_drafter_config(raw).num_centroids == 60


def test_the_constructor_checks_as_the_parser_does() -> None:
    with pytest.raises(ConfigError, match="num_kv_shared_layers = 7"):
        dataclasses.replace(TINY, num_kv_shared_layers=7)


def check_refused(parse: Any, raw: Any, named: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(raw)
    message = str(caught.value)
    assert [part for part in named if part not in message] == []
    assert "\n" not in message
    assert message.endswith(".")
