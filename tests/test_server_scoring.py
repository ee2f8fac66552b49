"""Scoring over HTTP: what lm-eval's `local-completions` sends and reads, and the fields of other servers for it."""

from typing import Any

import pytest
from live_server import Live, serving
from table_models import table_pair

from gemma_mtp.decoding.params import SamplingParams
from gemma_mtp.engine.pair import Pair
from gemma_mtp.engine.result import PromptLogprob

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
TEXT = "import os\n\ndef f(x):\n    return 'é' + x\n"


def scores(pair: Pair, token_ids: list[int], top: int = 1) -> list[PromptLogprob]:
    found = pair.generate(token_ids, SamplingParams(max_tokens=0, prompt_logprobs=top)).prompt_logprobs
    assert found is not None
    return found


def test_as_lm_eval_asks(live: Live, pair: Pair) -> None:
    """Its request, and its reading of the answer: `LocalCompletionsAPI.parse_logprobs`."""
    prompts, contexts = [pair.encode(TEXT), pair.encode("x = [1, 2]\n")], [4, 3]
    body = {"model": "gemma-mtp-bundled", "prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1,
            "seed": 1234, "echo": True}  # fmt: skip
    for _ in range(2):  # a prompt that was seen before has the same scores
        choices = live.post(COMPLETIONS, body).json()["choices"]
        for choice, prompt, context in zip(choices, prompts, contexts, strict=True):
            reported, expected = choice["logprobs"], scores(pair, prompt)
            assert reported["token_logprobs"][0] is None and reported["top_logprobs"][0] is None
            assert reported["token_logprobs"][context:-1] == [entry.logprob for entry in expected[context - 1 :]]
            tokens, tops = reported["tokens"][context:-1], reported["top_logprobs"][context:-1]
            greedy = [token == max(top, key=lambda text: top[text]) for token, top in zip(tokens, tops, strict=True)]
            assert greedy == [entry.rank == 1 for entry in expected[context - 1 :]]
            assert len(reported["tokens"]) == len(prompt) + 1 == len(reported["text_offset"])


@pytest.mark.parametrize("as_ids", [True, False])
def test_offsets_find_the_tokens(live: Live, pair: Pair, as_ids: bool) -> None:
    body = {"prompt": pair.encode(TEXT) if as_ids else TEXT, "echo": True, "logprobs": 0, "max_tokens": 3,
            "temperature": 0}  # fmt: skip
    choice = live.post(COMPLETIONS, body).json()["choices"][0]
    logprobs, text = choice["logprobs"], choice["text"]
    begin = 0 if as_ids else 1  # a text has no token of its beginning in it
    for token, offset in list(zip(logprobs["tokens"], logprobs["text_offset"], strict=True))[begin:]:
        assert token.startswith("bytes:") or text[offset:].startswith(token)
    assert "bytes:\\xc3" in logprobs["tokens"] and "bytes:\\xa9" in logprobs["tokens"]
    assert all(set(top) == {token} for token, top in
               zip(logprobs["tokens"][1:], logprobs["top_logprobs"][1:], strict=True))  # fmt: skip
    streamed = live.events(COMPLETIONS, body)
    assert "".join(event["choices"][0]["text"] for event in streamed) == text
    parts = [event["choices"][0]["logprobs"] for event in streamed if event["choices"][0]["logprobs"]]
    for name, values in logprobs.items():
        assert [value for part in parts for value in part[name]] == values


def test_a_prompt_alone(live: Live, pair: Pair) -> None:
    answer = live.post(COMPLETIONS, {"prompt": TEXT, "echo": True, "logprobs": 2, "max_tokens": 0}).json()
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"], answer["usage"]["completion_tokens"]) == (TEXT, "length", 0)
    assert choice["logprobs"]["token_logprobs"][1:] == [entry.logprob for entry in scores(pair, pair.encode(TEXT))]
    plain = live.post(COMPLETIONS, {"prompt": TEXT, "echo": True, "max_tokens": 0}).json()["choices"][0]
    assert (plain["text"], plain["logprobs"]) == (TEXT, None)
    refused = live.post(COMPLETIONS, {"prompt": TEXT, "max_tokens": 0}).json()["error"]
    assert refused["param"] == "max_tokens" and "echo" in refused["message"]


def test_prompt_logprobs(live: Live, pair: Pair) -> None:
    """As vLLM reports them."""
    ids = pair.encode(TEXT)
    choice = live.post(COMPLETIONS, {"prompt": TEXT, "prompt_logprobs": 2, "max_tokens": 1}).json()["choices"][0]
    first, *rest = choice["prompt_logprobs"]
    assert first is None and choice["logprobs"] is None
    for found, entry, token_id in zip(rest, scores(pair, ids, 2), ids[1:], strict=True):
        assert found[str(token_id)]["logprob"] == entry.logprob and found[str(token_id)]["rank"] == entry.rank
        ranked = sorted(found.values(), key=lambda each: each["rank"])
        assert [each["logprob"] for each in ranked[:2]] == [logprob for _, logprob in entry.top]
        assert len(found) == 2 + (entry.rank > 2)
    refused = live.post(COMPLETIONS, {"prompt": TEXT, "prompt_logprobs": 1, "stream": True}).json()["error"]
    assert refused["param"] == "prompt_logprobs" and "stream" in refused["message"]
    assert "prompt_logprobs" not in live.post(COMPLETIONS, {"prompt": TEXT, "max_tokens": 1}).json()["choices"][0]


def test_a_conversation_is_scored_too() -> None:
    pair = table_pair()
    messages = [{"role": "user", "content": "TEXT"}]
    with serving(pair) as live:
        answer = live.post(CHAT, {"messages": messages, "prompt_logprobs": 0, "max_tokens": 1}).json()
        ids = live.post("/tokenize", {"messages": messages}).json()["tokens"]
    found = [float(next(iter(each.values()))["logprob"]) for each in answer["prompt_logprobs"][1:]]
    assert found == [entry.logprob for entry in scores(pair, ids)]


def test_what_is_said_of_the_tokenizer(live: Live, pair: Pair) -> None:
    assert pair.tokenizer is not None
    info: dict[str, Any] = live.client.get("/tokenizer_info").json()
    assert (
        info["vocab_size"] == pair.tokenizer.vocab_size and info["model_max_length"] == live.service.engine.max_tokens
    )
    for name in ("bos_token", "eos_token"):
        assert info[name] == pair.tokenizer.special_tokens[name]
        assert info[f"{name}_id"] == pair.tokenizer.raw.token_to_id(info[name])
    with serving(table_pair()) as other:
        assert "<|turn>model" in other.client.get("/tokenizer_info").json()["chat_template"]
