"""`/v1/responses` with OpenAI's client: items, tools, thoughts, streams, and what is kept."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import openai
import pytest
from live_server import SECONDS, Live, serving, wait_for
from table_models import table_pair

from gemma_mtp.engine.pair import Pair, load_pair
from gemma_mtp.server.response_store import server_of

MODEL, PATH = "gemma-mtp-bundled", "/v1/responses"
WEATHER: dict[str, Any] = {
    "type": "function", "name": "get_weather", "strict": True,
    "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city", "days"], "additionalProperties": False,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def pair() -> Pair:
    return table_pair()


@pytest.fixture(scope="module")
def live(pair: Pair) -> Iterator[Live]:
    with serving(pair, max_stored_responses=20) as live:
        yield live


@pytest.fixture(scope="module")
def client(live: Live) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)


def create(live: Live, **fields: Any) -> dict[str, Any]:
    answer = live.post(PATH, {"temperature": 0, **fields})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_ids_end_in_the_servers_name(pair: Pair) -> None:
    with serving(pair, id_suffix="_r1") as live:
        made = create(live, input="WEATHER", tools=[WEATHER])
        ids = [made["id"], *(item["id"] for item in made["output"])]
        assert len(ids) > 1 and {server_of(f"{PATH}/{name}", None) for name in ids} == {"r1"}
        assert live.client.get(f"{PATH}/{made['id']}").json() == made


def stream(live: Live, **fields: Any) -> list[dict[str, Any]]:
    text = live.post(PATH, {"temperature": 0, **fields, "stream": True}).text
    events = []
    for event in text.removesuffix("\n\n").split("\n\n"):
        name, data = event.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def comparable(response: dict[str, Any]) -> dict[str, Any]:
    """Without ids and times, which are new each time."""
    output = [{k: v for k, v in item.items() if k not in ("id", "call_id")} for item in response["output"]]
    usage = {**response["usage"], "input_tokens_details": None}
    return {**response, "id": None, "created_at": None, "output": output, "usage": usage}


def test_text(client: openai.OpenAI) -> None:
    response = client.responses.create(model=MODEL, input="TEXT", temperature=0)
    assert (response.output_text, response.status, response.error) == ("Hello, world.", "completed", None)
    assert response.usage is not None and response.usage.output_tokens == 5
    assert response.usage.total_tokens == response.usage.input_tokens + 5
    cut = client.responses.create(model=MODEL, input=[{"role": "user", "content": "TEXT"}], max_output_tokens=2)
    assert cut.status == "incomplete" and cut.incomplete_details is not None
    assert cut.incomplete_details.reason == "max_output_tokens"


def test_events_are_in_order_and_make_the_whole(live: Live) -> None:
    both = [WEATHER, {"type": "function", "name": "get_time"}]
    for key, tools in (("TEXT", None), ("THINK", None), ("PLAN", None), ("BOTH", both)):
        events = stream(live, input=key, tools=tools)
        whole = create(live, input=key, tools=tools)
        assert comparable(events[-1]["response"]) == comparable(whole)
        kinds = [event["type"] for event in events]
        assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.completed"
        items: list[dict[str, Any]] = []
        for event in events[2:-1]:
            kind = event["type"].removeprefix("response.")
            if kind == "output_item.added":
                assert event["output_index"] == len(items) and event["item"]["status"] == "in_progress"
                items.append({"said": "", **event["item"]})
            elif kind.endswith(".delta"):
                assert event["item_id"] == items[-1]["id"] and event["output_index"] == len(items) - 1
                items[-1]["said"] += event["delta"]
            elif kind.endswith("text.done"):
                assert event["text"] == items[-1]["said"]
            elif kind == "function_call_arguments.done":
                assert (event["arguments"], event["name"]) == (items[-1]["said"], items[-1]["name"])
            elif kind == "output_item.done":
                item = event["item"]
                assert items[-1]["said"] == (item["arguments"] if "arguments" in item else item["content"][0]["text"])
            else:
                assert kind in ("content_part.added", "content_part.done")
        assert [item["id"] for item in items] == [item["id"] for item in events[-1]["response"]["output"]]


def test_thoughts(live: Live) -> None:
    thought, message = create(live, input="THINK", reasoning={"effort": "high"})["output"]
    assert thought["type"] == "reasoning" and thought["content"][0]["text"] == "Two and two STOP is four"
    assert message["content"][0]["text"] == "The answer STOP is 4"


def test_thoughts_are_where_a_summary_is_asked_for(live: Live) -> None:
    asked: dict[str, Any] = {"input": "THINK", "reasoning": {"effort": "high", "summary": "auto"}}
    events = stream(live, **asked)
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds[2:5] == ["output_item.added", "reasoning_summary_part.added", "reasoning_summary_text.delta"]
    said = "".join(e["delta"] for e in events if e["type"] == "response.reasoning_summary_text.delta")
    thought, message = events[-1]["response"]["output"]
    assert thought["summary"] == [{"type": "summary_text", "text": said}] and thought["content"] == []
    assert said == "Two and two STOP is four" and message["content"][0]["text"] == "The answer STOP is 4"
    whole = create(live, **asked)
    assert comparable(whole) == comparable(events[-1]["response"])
    user = {"role": "user", "content": "THINK"}
    tokens = [
        create(live, input=[user, *items, {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                            {"type": "function_call_output", "call_id": "c", "output": "x"}])["usage"]["input_tokens"]
        for items in ([], [{**thought, "summary": []}], [thought], [{**thought, "content": [
            {"type": "reasoning_text", "text": said}], "summary": []}])
    ]  # fmt: skip
    assert tokens[0] == tokens[1] < tokens[2] == tokens[3]  # a thought before a call is rendered, from either place


def test_a_round_trip_of_a_tool_that_is_gone_on_with(client: openai.OpenAI) -> None:
    tools: Any = [{**WEATHER, "strict": False}]
    first = client.responses.create(model=MODEL, input="WEATHER", tools=tools, temperature=0)
    (call,) = first.output
    assert call.type == "function_call" and json.loads(call.arguments) == {"city": "Paris, France", "days": 3}
    answer: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "sun"}
    done = client.responses.create(model=MODEL, input=[answer], previous_response_id=first.id, temperature=0)
    assert done.output_text == "It is sunny there."
    given: Any = [{"role": "user", "content": "WEATHER"}, call.to_dict(), answer]
    by_hand = client.responses.create(model=MODEL, input=given, store=False, temperature=0)
    assert by_hand.output_text == done.output_text
    assert by_hand.usage is not None and done.usage is not None
    assert by_hand.usage.input_tokens == done.usage.input_tokens  # the very same prompt
    referred: Any = [{"role": "user", "content": "WEATHER"}, {"type": "item_reference", "id": call.id}, answer]
    assert client.responses.create(model=MODEL, input=referred, temperature=0).output_text == done.output_text
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(by_hand.id)


def test_choices_of_tools_and_formats(live: Live) -> None:
    for choice in ("required", {"type": "function", "name": "get_weather"}):
        (call,) = create(live, input="TEXT", tools=[WEATHER], tool_choice=choice)["output"]
        jsonschema.validate(json.loads(call["arguments"]), WEATHER["parameters"])
    none = create(live, input="TEXT", tools=[WEATHER], tool_choice="none")
    assert none["output"][0]["content"][0]["text"] == "Hello, world."
    schema = {"type": "object", "properties": {"city": {"enum": ["Oslo"]}}, "required": ["city"],
              "additionalProperties": False}  # fmt: skip
    form = {"format": {"type": "json_schema", "name": "a", "schema": schema, "strict": True}}
    (message,) = create(live, input="JSON", text=form)["output"]
    assert json.loads(message["content"][0]["text"]) == {"city": "Oslo"}


def test_instructions_come_first_and_are_not_kept(live: Live) -> None:
    first = create(live, input="TEXT", instructions="BE BRIEF, please")
    again = create(live, input="TEXT", previous_response_id=first["id"])
    plain = create(live, input="TEXT")
    tokens = [response["usage"]["input_tokens"] for response in (plain, first, again)]
    assert tokens[0] < tokens[1] and first["instructions"] == "BE BRIEF, please" and again["instructions"] is None
    said = [{"role": "user", "content": "TEXT"}, {"role": "assistant", "content": "Hello, world."},
            {"role": "user", "content": "TEXT"}]  # fmt: skip
    assert tokens[2] == create(live, input=said)["usage"]["input_tokens"]


def test_what_is_kept(live: Live, client: openai.OpenAI) -> None:
    made = create(live, input="TEXT", metadata={"a": "b"})
    assert client.responses.retrieve(made["id"]).to_dict(mode="json") == made
    client.responses.delete(made["id"])
    for missing in (lambda: client.responses.retrieve(made["id"]), lambda: client.responses.delete(made["id"])):
        with pytest.raises(openai.NotFoundError):
            missing()
    refused = live.post(PATH, {"input": "TEXT", "previous_response_id": made["id"]})
    assert (refused.status_code, refused.json()["error"]["param"]) == (404, "previous_response_id")
    with pytest.raises(openai.BadRequestError, match="completed already"):
        client.responses.cancel(create(live, input="TEXT")["id"])


def test_the_oldest_goes_first(live: Live, client: openai.OpenAI) -> None:
    first = create(live, input="TEXT")
    others = [create(live, input="TEXT")["id"] for _ in range(19)]
    client.responses.retrieve(first["id"])  # which makes it the newest
    create(live, input="TEXT")
    assert client.responses.retrieve(first["id"]).id == first["id"]
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(others[0])


def test_no_more_characters_are_kept_than_may_be() -> None:
    with serving(table_pair(), max_stored_characters=1000) as live:

        def created(text: str) -> str:
            made: str = create(live, input=text, max_output_tokens=8)["id"]
            return made

        def statuses(*ids: str) -> list[int]:
            return [live.client.get(f"{PATH}/{each}").status_code for each in ids]

        assert statuses(created("TEXT " + "x" * 400), created("TEXT " + "x" * 700)) == [404, 200]
        assert statuses(created("TEXT " + "x" * 1100)) == [404]


def test_cancel() -> None:
    """From another connection, while the stream goes on."""
    with serving(load_pair()) as live:

        async def cancelled() -> list[dict[str, Any]]:
            body = {"input": "import", "max_output_tokens": 1900, "stream": True, "draft_tokens": 0}
            events: list[dict[str, Any]] = []
            async with (
                httpx.AsyncClient(base_url=live.url, timeout=SECONDS, verify=False) as client,
                client.stream("POST", PATH, json=body) as answer,
            ):
                async for line in answer.aiter_lines():
                    if line.startswith("data: "):
                        events.append(json.loads(line.removeprefix("data: ")))
                        if len(events) == 8:
                            made = await client.post(f"{PATH}/{events[0]['response']['id']}/cancel")
                            assert made.json()["status"] == "cancelled"
            return events

        last = asyncio.run(cancelled())[-1]
        assert (last["type"], last["response"]["status"]) == ("response.incomplete", "cancelled")
        assert live.client.get(f"{PATH}/{last['response']['id']}").json() == last["response"]
        wait_for(live.idle)


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"n": 2}, "n", "not a field"), ({"stop": "x"}, "stop", "not a field"),
    ({"logit_bias": {}}, "logit_bias", "not a f"),
    ({"conversation": "c"}, "conversation", "previous_response_id"), ({"background": True}, "background", "False"),
    ({"truncation": "auto"}, "truncation", "disabled"), ({"top_logprobs": 3}, "top_logprobs", "/v1/chat"),
    ({"include": ["message.output_text.logprobs"]}, "include", "not offered"),
    ({"prompt": {"id": "p"}}, "prompt", "input"),
    ({"tools": [{"type": "web_search"}]}, "tools", "function"),
    ({"tools": [WEATHER, WEATHER]}, "tools", "several tools"),
    ({"reasoning": {"summary": "concise"}}, "reasoning.summary", "auto"),
    ({"input": []}, "input", "1 or more"), ({"input": [{"type": "computer_call"}]}, "input", "must be one of"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input", "no images"),
    ({"input": "word " * 5000}, "input", "maximum context length"),
    ({"max_output_tokens": 0}, "max_output_tokens", "1 or"),
    ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"not": {}}}}}, "text.format", "not"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input", "no such item"),
    ({"model": "x"}, "model", "no model"),
    ({"tools": [{**WEATHER, "name": "a b"}]}, "tools[0].name", "another form"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param", "words"), REFUSED)
def test_what_is_refused(live: Live, fields: dict[str, Any], param: str, words: str) -> None:
    answer = live.post(PATH, {"input": "TEXT", **fields})
    error = answer.json()["error"]
    assert answer.status_code in (400, 404), answer.text
    assert error["param"].startswith(param) and words in error["message"], error
