"""Clients of others, unchanged, talk to the server: `make clients` installs them into build/clients and runs these."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live_server import Live, serving
from table_models import QUOTE, SCRIPTS, table_pair

pytestmark = pytest.mark.clients
CLIENTS = Path(__file__).parents[1] / "build" / "clients"
MODEL, CALLED = "gemma-mtp-bundled", {"city": "Paris, France", "days": 3}


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    assert CLIENTS.is_dir(), "run `make clients`"
    sys.path.append(str(CLIENTS))  # after our own packages, which stay
    script = ["<|tool_call>", "call:get_weather{", "city:", QUOTE, "Paris", ", France", QUOTE, ",days", ":3}",
              "<tool_call|>", "<|tool_response>"]  # fmt: skip
    scripts = {name: pieces for name, pieces in SCRIPTS.items() if name != "BOTH"}  # which begins a call otherwise
    with serving(table_pair(scripts={**scripts, "WEATHER": script})) as live:
        yield live


def test_langchain(live: Live) -> None:
    tools: Any = pytest.importorskip("langchain_core.tools")
    openai: Any = pytest.importorskip("langchain_openai")

    def get_weather(city: str, days: int) -> str:
        """The weather."""
        return f"{city}: sun for {days} days"

    model = openai.ChatOpenAI(base_url=f"{live.url}/v1", api_key="none", model=MODEL, temperature=0)
    bound = model.bind_tools([tools.tool(get_weather)])
    (call,) = bound.invoke("WEATHER").tool_calls
    assert (call["name"], call["args"]) == ("get_weather", CALLED)
    whole: Any = None
    for chunk in bound.stream("WEATHER"):
        whole = chunk if whole is None else whole + chunk
    assert whole.tool_calls[0]["args"] == CALLED
    assert model.invoke("TEXT").content == "Hello, world."
    with pytest.raises(Exception, match="maximum context length") as too_long:
        model.invoke("word " * 5000)
    assert type(too_long.value).__name__ == "OpenAIContextOverflowError"


def test_pydantic_ai(live: Live) -> None:
    ai: Any = pytest.importorskip("pydantic_ai")
    models: Any = pytest.importorskip("pydantic_ai.models.openai")
    providers: Any = pytest.importorskip("pydantic_ai.providers.openai")
    provider = providers.OpenAIProvider(base_url=f"{live.url}/v1", api_key="none")
    agent: Any = ai.Agent(models.OpenAIChatModel(MODEL, provider=provider), model_settings={"temperature": 0})
    called = []

    def get_weather(city: str, days: int) -> str:
        """The weather."""
        called.append({"city": city, "days": days})
        return "sun"

    agent.tool_plain(get_weather)
    assert agent.run_sync("WEATHER").output == "It is sunny there." and called == [CALLED]


def test_instructor(live: Live) -> None:
    instructor: Any = pytest.importorskip("instructor")
    openai: Any = pytest.importorskip("openai")
    pydantic: Any = pytest.importorskip("pydantic")
    get_weather = pydantic.create_model("get_weather", city=(str, ...), days=(int, ...))
    client = instructor.from_openai(openai.OpenAI(base_url=f"{live.url}/v1", api_key="none"))
    made = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "WEATHER"}], response_model=get_weather, temperature=0
    )
    assert made.model_dump() == CALLED
