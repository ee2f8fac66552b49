"""`/v1/messages`: what Anthropic's clients send and read."""

import json
from typing import Any

import jsonschema
import pytest
from live_server import Live, serving
from table_models import table_pair

from gemma_mtp.engine.pair import Pair, load_pair

PATH = "/v1/messages"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
          "required": ["city", "days"], "additionalProperties": False}  # fmt: skip
WEATHER: dict[str, Any] = {"name": "get_weather", "description": "The weather.", "input_schema": SCHEMA}
TIME: dict[str, Any] = {"name": "get_time", "input_schema": {"type": "object"}}


@pytest.fixture(scope="module")
def pair() -> Pair:
    return table_pair()


def ask(text: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 64, "temperature": 0, **fields}


def create(live: Live, body: dict[str, Any]) -> dict[str, Any]:
    answer = live.post(PATH, body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def put_together(text: str) -> dict[str, Any]:
    """What Anthropic's client makes of a stream."""
    message: dict[str, Any] = {}
    written = ""
    for event in text.removesuffix("\n\n").split("\n\n"):
        name, line = event.split("\n")
        data = json.loads(line.removeprefix("data: "))
        kind = data["type"]
        assert name == f"event: {kind}"
        if kind == "message_start":
            message = data["message"]
            assert message["content"] == [] and message["stop_reason"] is None
        elif kind == "content_block_start":
            assert data["index"] == len(message["content"])
            message["content"].append(data["content_block"])
            written = ""
        elif kind == "content_block_delta":
            block, delta = message["content"][data["index"]], data["delta"]
            match delta["type"]:
                case "text_delta":
                    block["text"] += delta["text"]
                case "thinking_delta":
                    block["thinking"] += delta["thinking"]
                case "signature_delta":
                    block["signature"] = delta["signature"]
                case "input_json_delta":
                    written += delta["partial_json"]
        elif kind == "content_block_stop" and message["content"][data["index"]]["type"] == "tool_use":
            message["content"][data["index"]]["input"] = json.loads(written)
        elif kind == "message_delta":
            message |= data["delta"]
            message["usage"] = data["usage"]
        else:
            assert kind in ("message_stop", "content_block_stop")
    return message


def comparable(message: dict[str, Any]) -> dict[str, Any]:
    content = [{name: value for name, value in block.items() if name != "id"} for block in message["content"]]
    return {**message, "id": None, "content": content, "usage": message["usage"]["output_tokens"]}


def test_text_and_why_it_ends(live: Live) -> None:
    message = create(live, ask("TEXT"))
    assert message["content"] == [{"type": "text", "text": "Hello, world."}]
    assert (message["stop_reason"], message["stop_sequence"], message["role"]) == ("end_turn", None, "assistant")
    assert message["usage"]["output_tokens"] == 5
    stopped = create(live, ask("TEXT", stop_sequences=["zzz", "wor"]))
    assert (stopped["content"][0]["text"], stopped["stop_reason"], stopped["stop_sequence"]) == (
        "Hello, ", "stop_sequence", "wor",
    )  # fmt: skip
    assert create(live, ask("TEXT", max_tokens=2))["stop_reason"] == "max_tokens"


def test_input_tokens_are_those_of_the_cache_and_the_others(live: Live) -> None:
    body = ask("TEXT", system="x " * 100)
    counts = []
    for _ in range(2):
        usage = create(live, body)["usage"]
        counts.append(usage["input_tokens"] + usage["cache_read_input_tokens"])
    counted = live.post(f"{PATH}/count_tokens", {name: body[name] for name in ("messages", "system")}).json()
    assert counts == [counted["input_tokens"]] * 2 and usage["cache_read_input_tokens"] > 0


@pytest.mark.parametrize("key", ["TEXT", "THINK", "WEATHER", "BOTH", "PLAN", "BROKEN"])
def test_a_stream_makes_the_same_message(live: Live, key: str) -> None:
    body = ask(key, tools=[WEATHER, TIME], thinking={"type": "enabled", "budget_tokens": 100})
    whole = create(live, body)
    streamed = put_together(live.post(PATH, {**body, "stream": True}).text)
    assert comparable(streamed) == comparable(whole)


def test_a_round_trip_of_a_tool(live: Live) -> None:
    body = ask("WEATHER", tools=[WEATHER])
    message = create(live, body)
    (call,) = message["content"]
    assert (call["type"], call["name"], call["input"]) == (
        "tool_use",
        "get_weather",
        {"city": "Paris, France", "days": 3},
    )
    assert message["stop_reason"] == "tool_use"
    answer = {"type": "tool_result", "tool_use_id": call["id"], "content": [{"type": "text", "text": "sun"}]}
    turns = [
        *body["messages"],
        {"role": "assistant", "content": message["content"]},
        {"role": "user", "content": [answer]},
    ]
    done = create(live, {**body, "messages": turns})
    assert done["content"][0]["text"] == "It is sunny there."
    chat = [{"role": "user", "content": "WEATHER"},
            {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {
                "name": "get_weather", "arguments": json.dumps(call["input"])}}]},
            {"role": "tool", "tool_call_id": "1", "content": "sun"}]  # fmt: skip
    tools = [{"type": "function", "function": {"name": "get_weather", "description": "The weather.",
                                               "parameters": SCHEMA}}]  # fmt: skip
    same = live.post("/v1/chat/completions", {"messages": chat, "tools": tools, "max_tokens": 1}).json()["usage"]
    assert sum(done["usage"][name] for name in ("input_tokens", "cache_read_input_tokens")) == same["prompt_tokens"]


