"""The official client works unchanged, in both its forms."""

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from live_server import SECONDS, Live, serving
from openai.types.chat import ChatCompletionMessageParam
from pydantic import BaseModel
from table_models import QUOTE, SCRIPTS, table_pair

from gemma_mtp.decoding.params import SamplingParams
from gemma_mtp.engine.pair import Pair

MODEL, KEY, PROMPT = "gemma-mtp-bundled", "a-key", "def add(a, b):\n"


@pytest.fixture(scope="module")
def live(pair: Pair) -> Iterator[Live]:
    with serving(pair, api_keys=(KEY,)) as live:
        yield live


@pytest.fixture(scope="module")
def client(live: Live) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key=KEY, timeout=SECONDS, max_retries=0)


def test_completions(client: openai.OpenAI, pair: Pair) -> None:
    expected = pair.generate(PROMPT, SamplingParams(max_tokens=12, logprobs=1), draft_tokens=3)
    answer = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=12, temperature=0, logprobs=1, extra_body={"draft_tokens": 3}
    )
    assert answer.choices[0].text == expected.text and answer.choices[0].finish_reason == "length"
    assert answer.choices[0].logprobs is not None and answer.choices[0].logprobs.tokens is not None
    assert len(answer.choices[0].logprobs.tokens) == 12
    assert answer.usage is not None and answer.usage.completion_tokens_details is not None
    assert answer.usage.completion_tokens_details.accepted_prediction_tokens == expected.accepted


def test_streamed_completions(client: openai.OpenAI, pair: Pair) -> None:
    expected = pair.generate(PROMPT, SamplingParams(max_tokens=12))
    stream = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=12, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == expected.text


def test_chat(client: openai.OpenAI, pair: Pair) -> None:
    assert pair.tokenizer is not None
    text = pair.tokenizer.apply_chat_template([{"role": "user", "content": "hello"}])
    expected = pair.generate(text, SamplingParams(max_tokens=10, temperature=1.0, seed=3))
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "hello"}], max_completion_tokens=10, seed=3, logprobs=True,
        top_logprobs=2, response_format={"type": "text"}, prediction={"type": "content", "content": "hello"},
    )  # fmt: skip
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].logprobs is not None and answer.choices[0].logprobs.content is not None
    assert len(answer.choices[0].logprobs.content) == len(expected.token_ids)
    chunks = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "hello"}], max_completion_tokens=10, seed=3, stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected.text


def test_the_async_client_streams(live: Live, pair: Pair) -> None:
    expected = pair.generate(PROMPT, SamplingParams(max_tokens=12))

    async def ask() -> tuple[str, int, str]:
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key=KEY, timeout=SECONDS) as client:
            text, total = "", 0
            stream = await client.completions.create(
                model=MODEL, prompt=PROMPT, max_tokens=12, temperature=0, stream=True,
                stream_options={"include_usage": True},
            )  # fmt: skip
            async for chunk in stream:
                text += "".join(choice.text for choice in chunk.choices)
                total += chunk.usage.total_tokens if chunk.usage else 0
            chat = await client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": "hello"}], max_tokens=4, n=2
            )
            return text, total, chat.choices[1].message.role

    text, total, role = asyncio.run(ask())
    assert (text, total, role) == (expected.text, len(expected.prompt_token_ids) + 12, "assistant")


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "gemma-mtp"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("org/other")


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model=MODEL, prompt="a", max_tokens=0)
    assert bad.value.param == "max_tokens" and bad.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-4", prompt="a")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="another").models.list()


class GetWeather(BaseModel):
    """The weather of a city."""

    city: str
    days: int


@pytest.fixture(scope="module")
def tools_client() -> Iterator[openai.OpenAI]:
    """A client of a model that calls tools and thinks, of which GetWeather may be called."""
    script = ["<|tool_call>", "call:GetWeather{", "city:", QUOTE, "Paris", ", France", QUOTE, ",days", ":3}",
              "<tool_call|>", "<|tool_response>"]  # fmt: skip
    with serving(table_pair(scripts={**SCRIPTS, "WEATHER": script}), api_keys=(KEY,)) as live:
        yield openai.OpenAI(base_url=f"{live.url}/v1", api_key=KEY, timeout=SECONDS, max_retries=0)


def asked(key: str) -> list[ChatCompletionMessageParam]:
    return [{"role": "user", "content": key}]


def test_tools_make_a_round_trip(tools_client: openai.OpenAI) -> None:
    tool = openai.pydantic_function_tool(GetWeather)
    first = tools_client.chat.completions.parse(model=MODEL, messages=asked("WEATHER"), tools=[tool], temperature=0)
    message = first.choices[0].message
    assert first.choices[0].finish_reason == "tool_calls" and message.tool_calls
    arguments = message.tool_calls[0].function.parsed_arguments
    assert isinstance(arguments, GetWeather) and arguments == GetWeather(city="Paris, France", days=3)
    answer = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sun"}
    messages: Any = [*asked("WEATHER"), message.model_dump(exclude_none=True), answer]
    last = tools_client.chat.completions.create(model=MODEL, messages=messages, tools=[tool], temperature=0)
    assert last.choices[0].message.content == "It is sunny there."


def test_tools_are_streamed(tools_client: openai.OpenAI) -> None:
    tool = openai.pydantic_function_tool(GetWeather)
    with tools_client.chat.completions.stream(
        model=MODEL,
        messages=asked("WEATHER"),
        tools=[tool],
        temperature=0,
        extra_body={"draft_tokens": 2, "stream_options": {"include_rounds": True}},
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert kinds.count("tool_calls.function.arguments.delta") >= 2
    calls = final.choices[0].message.tool_calls
    assert calls and calls[0].function.parsed_arguments == GetWeather(city="Paris, France", days=3)


def test_thoughts_are_fields_of_their_own(tools_client: openai.OpenAI) -> None:
    answer = tools_client.chat.completions.create(
        model=MODEL, messages=asked("THINK"), temperature=0, reasoning_effort="high"
    )
    message: Any = answer.choices[0].message
    assert message.content == "The answer STOP is 4" and message.reasoning_content == "Two and two STOP is four"
    assert answer.usage is not None and answer.usage.completion_tokens_details is not None
    assert answer.usage.completion_tokens_details.reasoning_tokens == 6
    chunks = tools_client.chat.completions.create(model=MODEL, messages=asked("THINK"), temperature=0, stream=True)
    deltas: list[Any] = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(getattr(delta, "reasoning", "") for delta in deltas) == "Two and two STOP is four"
    assert "".join(delta.content or "" for delta in deltas) == "The answer STOP is 4"
