"""Whatever a program hands to the public names: they take it, or raise one of the package's own errors."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import agreeing_pair, letters, save_pair

import gemma_mtp
from gemma_mtp import GemmaMtpError, Grammar, Pair, SamplingParams, load_pair

#: values of every kind; half a surrogate pair is no text
JUNK: list[Any] = [
    None, True, 0, 3, -1, 2**70, 0.5, float("nan"), float("inf"), 1j, "", "A", "\ud83d", "a\x00b", "auto", "int8", b"A",
    bytearray(b"A"), [], [1], [1, None], [-1], [2**70], ["A"], [[1]], (), (1,), {}, {1: 2}, {"A": 1}, {"A": None},
    set(), object(), int, len, range(3), iter([1, 2]), torch.tensor([1]), torch.tensor(1.5), torch.float32,
    Path("absent"), ValueError("x"), SamplingParams(), Grammar("json_object"), Ellipsis, NotImplemented,
]  # fmt: skip


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    root = tmp_path_factory.mktemp("api")
    save_pair(root, *agreeing_pair(3))
    letters(root / "target")
    return load_pair(root / "target", root / "drafter")


def taken(call: Callable[..., Any], *values: Any, **named: Any) -> None:
    """The call returns, or raises an error of the package whose message is a sentence."""
    try:
        call(*values, **named)
    except GemmaMtpError as error:
        assert str(error).endswith("."), error  # noqa: PT017 (it may return as well)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(SamplingParams)])
def test_a_sampling_parameter_of_any_kind(name: str, pair: Pair) -> None:
    def complete(value: Any) -> None:
        pair.generate([3], SamplingParams(**{"max_tokens": 2, name: value}))

    for value in JUNK:
        taken(complete, value)


@pytest.mark.parametrize("call", ["generate", "stream", "encode"])
def test_a_prompt_of_any_kind(call: str, pair: Pair) -> None:
    for value in JUNK:
        taken(getattr(pair, call), value)


@pytest.mark.parametrize("name", ["params", "draft_tokens", "verification"])
@pytest.mark.parametrize("call", ["generate", "stream"])
def test_how_to_decode_of_any_kind(call: str, name: str, pair: Pair) -> None:
    for value in JUNK:
        taken(getattr(pair, call), [3], **{name: value})


@pytest.mark.parametrize("name", list(inspect.signature(load_pair).parameters))
def test_what_to_load_of_any_kind(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for value in JUNK:
        if name != "on_bytes" or not callable(value):  # what a function of the caller's raises is the caller's
            taken(load_pair, **{name: value})


def test_a_drafter_of_any_kind(pair: Pair) -> None:
    for value in JUNK:
        taken(pair.with_drafter, value)


@pytest.mark.parametrize("names", [("kind",), ("source",), ("kind", "source")])
def test_a_grammar_of_any_kind(names: tuple[str, ...], pair: Pair) -> None:
    for value in JUNK:
        given = {"kind": "regex", "source": "A+", **dict.fromkeys(names, value)}
        taken(lambda **parts: pair.generate([3], SamplingParams(max_tokens=2, grammar=Grammar(**parts))), **given)


def test_default_parameters_of_any_kind(pair: Pair) -> None:
    for field in dataclasses.fields(SamplingParams):
        for value in JUNK:
            taken(pair.default_params, **{field.name: value})


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(st.text(st.characters(), max_size=8) | st.lists(st.sampled_from(JUNK), max_size=3))
def test_any_text_or_list(pair: Pair, prompt: Any) -> None:
    taken(pair.generate, prompt, SamplingParams(max_tokens=2))


def test_every_public_name_is_tried() -> None:
    """A name that is added to the package is to be tried here."""
    assert set(gemma_mtp.__all__) == {
        "GemmaMtpError", "GenerationResult", "Grammar", "Pair", "RoundStats", "SamplingParams", "TextStream",
        "TokenLogprob", "__version__", "load_pair",
    }  # fmt: skip
