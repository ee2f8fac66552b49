"""generation_config.json: every field of transformers is honoured, does not matter, or is named."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from live_server import serving
from models import TINY, agreeing_pair, letters, random_drafter, random_target, save_pair
from oracle import build_target
from transformers import GenerationConfig

from gemma_mtp.cli import main
from gemma_mtp.config.generation import DRAWS_ONLY, HONOURED, IRRELEVANT, NOT_HONOURED, parse_generation_config
from gemma_mtp.decoding.params import SamplingParams
from gemma_mtp.engine.pair import Pair, load_pair
from gemma_mtp.errors import CheckpointError

CASE = {
    "eos_token_id": [1, 6], "bos_token_id": 2, "do_sample": False, "temperature": 1.0, "top_k": 64, "top_p": 0.95,
}  # fmt: skip
ALL = {
    "do_sample": True, "temperature": 0.9, "top_k": 7, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.3,
    "suppress_tokens": [9, 8], "max_new_tokens": 5, "stop_strings": ["XY", "Z"],
}  # fmt: skip


def notes(raw: dict[str, Any]) -> tuple[str, ...]:
    return parse_generation_config(raw, ()).notes


def test_every_field_of_transformers_has_its_place() -> None:
    theirs = {name for name in vars(GenerationConfig()) if name != "_original_object_hash"}
    places: list[set[str]] = [set(HONOURED), set(IRRELEVANT), set(NOT_HONOURED)]
    known = {name for place in places for name in place}
    assert theirs - known == set()
    assert sum(map(len, places)) == len(known)
    assert set(NOT_HONOURED) > DRAWS_ONLY


#: values that change what transformers writes, for each field that is not honoured
ACTIVE: dict[str, Any] = {
    "max_length": 20, "min_length": 5, "min_new_tokens": 5, "max_time": 2.0, "num_beams": 4, "typical_p": 0.9,
    "cache_implementation": "quantized", "top_h": 0.4, "epsilon_cutoff": 0.01, "eta_cutoff": 0.01,
    "encoder_repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "encoder_no_repeat_ngram_size": 3,
    "bad_words_ids": [[4]], "forced_bos_token_id": 3, "forced_eos_token_id": [3], "remove_invalid_values": True,
    "exponential_decay_length_penalty": [3, 1.1], "begin_suppress_tokens": [4], "sequence_bias": [[[4], 1.0]],
    "token_healing": True, "guidance_scale": 1.5, "watermarking_config": {"bias": 2.0}, "num_return_sequences": 2,
    "assistant_ensemble_weight": 0.5, "penalty_alpha": 0.6, "dola_layers": "low", "constraints": [1],
    "force_words_ids": [[4]],
}  # fmt: skip


def test_what_is_not_honoured_is_named() -> None:
    assert set(ACTIVE) == set(NOT_HONOURED)
    for name, value in ACTIVE.items():
        (note,) = notes({"do_sample": True, name: value})
        assert f"{name} = {value!r}" in note
        assert "not honoured" in note
        assert notes({name: None}) == ()
        assert notes({"do_sample": False, name: value}) == (() if name in DRAWS_ONLY else (note,))


def test_defaults_of_transformers_are_not_named() -> None:
    """Older versions wrote them all."""
    defaults = GenerationConfig()._get_default_generation_params()
    assert notes({name: value for name, value in defaults.items() if name != "max_length"}) == ()
    assert notes(json.loads(GenerationConfig().to_json_string(use_diff=False))) == ()


@given(st.text(min_size=1, max_size=12))
def test_any_other_field_is_named(name: str) -> None:
    if name not in HONOURED | IRRELEVANT | set(NOT_HONOURED):
        assert [f"the field {name} = 1, which is not known" in note for note in notes({name: 1})] == [True]
        assert notes({name: None}) == ()


@pytest.mark.parametrize(("raw", "temperature"), [
    (CASE, 0.0), ({"do_sample": False}, 0.0), ({"do_sample": True}, 1.0),
    ({"do_sample": True, "temperature": 0.3}, 0.3),
    ({"temperature": 0.3}, 0.3), ({}, None), ({"do_sample": None, "temperature": 0.3}, 0.3),
])  # fmt: skip
def test_do_sample(raw: dict[str, Any], temperature: float | None) -> None:
    assert parse_generation_config(raw, ()).temperature == temperature


@pytest.mark.parametrize(("field", "value"), [
    ("do_sample", "false"), ("do_sample", 0), ("top_k", 2.5), ("max_new_tokens", "many"), ("max_new_tokens", 2.5),
    ("min_p", "0"), ("repetition_penalty", [1]), ("stop_strings", 3), ("stop_strings", [""]), ("stop_strings", [1]),
    ("temperature", float("inf")), ("top_p", float("nan")),
    ("suppress_tokens", [True]), ("suppress_tokens", [2.0]), ("eos_token_id", "1"),
])  # fmt: skip
def test_values_of_the_wrong_kind_are_refused(field: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=rf"generation_config\.json has {field} = .*\.$"):
        parse_generation_config({field: value}, ())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_pair(tmp_path, *agreeing_pair(3))
    letters(tmp_path / "target")
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (tmp_path / "target" / "chat_template.jinja").write_text(template, encoding="utf-8")
    return tmp_path


def write(root: Path, raw: dict[str, Any]) -> Path:
    (root / "target" / "generation_config.json").write_text(json.dumps(raw), encoding="utf-8")
    return root / "target"


EXPECTED = SamplingParams(
    temperature=0.9, top_k=7, top_p=0.8, min_p=0.05, repetition_penalty=1.3, max_tokens=5, stop=("XY", "Z"),
    logit_bias={9: float("-inf"), 8: float("-inf")},
)  # fmt: skip


def test_python(saved: Path) -> None:
    pair = load_pair(write(saved, ALL), device="cpu", strict=True)
    assert pair.default_params() == EXPECTED
    given = pair.default_params(top_k=3, logit_bias={4: 1.0, 9: 2.0}, stop=(), max_tokens=None)
    assert (given.top_k, given.stop, given.max_tokens) == (3, (), 5)
    assert given.logit_bias == {4: 1.0, 9: 2.0, 8: float("-inf")}
    assert load_pair(write(saved, CASE), device="cpu", strict=True).default_params().greedy


def test_what_the_model_can_not_do_is_refused_at_load(saved: Path) -> None:
    with pytest.raises(CheckpointError, match=r"generation_config\.json asks .*top_p is 1\.5.*\.$"):
        load_pair(write(saved, {"top_p": 1.5}), device="cpu")
    beyond = {"suppress_tokens": [8, TINY.vocab_size, 258883, -1]}  # which transformers lets have no effect
    assert load_pair(write(saved, beyond), device="cpu").generation.suppress_tokens == (8,)


def test_what_is_not_honoured_is_a_warning_or_an_error(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    target = write(saved, {**ALL, "no_repeat_ngram_size": 3, "typical_p": 0.5})
    load_pair(target, device="cpu", use_drafter=False)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "no_repeat_ngram_size = 3" in caplog.text
    with pytest.raises(CheckpointError, match="no_repeat_ngram_size = 3, which is not honoured"):
        load_pair(target, device="cpu", strict=True)


def test_command_line(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The defaults hold with --chat, unless they are given."""
    seen: list[SamplingParams] = []
    real = Pair.generate

    def record(self: Pair, prompt: Any, params: SamplingParams, **rest: Any) -> Any:
        seen.append(params)
        return real(self, [3], params, **rest)

    monkeypatch.setattr(Pair, "generate", record)
    command = ["generate", "HI", "--json", "--target", str(write(saved, ALL))]
    given = ["--min-p", "0", "--repetition-penalty", "1", "-n", "2", "--stop", "Q", "-t", "0"]
    for options in (["--chat"], [], ["--chat", *given]):
        assert main([*command, *options]) == 0
    own, plain, changed = seen
    assert own == EXPECTED
    assert plain == SamplingParams()
    assert (changed.min_p, changed.repetition_penalty, changed.max_tokens, changed.stop) == (0.0, 1.0, 2, ("Q",))
    assert (changed.temperature, changed.top_k, changed.logit_bias) == (0.0, 7, EXPECTED.logit_bias)
    write(saved, CASE)
    assert main([*command, "--chat"]) == 0
    assert seen[-1].greedy


