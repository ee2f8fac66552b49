"""What differs between clients and does not matter is taken; what changes the output is done, or refused by name."""

import gzip
import json
from collections.abc import Iterator
from typing import Any

import pytest
from live_server import Live, serving
from table_models import SCRIPTS, TEMPLATE, table_pair

from gemma_mtp.server.fields import REFUSED

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
KEY, ORIGIN = "a-key", "https://page.example"


@pytest.fixture(scope="module")
def table() -> Iterator[Live]:
    """A template that refuses system messages."""
    refusing = "{%- if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif -%}"
    with serving(table_pair(template=refusing + TEMPLATE), api_keys=(KEY,), allow_origins=(ORIGIN,)) as live:
        live.client.headers["Authorization"] = f"Bearer {KEY}"
        yield live


def text_of(live: Live, **fields: Any) -> str:
    answer = live.post(COMPLETIONS, {"prompt": "import ", "max_tokens": 6, "temperature": 0, "seed": 1, **fields})
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["text"]
    return text


def test_values_that_mean_off(live: Live) -> None:
    plain = text_of(live, temperature=1)
    for fields in ({"top_k": -1}, {"stop": ""}, {"top_k": 0}):
        assert text_of(live, temperature=1, **fields) == plain
    assert text_of(live, temperature=1, top_p=0) == text_of(live)
    assert text_of(live, temperature=1e20) and text_of(live, temperature=5.5)


def test_no_limit_is_what_the_context_has_room_for(live: Live) -> None:
    prompt = [5] * (live.service.longest_prompt - 9)
    for path, body in (
        (COMPLETIONS, {"prompt": prompt}),
        (CHAT, {"messages": [{"role": "user", "content": "x " * 1990}]}),
    ):
        answer = live.post(path, {**body, "max_tokens": -1, "ignore_eos": True, "temperature": 0}).json()
        assert answer["usage"]["total_tokens"] == 2048


@pytest.mark.parametrize(
    ("fields", "among"),
    [({"guided_choice": ["yes", "no (1+1)"]}, ["yes", "no (1+1)"]), ({"guided_regex": "[ab]{3}"}, None),
     ({"structured_outputs": {"choice": ["left", "right"]}}, ["left", "right"]),
     ({"structured_outputs": {"regex": "[ab]{3}"}}, None)],
)  # fmt: skip
def test_other_names_of_constraints(live: Live, fields: dict[str, Any], among: list[str] | None) -> None:
    text = text_of(live, max_tokens=30, **fields)
    assert text in among if among else (len(text) == 3 and set(text) <= set("ab"))


def test_schemas_by_other_names(live: Live) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    for fields in (
        {"guided_json": schema}, {"guided_json": json.dumps(schema)}, {"structured_outputs": {"json": schema}},
        {"response_format": {"type": "json_object", "schema": schema}},
    ):  # fmt: skip
        assert json.loads(text_of(live, max_tokens=60, **fields))["a"] in (1, 2)
    both = live.post(COMPLETIONS, {"prompt": "a", "regex": "a", "guided_regex": "a"})
    assert both.status_code == 400 and "give one of them" in both.json()["error"]["message"]


OTHER_VALUES: dict[str, Any] = {
    "add_special_tokens": False, "skip_special_tokens": False, "min_tokens": 3, "best_of": 2, "bad_words": ["x"],
    "suffix": "x", "functions": [{}], "function_call": "auto", "modalities": ["text", "audio"], "verbosity": "low",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(set(REFUSED) - {"spaces_between_special_tokens"}))
def test_fields_that_are_not_offered_are_refused_by_name(live: Live, name: str) -> None:
    value = OTHER_VALUES.get(name, 7)
    for path, body in ((CHAT, {"messages": [{"role": "user", "content": "x"}]}), (COMPLETIONS, {"prompt": "x"})):
        answer = live.post(path, {**body, "max_tokens": 1, name: value})
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["param"] == name and name in error["message"], error
        for neutral in (None, *REFUSED[name][0]):
            assert live.post(path, {**body, "max_tokens": 1, name: neutral}).status_code == 200, neutral


def test_turns_that_are_not_begun_or_go_on(live: Live) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "def add("}]
    prompts = [
        live.post(CHAT, {"messages": messages, "max_tokens": 1, **fields}).json()["usage"]["prompt_tokens"]
        for fields in ({}, {"add_generation_prompt": False}, {"continue_final_message": True})
    ]
    assert prompts[0] > prompts[1] > prompts[2]
    whole = "<bos><|turn>user\nhi<turn|>\n<|turn>model\ndef add("
    body = {"prompt": whole, "max_tokens": 5, "temperature": 0}
    expected = live.post(COMPLETIONS, body).json()["choices"][0]["text"]
    chat = {"messages": messages, "continue_final_message": True, "max_tokens": 5, "temperature": 0}
    assert live.post(CHAT, chat).json()["choices"][0]["message"]["content"] == expected
    for wrong in (
        {"messages": messages[:1], "continue_final_message": True},
        {"messages": messages, "continue_final_message": True, "add_generation_prompt": True},
    ):
        assert live.post(CHAT, wrong).json()["error"]["param"] == "continue_final_message"


