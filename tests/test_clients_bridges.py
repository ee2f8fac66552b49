"""Clients that speak several servers' languages, and agents, unchanged: litellm, llm and smolagents (see
`test_clients.py`)."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from live_server import SECONDS, Live
from recorded_clients import ANSWER, CALLED, CLIENTS, MODEL, SUNNY, THOUGHT, python_clients_server, recorded

pytestmark = pytest.mark.clients
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
              "required": ["city", "days"]}  # fmt: skip
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "The weather.",
                                         "parameters": PARAMETERS}}  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with python_clients_server() as live:
        yield live


@pytest.fixture
def live(server: Live, request: pytest.FixtureRequest) -> Iterator[Live]:
    with recorded(server, request.node.name.removeprefix("test_")):
        yield server


@pytest.fixture(scope="module")
def litellm() -> Any:
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it looks for a list of prices
    return import_module("litellm")


#: its names of servers of this kind, and what they add to our address
PROVIDERS = {"openai": "/v1", "hosted_vllm": "/v1", "anthropic": ""}


def at(live: Live, provider: str) -> dict[str, Any]:
    url = f"{live.url}{PROVIDERS[provider]}"
    return {"model": f"{provider}/{MODEL}", "api_base": url, "api_key": "none", "temperature": 0, "max_tokens": 200}


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_litellm(live: Live, litellm: Any, provider: str) -> None:
    there = at(live, provider)
    first = litellm.completion(messages=said("WEATHER"), tools=[TOOL], **there).choices[0]
    (call,) = first.message.tool_calls
    assert json.loads(call.function.arguments) == CALLED and first.finish_reason == "tool_calls"
    answer = {"role": "tool", "tool_call_id": call.id, "content": "sun"}
    turns = [*said("WEATHER"), first.message.model_dump(exclude_none=True), answer]
    assert litellm.completion(messages=turns, tools=[TOOL], **there).choices[0].message.content == SUNNY
    chunks = list(litellm.completion(messages=said("WEATHER"), tools=[TOOL], stream=True, **there))
    whole = litellm.stream_chunk_builder(chunks).choices[0].message
    assert json.loads(whole.tool_calls[0].function.arguments) == CALLED
    thought = litellm.completion(messages=said("THINK"), **there).choices[0].message
    assert (thought.reasoning_content, thought.content) == (THOUGHT, ANSWER)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_litellm_knows_a_prompt_that_is_too_long(live: Live, litellm: Any, provider: str, stream: bool) -> None:
    with pytest.raises(litellm.ContextWindowExceededError, match="maximum context length"):
        litellm.completion(messages=said("word " * 5000), stream=stream, **at(live, provider))


def test_litellm_bridges(live: Live, litellm: Any) -> None:
    """To `/v1/responses`, and from Anthropic's form to each of the routes."""
    there = at(live, "openai")
    tool = {"type": "function", "name": "get_weather", "parameters": PARAMETERS}
    own = {name: value for name, value in there.items() if name != "max_tokens"}
    (call,) = litellm.responses(input="WEATHER", tools=[tool], **own).output
    assert json.loads(call.arguments) == CALLED
    events = [event.type for event in litellm.responses(input="TEXT", stream=True, **own)]
    assert events[-1] == "response.completed"
    create = import_module("litellm.anthropic_interface").messages.acreate
    asked = {"messages": said("WEATHER"), "tools": [{"name": "get_weather", "input_schema": PARAMETERS}]}
    for provider in PROVIDERS:
        made = asyncio.run(create(**asked, **at(live, provider)))
        assert made["content"][-1]["input"] == CALLED and made["stop_reason"] == "tool_use"


def test_llm(live: Live, tmp_path: Path) -> None:
    """Its command, with tools and with a schema."""
    model = {"model_id": "gemma", "model_name": MODEL, "api_base": f"{live.url}/v1", "supports_tools": True,
             "supports_schema": True}  # fmt: skip
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([model]), encoding="utf-8")
    paths = [str(CLIENTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "LLM_USER_PATH": str(tmp_path), "PYTHONPATH": os.pathsep.join(paths), "OPENAI_API_KEY": "none"}

    def run(*args: str) -> str:
        command = [sys.executable, "-m", "llm", "-m", "gemma", "--no-log", *args]
        ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=SECONDS)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    function = "def get_weather(city: str, days: int) -> str:\n    'The weather.'\n    return f'{city} {days}'\n"
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"],
              "additionalProperties": False}  # fmt: skip
    for streamed in ([], ["--no-stream"]):
        assert run("TEXT", *streamed) == "Hello, world.\n"
        assert run("WEATHER", "--functions", function, *streamed) == f"{SUNNY}\n"
        assert json.loads(run("JSON", "--schema", json.dumps(schema), *streamed)) == {"city": "Oslo"}


def test_smolagents(live: Live) -> None:
    """Its agent that calls tools, which asks for a call each time; one step of it."""
    smolagents = import_module("smolagents")
    called = []

    def get_weather(city: str, days: int) -> str:
        """The weather.

        Args:
            city: Where.
            days: How many.
        """
        called.append({"city": city, "days": days})
        return "sun"

    model = smolagents.OpenAIServerModel(model_id=MODEL, api_base=f"{live.url}/v1", api_key="none", temperature=0)
    for streamed in (False, True):
        agent = smolagents.ToolCallingAgent(
            tools=[smolagents.tool(get_weather)], model=model, max_steps=1, verbosity_level=0, stream_outputs=streamed
        )
        agent.prompt_templates["system_prompt"] = "Call tools."  # the table's model counts all words alike
        agent.run("WEATHER")
    assert called == [CALLED, CALLED]