def test_server(saved: Path) -> None:
    """Chat takes all defaults, completions those of sampling, unless the request says otherwise."""
    pair = load_pair(write(saved, ALL), device="cpu")
    seen: list[SamplingParams] = []
    with serving(pair) as live:
        submit = live.service.engine.submit

        def record(request: Any, *rest: Any, **named: Any) -> Any:
            seen.append(request.params)
            return submit(request, *rest, **named)

        live.service.engine.submit = record  # type: ignore[method-assign]
        chat = {"messages": [{"role": "user", "content": "HI"}], "seed": 0}
        given = {"min_p": 0.0, "repetition_penalty": 1.0, "max_tokens": 2, "stop": ["Q"], "temperature": 0}
        for path, body in (
            ("/v1/chat/completions", chat), ("/v1/chat/completions", {**chat, **given}),
            ("/v1/completions", {"prompt": "HI", "seed": 0, "max_tokens": 3}),
        ):  # fmt: skip
            answer = live.post(path, body)
            assert answer.status_code == 200, answer.text
    own, changed, completion = seen
    assert own == EXPECTED
    assert (changed.min_p, changed.repetition_penalty, changed.max_tokens, changed.stop) == (0.0, 1.0, 2, ("Q",))
    assert (changed.temperature, changed.top_k) == (0.0, 7)
    sampling = EXPECTED.temperature, EXPECTED.top_k, EXPECTED.top_p, EXPECTED.min_p, EXPECTED.repetition_penalty
    assert (completion.temperature, completion.top_k, completion.top_p, completion.min_p,
            completion.repetition_penalty) == sampling  # fmt: skip
    assert (completion.stop, completion.logit_bias, completion.max_tokens) == ((), {}, 3)


@pytest.mark.parametrize("raw", [
    CASE, {"do_sample": False, "repetition_penalty": 1.4}, {"do_sample": False, "suppress_tokens": [3, 7, 200]},
    {"do_sample": False, "max_new_tokens": 4, "repetition_penalty": 0.8},
])  # fmt: skip
def test_greedy_output_is_transformers(raw: dict[str, Any], tmp_path: Path) -> None:
    """With nothing but the file: what its generate makes of it."""
    raw = {"max_new_tokens": 12, **raw, "eos_token_id": [1, 6]}
    build_target("text").save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(raw), encoding="utf-8")
    theirs = type(build_target("text")).from_pretrained(tmp_path)
    prompt = [5, 9, 17, 33, 65]
    expected = theirs.generate(torch.tensor([prompt]))[0, len(prompt) :].tolist()
    pair = load_pair(tmp_path, device="cpu", dtype="float32")
    assert pair.generate(prompt, pair.default_params()).token_ids == expected


def test_no_file_is_the_models_own_ends(tmp_path: Path) -> None:
    save_pair(tmp_path, random_target(), random_drafter())
    pair = load_pair(tmp_path / "target", device="cpu", strict=True)
    assert pair.default_params() == SamplingParams()
    assert pair.eos_token_ids == TINY.eos_token_ids