def test_head_and_slashes(live: Live) -> None:
    for path in ("/health", "/v1/models", "/v1/models/gemma-mtp-bundled", "/metrics", "/openapi.json", "/", "/health/"):
        head, got = live.client.head(path), live.client.get(path)
        assert head.status_code == got.status_code == 200 and head.content == b""
        assert head.headers["content-type"] == got.headers["content-type"]
    assert live.client.head(COMPLETIONS).status_code == 405
    assert live.post("/v1/completions/", {"prompt": "a", "max_tokens": 1}).status_code == 200
    assert 'route="/v1/completions"' in live.client.get("/metrics").text


def test_compressed_bodies_are_refused(live: Live) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    answer = live.client.post(COMPLETIONS, content=gzip.compress(b'{"prompt": "a"}'), headers=headers)
    assert answer.status_code == 415 and "compressed" in answer.json()["error"]["message"]


def test_keys_of_either_header(table: Live) -> None:
    del table.client.headers["Authorization"]
    try:
        for header in ({"X-API-Key": KEY}, {"Authorization": f"Bearer {KEY}"}):
            assert table.client.get("/v1/models", headers=header).status_code == 200
        for header in ({}, {"X-API-Key": "other"}, {"X-API-Key": KEY, "Authorization": "Bearer other"}):
            assert table.client.get("/v1/models", headers=header).status_code == 401
    finally:
        table.client.headers["Authorization"] = f"Bearer {KEY}"


def test_pages_of_allowed_origins_may_send_any_header(table: Live) -> None:
    asked = {
        "Origin": ORIGIN,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang,x-stainless-retry-count",
    }
    answer = table.client.options(CHAT, headers=asked)
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == ORIGIN
    assert "x-stainless-retry-count" in answer.headers["access-control-allow-headers"]
    assert table.client.options(CHAT, headers={**asked, "Origin": "https://other.example"}).status_code == 400


def test_system_messages_that_a_template_refuses_join_the_users(table: Live) -> None:
    merged, written = (
        table.post("/tokenize", {"messages": messages}).json()["tokens"]
        for messages in (
            [{"role": "system", "content": "Be brief."}, {"role": "developer", "content": "Now."},
             {"role": "user", "content": [{"type": "text", "text": "hi"}]}],
            [{"role": "user", "content": "Be brief.\n\nNow.\n\nhi"}],
        )
    )  # fmt: skip
    assert merged == written
    assert table.post("/tokenize", {"messages": [{"role": "system", "content": "x"}]}).status_code == 400


def test_a_prompt_that_is_too_long_is_told_in_the_words_that_clients_look_for(table: Live) -> None:
    """litellm looks for the first words, LangChain for the last, in any case or in this one."""
    error = table.post(CHAT, {"messages": [{"role": "user", "content": "word " * 5000}]}).json()["error"]
    assert "this model's maximum context length is 4096 tokens. however, " in error["message"].lower()
    assert "Input tokens exceed the configured limit" in error["message"]
    assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("part", "words"),
    [({"type": "image_url", "image_url": {"url": "x"}}, "takes no images"),
     ({"type": "input_audio", "input_audio": {}}, "takes no audio"), ({"type": "file", "file": {}}, "takes no files")],
)  # fmt: skip
def test_parts_of_another_kind_get_a_sentence(live: Live, part: dict[str, Any], words: str) -> None:
    content = [{"type": "text", "text": "what is this?"}, part]
    error = live.post(CHAT, {"messages": [{"role": "user", "content": content}]}).json()["error"]
    assert words in error["message"] and error["param"].startswith("messages[0]")


@pytest.mark.parametrize("field", ["temperature", "max_tokens", "n", "stop", "logit_bias", "seed", "messages", "tools"])
def test_errors_are_not_a_librarys_words(live: Live, field: str) -> None:
    values: list[Any] = ["x", -5, [1], {"a": 1}, True, 1.5, [], [{}], [{"role": "user", "content": [{}]}]]
    for value in values:
        body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, field: value}
        answer = live.post(CHAT, body)
        for words in ("Input should", "pydantic", "Value error", "valid dictionary", "ctx", "discriminator"):
            assert words not in answer.text


def test_streams_never_say_null_for_what_is_absent(table: Live) -> None:
    for key in SCRIPTS:
        body = {"messages": [{"role": "user", "content": key}], "max_tokens": 12, "temperature": 0}
        for event in table.events(CHAT, body):
            assert None not in event["choices"][0]["delta"].values()
