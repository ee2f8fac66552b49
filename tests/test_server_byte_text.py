"""Text of characters that are several tokens each, through the server: pieces, stop strings, offsets, rounds."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
from byte_fallback import gemma_like
from live_server import Live, serving
from models import TINY, random_drafter, random_target

from gemma_mtp.backend.select import make_backend
from gemma_mtp.config.generation import GenerationDefaults
from gemma_mtp.engine.pair import Pair
from gemma_mtp.tokenizer import Tokenizer

RUNES = "ᚠᚢᚦᚨᚱᚲᚷᚹ"
TEXT = f"{RUNES} ok"
BODY: dict[str, Any] = {"prompt": "hello", "max_tokens": 60, "temperature": 0, "regex": TEXT}
COMPLETIONS = "/v1/completions"
TEMPLATE = (
    "{% for m in messages %}<|turn>{{ m['role'] }}\n{{ m['content'] }}<turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn>model\n{% endif %}"
)


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    tokenizer = Tokenizer(gemma_like(), {"bos_token": "<bos>"}, TEMPLATE)
    size = tokenizer.vocab_size
    config = dataclasses.replace(TINY, vocab_size=size, vocab_size_per_layer_input=size)
    backend = make_backend(random_target(3, config), random_drafter(config))
    with serving(Pair(backend, tokenizer, GenerationDefaults(eos_token_ids=(1,)))) as live:
        yield live


@pytest.mark.parametrize("draft_tokens", [0, 1, 4])
def test_a_run_is_streamed_character_by_character(live: Live, draft_tokens: int) -> None:
    body = {**BODY, "draft_tokens": draft_tokens}
    assert live.post(COMPLETIONS, body).json()["choices"][0]["text"] == TEXT
    pieces = [
        event["choices"][0]["text"]
        for event in live.events(COMPLETIONS, {**body, "stream_options": {"include_rounds": True}})
    ]
    assert "".join(pieces) == TEXT
    if draft_tokens == 0:
        assert [piece for piece in pieces if piece][: len(RUNES)] == list(RUNES)


@pytest.mark.parametrize("draft_tokens", [0, 1, 4])
@pytest.mark.parametrize("stop", ["ᚷᚹ", "ᚢ", "ᚹ ", TEXT[2:5]])
def test_a_stop_string_in_a_run_ends_it(live: Live, draft_tokens: int, stop: str) -> None:
    body = {**BODY, "stop": stop, "draft_tokens": draft_tokens}
    whole = live.post(COMPLETIONS, body).json()
    events = live.events(COMPLETIONS, {**body, "stream_options": {"include_usage": True}})
    before = TEXT[: TEXT.index(stop)]
    count = 3 * len(before + stop) if " " not in stop else 3 * len(RUNES) + 1
    assert (whole["choices"][0]["text"], whole["choices"][0]["finish_reason"]) == (before, "stop")
    assert "".join(event["choices"][0]["text"] for event in events[:-1]) == before
    assert whole["usage"]["completion_tokens"] == events[-1]["usage"]["completion_tokens"]
    if stop != "ᚹ ":  # whether the space is a token of its own or begins " ok" is the model's choice
        assert whole["usage"]["completion_tokens"] == count


def test_offsets_and_rounds_of_a_run(live: Live) -> None:
    body = {**BODY, "logprobs": 1, "draft_tokens": 3, "stream_options": {"include_rounds": True}}
    whole = live.post(COMPLETIONS, body).json()["choices"][0]["logprobs"]
    streamed = live.events(COMPLETIONS, body)
    offsets = [at for event in streamed for at in event["choices"][0]["logprobs"]["text_offset"]]
    assert whole["text_offset"] == offsets
    # a character's three tokens begin where it does; it comes with its last one
    assert offsets[: 3 * len(RUNES)] == [at for at in range(len(RUNES)) for _ in range(3)]
    tokens = [token for event in streamed for token in event["gemma_mtp"]["tokens"]]
    assert [token["text"] for token in tokens[: 3 * len(RUNES)]] == [part for rune in RUNES for part in ("", "", rune)]
    assert "".join(token["text"] for token in tokens) == TEXT


def test_a_template_without_bos_has_none(live: Live) -> None:
    messages = [{"role": "user", "content": "hello"}]
    raw = gemma_like()
    expected = raw.encode("<|turn>user\nhello<turn|>\n<|turn>model\n", add_special_tokens=False).ids
    assert live.post("/tokenize", {"messages": messages}).json()["tokens"] == expected
    body = {"messages": messages, "max_tokens": 2, "temperature": 0}
    assert live.post("/v1/chat/completions", body).json()["usage"]["prompt_tokens"] == len(expected)
    assert live.post("/tokenize", {"prompt": "hello"}).json()["tokens"] == raw.encode("hello").ids
