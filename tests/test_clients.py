"""Clients of others, unchanged, talk to the server: `make clients` installs them into build/clients and runs these."""

import asyncio
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
from live_server import Live, serving
from recorded_clients import BUILD, CALLED, MODEL, python_clients_server, recorded

from gemma_mtp.decoding.params import SamplingParams
from gemma_mtp.engine.pair import Pair

pytestmark = pytest.mark.clients
LM_EVAL = BUILD / "lm-eval"  # without what it needs for its tasks


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with python_clients_server() as live:
        yield live


@pytest.fixture
def live(server: Live, request: pytest.FixtureRequest) -> Iterator[Live]:
    with recorded(server, request.node.name.removeprefix("test_")):
        yield server


def test_langchain(live: Live) -> None:
    tools: Any = import_module("langchain_core.tools")
    openai: Any = import_module("langchain_openai")

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
    ai: Any = import_module("pydantic_ai")
    models: Any = import_module("pydantic_ai.models.openai")
    providers: Any = import_module("pydantic_ai.providers.openai")
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
    instructor: Any = import_module("instructor")
    openai: Any = import_module("openai")
    pydantic: Any = import_module("pydantic")
    get_weather = pydantic.create_model("get_weather", city=(str, ...), days=(int, ...))
    client = instructor.from_openai(openai.OpenAI(base_url=f"{live.url}/v1", api_key="none"))
    made = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "WEATHER"}], response_model=get_weather, temperature=0
    )
    assert made.model_dump() == CALLED


def get_weather(city: str, days: int) -> str:
    """The weather."""
    return "sun" if {"city": city, "days": days} == CALLED else "unknown"


def test_pydantic_ai_by_responses(live: Live) -> None:
    ai: Any = import_module("pydantic_ai")
    models: Any = import_module("pydantic_ai.models.openai")
    providers: Any = import_module("pydantic_ai.providers.openai")
    provider = providers.OpenAIProvider(base_url=f"{live.url}/v1", api_key="none")
    model = models.OpenAIResponsesModel(MODEL, provider=provider)
    agent: Any = ai.Agent(model, model_settings={"temperature": 0}, tools=[get_weather])
    assert agent.run_sync("WEATHER").output == "It is sunny there."


def test_openai_agents(live: Live) -> None:
    """Its default, which is the route of responses, whole and streamed."""
    agents: Any = import_module("agents")
    openai: Any = import_module("openai")
    agents.set_tracing_disabled(True)
    client = openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none")
    model = agents.OpenAIResponsesModel(model=MODEL, openai_client=client)
    tool = agents.function_tool(get_weather, strict_mode=False)
    agent = agents.Agent(name="a", model=model, tools=[tool], model_settings=agents.ModelSettings(temperature=0))

    async def streamed() -> tuple[list[str], str]:
        run = agents.Runner.run_streamed(agent, "WEATHER")
        kinds = [event.data.type async for event in run.stream_events() if event.type == "raw_response_event"]
        return kinds, run.final_output

    async def both() -> None:
        assert (await agents.Runner.run(agent, "WEATHER")).final_output == "It is sunny there."
        kinds, output = await streamed()
        assert output == "It is sunny there." and kinds.count("response.completed") == 2

    asyncio.run(both())


def test_anthropic(live: Live) -> None:
    anthropic: Any = import_module("anthropic")
    client = anthropic.Anthropic(base_url=live.url, api_key="none", max_retries=0)
    tool = {"name": "get_weather", "input_schema": {"type": "object"}}
    body: dict[str, Any] = {"model": MODEL, "max_tokens": 2000, "extra_body": {"temperature": 0}}
    asked = [{"role": "user", "content": "WEATHER"}]
    message = client.messages.create(messages=asked, tools=[tool], **body)
    assert message.stop_reason == "tool_use" and message.content[0].input == CALLED
    answer = {"type": "tool_result", "tool_use_id": message.content[0].id, "content": "sun"}
    turns = [*asked, {"role": "assistant", "content": message.content}, {"role": "user", "content": [answer]}]
    with client.messages.stream(messages=turns, tools=[tool], **body) as stream:
        assert "".join(stream.text_stream) == "It is sunny there."
    thinking = {"type": "enabled", "budget_tokens": 1024}
    with client.messages.stream(messages=[{"role": "user", "content": "THINK"}], thinking=thinking, **body) as stream:
        thought, text = stream.get_final_message().content
    assert (thought.thinking, text.text) == ("Two and two STOP is four", "The answer STOP is 4")
    counted = client.messages.count_tokens(model=MODEL, messages=asked)
    assert counted.input_tokens == client.messages.count_tokens(model=MODEL, messages=asked, system="").input_tokens > 0
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(messages=asked, **{**body, "model": "claude"})


def test_lm_eval(pair: Pair) -> None:
    """Its own class for such servers, with the server's tokenizer: log-likelihoods are those of a direct run."""
    sys.path.append(str(LM_EVAL))
    completions: Any = import_module("lm_eval.models.openai_completions")
    instances: Any = import_module("lm_eval.api.instance")
    with serving(pair) as live:
        model = completions.LocalCompletionsAPI(
            base_url=f"{live.url}/v1/completions", model=MODEL, tokenizer_backend="remote", tokenized_requests=True,
            batch_size=4,
        )  # fmt: skip
        pairs = [("import os", "\nimport sys\n"), ("for i in range(3):", "\n    print(i)\n"), ("x = 1", "\ny = é\n")]
        requests = [
            instances.Instance("loglikelihood", doc={}, arguments=arguments, idx=i) for i, arguments in enumerate(pairs)
        ]
        found = model.loglikelihood(requests)
    tokenizer = pair.tokenizer
    assert tokenizer is not None
    for (context, continuation), (logprob, greedy) in zip(pairs, found, strict=True):
        ids = [tokenizer.encode(text, special=False) for text in (context, context + continuation)]
        scores = pair.generate(ids[1], SamplingParams(max_tokens=0, prompt_logprobs=0)).prompt_logprobs
        assert scores is not None
        wanted = scores[len(ids[0]) - 1 :]
        assert logprob == pytest.approx(sum(entry.logprob for entry in wanted), abs=1e-4)
        assert greedy == all(entry.rank == 1 for entry in wanted)
