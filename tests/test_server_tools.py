"""Tools and thinking over the server: calls and thoughts as OpenAI's clients read them, drafted and plain alike."""

import asyncio
import json
from typing import Any

import httpx
import jsonschema
import pytest
from live_server import SECONDS, Live, parse_events, serving
from table_models import SCRIPTS, Quality, table_pair

from gemma_mtp.decoding.params import SamplingParams
from gemma_mtp.engine.pair import Pair, load_pair

CHAT = "/v1/chat/completions"
WEATHER = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
           "required": ["city"], "additionalProperties": False}  # fmt: skip
TIME = {"type": "object", "properties": {"zone": {"type": "string", "maxLength": 8}, "at": {"enum": [1, 2]}},
        "required": ["zone"], "additionalProperties": False}  # fmt: skip
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "The weather.", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "get_time", "parameters": TIME}},
]
SCHEMAS = {"get_weather": WEATHER, "get_time": TIME}


@pytest.fixture(scope="module")
def pair() -> Pair:
    return table_pair()


def ask(key: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": f"{key} please"}], "temperature": 0, "max_tokens": 60, **fields}


def choice_of(live: Live, body: dict[str, Any]) -> dict[str, Any]:
    answer = live.post(CHAT, body)
    assert answer.status_code == 200, answer.text
    choice: dict[str, Any] = answer.json()["choices"][0]
    return choice


def calls_of(message: dict[str, Any]) -> list[tuple[str, Any]]:
    return [
        (call["function"]["name"], json.loads(call["function"]["arguments"])) for call in message.get("tool_calls", [])
    ]


def put_together(events: list[dict[str, Any]]) -> dict[str, Any]:
    """A choice from its chunks, as clients do it."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "reasoning": "", "tool_calls": []}
    reason = None
    for event in events:
        for choice in event["choices"]:
            delta, reason = choice["delta"], choice["finish_reason"]
            assert None not in delta.values(), "what is null is left out"
            for name in ("content", "reasoning_content", "reasoning"):
                message[name] += delta.get(name, "")
            for call in delta.get("tool_calls", []):
                if call["index"] == len(message["tool_calls"]):
                    assert call["id"].startswith("call_") and call["type"] == "function"
                    message["tool_calls"].append({"name": call["function"]["name"], "arguments": ""})
                else:
                    assert set(call) == {"index", "function"} and set(call["function"]) == {"arguments"}
                message["tool_calls"][call["index"]]["arguments"] += call["function"]["arguments"]
    return {**message, "finish_reason": reason}


def same_as_whole(events: list[dict[str, Any]], whole: dict[str, Any]) -> None:
    made, message = put_together(events), whole["message"]
    assert made["content"] == (message["content"] or "")
    assert made["reasoning"] == made["reasoning_content"] == message.get("reasoning_content", "")
    assert made["finish_reason"] == whole["finish_reason"]
    expected = [
        {"name": call["function"]["name"], "arguments": call["function"]["arguments"]}
        for call in message.get("tool_calls", [])
    ]
    assert made["tool_calls"] == expected


def test_calls_are_parsed(live: Live) -> None:
    choice = choice_of(live, ask("WEATHER", tools=TOOLS))
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    assert calls_of(choice["message"]) == [("get_weather", {"city": "Paris, France", "days": 3})]
    both = choice_of(live, ask("BOTH", tools=TOOLS))
    assert both["message"]["content"] == "Let me see: "
    assert calls_of(both["message"]) == [("get_time", {}), ("get_weather", {"city": 'Rome {\\n"}'})]
    assert len({call["id"] for call in both["message"]["tool_calls"]}) == 2


@pytest.mark.parametrize("key", SCRIPTS)
@pytest.mark.parametrize(
    "fields", [{}, {"tools": TOOLS}, {"tools": TOOLS, "tool_choice": "required"}, {"stop": "STOP"}]
)
def test_streamed_is_whole(live: Live, key: str, fields: dict[str, Any]) -> None:
    same_as_whole(live.events(CHAT, ask(key, **fields)), choice_of(live, ask(key, **fields)))


def test_arguments_come_while_they_are_written(live: Live) -> None:
    each = {"include_rounds": True}  # a chunk for each round, however slowly they are read
    events = live.events(CHAT, ask("WEATHER", tools=TOOLS, draft_tokens=0, stream_options=each))
    pieces = [call for event in events for call in event["choices"][0]["delta"].get("tool_calls", [])]
    assert len(pieces) >= 5 and pieces[0]["function"] == {"name": "get_weather", "arguments": "{"}


def test_a_call_of_no_tool_is_text(live: Live) -> None:
    choice = choice_of(live, ask("BROKEN", tools=TOOLS))
    assert choice["message"]["content"] == "<|tool_call>call:no_such_tool(oops)<tool_call|>After"
    assert choice["finish_reason"] == "stop" and "tool_calls" not in choice["message"]


def test_no_call_where_none_is_wanted(live: Live) -> None:
    none = choice_of(live, ask("WEATHER", tools=TOOLS, tool_choice="none"))
    assert none["finish_reason"] == "stop" and "tool_calls" not in none["message"] and none["message"]["content"]


def test_one_call_where_only_one_is_wanted(live: Live) -> None:
    choice = choice_of(live, ask("BOTH", tools=TOOLS, parallel_tool_calls=False))
    assert calls_of(choice["message"]) == [("get_time", {})] and choice["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("key", ["TEXT", "WEATHER", "BROKEN", "JSON", "THINK"])
@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "get_time"}}], ids=["required", "named"]
)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_call_that_must_be_is_one_of_the_schema(live: Live, key: str, choice: Any, seed: int) -> None:
    """Whatever the model would say, at a temperature at which it says anything."""
    for temperature in (0.0, 60.0):
        tools = TOOLS if key != "TEXT" else TOOLS[1:]  # short texts
        body = ask(key, tools=tools, tool_choice=choice, temperature=temperature, seed=seed, max_tokens=400)
        made = choice_of(live, body)
        if made["finish_reason"] == "length":
            continue  # a text without end
        assert made["finish_reason"] == "tool_calls" and made["message"]["content"] is None
        calls = calls_of(made["message"])
        assert calls and (choice == "required" or [name for name, _ in calls] == ["get_time"])
        for name, arguments in calls:
            jsonschema.validate(arguments, SCHEMAS[name])


def test_strict_holds_what_the_model_chose_to_call(live: Live) -> None:
    """The model's own second property is not of this schema."""
    narrow = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"],
              "additionalProperties": False}  # fmt: skip
    tool = {"name": "get_weather", "parameters": narrow}
    free = choice_of(live, ask("WEATHER", tools=[{"type": "function", "function": tool}]))
    assert calls_of(free["message"])[0][1] == {"city": "Paris, France", "days": 3}
    strict = choice_of(live, ask("WEATHER", tools=[{"type": "function", "function": {**tool, "strict": True}}]))
    (call,) = calls_of(strict["message"])
    jsonschema.validate(call[1], narrow)