def test_choices_of_tools(live: Live) -> None:
    choices: list[dict[str, Any]] = [{"type": "any"}, {"type": "tool", "name": "get_weather"}]
    for choice in choices:
        for block in create(live, ask("TEXT", tools=[WEATHER], tool_choice=choice))["content"]:
            jsonschema.validate(block["input"], SCHEMA)
    one = create(
        live, ask("BOTH", tools=[WEATHER, TIME], tool_choice={"type": "any", "disable_parallel_tool_use": True})
    )
    assert len(one["content"]) == 1
    none = create(live, ask("WEATHER", tools=[WEATHER], tool_choice={"type": "none"}))
    assert all(block["type"] == "text" for block in none["content"])


def test_thoughts(live: Live) -> None:
    on = create(live, ask("THINK", thinking={"type": "enabled", "budget_tokens": 100}))
    assert [block["type"] for block in on["content"]] == ["thinking", "text"]
    assert on["content"][0]["thinking"] == "Two and two STOP is four"
    off = create(live, ask("THINK", thinking={"type": "disabled"}))
    assert [block["type"] for block in off["content"]] == ["text"]
    counts = []
    for said in (on["content"], off["content"]):  # an earlier thought is dropped, as the template does
        turns = [*ask("THINK")["messages"], {"role": "assistant", "content": said}, *ask("TEXT")["messages"]]
        counts.append(live.post(f"{PATH}/count_tokens", {"messages": turns}).json()["input_tokens"])
    assert counts[0] == counts[1]


def test_the_answer_goes_on_with_the_assistants_message(live: Live) -> None:
    said = [*ask("TEXT")["messages"], {"role": "assistant", "content": "Hello"}]
    assert create(live, {**ask("x"), "messages": said})["content"][0]["text"] == ", world."


REFUSED: list[tuple[dict[str, Any], int, str]] = [
    ({"max_tokens": None}, 400, "max_tokens"), ({"max_tokens": 0}, 400, "max_tokens"),
    ({"n": 2}, 400, "n is not a field"),
    ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, 400, "tools"), ({"messages": []}, 400, "messages"),
    ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "x"}}, 400, "no tool of this name"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, 400, "no images"),
    ({"model": "claude"}, 404, "there is no model"), ({"mcp_servers": [{}]}, 400, "call the tools"),
    ({"messages": [{"role": "user", "content": "word " * 5000}]}, 400, "maximum context length"),
    ({"stop_sequences": ["x"] * 17}, 400, "stop_sequences: 17"),
    ({"output_format": {"type": "json_schema"}}, 400, "chat"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "status", "words"), REFUSED)
def test_what_is_refused(live: Live, fields: dict[str, Any], status: int, words: str) -> None:
    answer = live.post(PATH, ask("TEXT", **fields))
    assert (answer.status_code, answer.json()["type"]) == (status, "error"), answer.text
    error = answer.json()["error"]
    assert words in error["message"] and error["type"] == {400: "invalid_request_error", 404: "not_found_error"}[status]


def test_a_model_without_thoughts_says_so() -> None:
    with serving(load_pair()) as live:
        error = live.post(PATH, ask("x", thinking={"type": "enabled", "budget_tokens": 5})).json()["error"]
    assert error["param"].startswith("thinking") and "switch for thinking" in error["message"]