def test_a_round_trip(live: Live, pair: Pair) -> None:
    body = ask("WEATHER", tools=TOOLS)
    message = choice_of(live, body)["message"]
    answer = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"],
              "content": [{"type": "text", "text": "sun"}]}  # fmt: skip
    done = choice_of(live, {**body, "messages": [*body["messages"], message, answer]})
    assert done["message"]["content"] == "It is sunny there." and done["finish_reason"] == "stop"
    tokens = live.post("/tokenize", {"messages": [*body["messages"], message, answer]}).json()["tokens"]
    assert pair.tokenizer is not None
    text = pair.tokenizer.decode(tokens, skip_special_tokens=False)
    assert (
        '<|tool_call>call:get_weather{city:<|"|>Paris, France<|"|>,days:3}<tool_call|>'
        '<|tool_response>response:get_weather{value:<|"|>sun<|"|>}<tool_response|>' in text
    )


def test_thoughts_are_told_apart(live: Live) -> None:
    choice = choice_of(live, ask("THINK", chat_template_kwargs={"enable_thinking": True}, stop="STOP"))
    message = choice["message"]
    assert message["reasoning_content"] == message["reasoning"] == "Two and two STOP is four"
    assert message["content"] == "The answer " and choice["finish_reason"] == "stop"
    hidden = choice_of(live, ask("THINK", include_reasoning=False))["message"]
    assert set(hidden) == {"role", "content", "refusal"} and hidden["content"] == "The answer STOP is 4"
    for event in live.events(CHAT, ask("THINK", include_reasoning=False)):
        assert set(event["choices"][0]["delta"]) <= {"role", "content"}
    usage = live.post(CHAT, ask("THINK")).json()["usage"]["completion_tokens_details"]
    assert usage["reasoning_tokens"] == 6


@pytest.mark.parametrize("most", [0, 1, 5])
def test_a_thought_ends_at_its_limit(live: Live, most: int) -> None:
    for draft_tokens in (0, 4):
        answer = live.post(CHAT, ask("LOOP", max_thinking_tokens=most, max_tokens=40, draft_tokens=draft_tokens)).json()
        assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == most


def test_what_must_be_waits_for_the_thought(live: Live) -> None:
    for fields in ({"regex": "[0-9]{3}"}, {"tools": TOOLS[1:], "tool_choice": "required"}):
        made = choice_of(live, ask("THINK", reasoning_effort="high", **fields))
        assert made["message"]["reasoning"] == "Two and two STOP is four"
        if "regex" in fields:
            assert len(made["message"]["content"]) == 3 and made["message"]["content"].isdigit()
        else:
            assert [name for name, _ in calls_of(made["message"])] == ["get_time"]


def test_text_by_a_schema_or_a_call(live: Live) -> None:
    """The model may call a tool or answer; an answer is of the schema."""
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"],
              "additionalProperties": False}  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    called = choice_of(live, ask("WEATHER", tools=TOOLS, response_format=form))["message"]
    assert called["tool_calls"][0]["function"]["name"] in SCHEMAS and called["content"] is None
    answer = choice_of(live, ask("JSON", tools=TOOLS, response_format=form))
    assert json.loads(answer["message"]["content"]) == {"city": "Oslo"}


def test_earlier_thoughts_are_dropped_as_the_template_does(live: Live) -> None:
    said = {"role": "assistant", "content": "4", "reasoning_content": "SECRET"}
    messages = [{"role": "user", "content": "2+2"}, said, {"role": "user", "content": "TEXT"}]
    count = [
        live.post("/tokenize", {"messages": [messages[0], each, messages[2]]}).json()["tokens"]
        for each in (said, {"role": "assistant", "content": "4"})
    ]
    assert count[0] == count[1]


def test_logprobs_are_of_the_text(live: Live) -> None:
    choice = choice_of(live, ask("THINK", logprobs=True))
    text = "".join(entry["token"] for entry in choice["logprobs"]["content"])
    assert text == "The answer STOP is 4<turn|>"
    events = live.events(CHAT, ask("THINK", logprobs=True))
    parts = [event["choices"][0]["logprobs"] or {"content": []} for event in events]
    assert [entry for part in parts for entry in part["content"]] == choice["logprobs"]["content"]


def test_rounds_say_which_part_a_token_is_of(live: Live) -> None:
    events = live.events(CHAT, ask("PLAN", tools=TOOLS, stream_options={"include_rounds": True}))
    parts = [token["part"] for event in events for token in (event["gemma_mtp"] or {"tokens": []})["tokens"]]
    assert parts == ["thought"] * 4 + ["text"] + ["call"] * 7 + ["text"]


def test_drafters_are_as_good_as_their_names_say() -> None:
    """Where no grammar narrows the choice, which is the same for the target."""
    shares = {}
    qualities: list[Quality] = ["right", "half", "wrong"]
    for quality in qualities:
        pair, drafted, accepted = table_pair(quality), 0, 0
        assert pair.tokenizer is not None
        for key in SCRIPTS:
            prompt = pair.tokenizer.encode_chat([{"role": "user", "content": key}])
            result = pair.generate(prompt, SamplingParams(max_tokens=12), draft_tokens=2)
            drafted, accepted = drafted + result.drafted, accepted + result.accepted
        shares[quality] = accepted / drafted
    assert shares["right"] > 0.6 > shares["half"] > 0.04 > shares["wrong"]


@pytest.mark.parametrize("quality", ["right", "half", "wrong"])
def test_drafted_is_plain_among_sixteen(quality: Quality) -> None:
    """Every script, with tools and without, 16 at once: the same bytes whatever the drafter says."""
    bodies = [
        ask(key, seed=seed, temperature=temperature, max_tokens=32, **fields)
        for seed, key in enumerate(SCRIPTS)
        for temperature in (0, 30.0)[: 2 if seed % 2 else 1]
        for fields in (
            {"tools": TOOLS}, {"tools": TOOLS, "tool_choice": "required"},
            {"max_thinking_tokens": 3, "regex": "[a-z]{9}"},
            {"tools": TOOLS, "reasoning_effort": "low", "parallel_tool_calls": False},
        )
    ][:: 1 if quality == "half" else 3]  # fmt: skip
    with serving(table_pair(quality)) as live:

        async def all_of(draft_tokens: int) -> list[dict[str, Any]]:
            limit = asyncio.Semaphore(16)
            async with httpx.AsyncClient(base_url=live.url, timeout=SECONDS, verify=False) as client:

                async def one(body: dict[str, Any]) -> dict[str, Any]:
                    async with limit:
                        answer = await client.post(CHAT, json={**body, "draft_tokens": draft_tokens, "stream": True})
                    return put_together(parse_events(answer.text))

                return list(await asyncio.gather(*map(one, bodies)))

        plain, drafted = asyncio.run(all_of(0)), asyncio.run(all_of(4))
        stats = live.service.engine.stats()
    assert drafted == plain
    assert stats.draft_tokens > stats.accepted_tokens > 0
    assert any(made["tool_calls"] for made in plain) and any(made["reasoning"] for made in plain)


#: fields beside tools, and what is said of them
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"tools": [{"type": "function"}]}, "tools[0].function", "missing"),
    ({"tools": [{"type": "web_search"}]}, "tools", "function"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "another form"),
    ({"tools": [TOOLS[0], TOOLS[0]]}, "tools", "several tools of the name"),
    ({"tools": [TOOLS[0]] * 129}, "tools", "129 tools"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "no tool of"),
    ({"tool_choice": "required"}, "tool_choice", "no tools"),
    ({"functions": [{"name": "f"}]}, "functions", "use tools"),
    ({"function_call": "auto"}, "function_call", "use tools"),
    ({"tools": [{"type": "function", "function": {"name": "f", "strict": True, "parameters": {"not": {}}}}]},
     "tools", "not is not offered"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "can not be given there"),
    ({"chat_template_kwargs": {"no_such": 1}}, "chat_template_kwargs", "no variable 'no_such'"),
    ({"max_thinking_tokens": -1}, "max_thinking_tokens", "0 or more"),
    ({"messages": [{"role": "assistant", "content": "x", "function_call": {"name": "f"}}]}, "messages", "left out"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param", "words"), REFUSED)
def test_what_is_refused(live: Live, fields: dict[str, Any], param: str, words: str) -> None:
    answer = live.post(CHAT, ask("TEXT", **fields))
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"].startswith(param) and words in error["message"], error


def test_a_model_without_tools_and_thinking_says_so() -> None:
    with serving(load_pair()) as live:
        refused: list[tuple[dict[str, Any], str]] = [
            ({"tools": TOOLS}, "tools"), ({"reasoning_effort": "high"}, "reasoning_effort"),
            ({"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs"),
            ({"max_thinking_tokens": 5}, "max_thinking_tokens"),
            ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages[0]"),
        ]  # fmt: skip
        for fields, param in refused:
            error = live.post(CHAT, ask("x", **fields)).json()["error"]
            assert error["param"] == param and ("model" in error["message"] or "template" in error["message"])
        harmless: list[dict[str, Any]] = [
            {"reasoning_effort": "none"}, {"chat_template_kwargs": {"enable_thinking": False}}, {"tools": []},
        ]  # fmt: skip
        for fields in harmless:
            assert live.post(CHAT, ask("x", max_tokens=1, **fields)).status_code == 200
