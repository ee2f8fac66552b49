"""The official client works unchanged, in both its forms."""

import asyncio
from collections.abc import Iterator

import openai
import pytest
from live_server import SECONDS, Live, serving

from gemma_mtp.decoding.sampling import SamplingParams
from gemma_mtp.engine.pair import Pair, load_pair

MODEL, KEY, PROMPT = "gemma-mtp-bundled", "a-key", "def add(a, b):\n"


@pytest.fixture(scope="module")
def pair() -> Pair:
    return load_pair()


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


def test_errors_are_the_clients_own(client: openai.OpenAI, live: Live) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model=MODEL, prompt="a", max_tokens=0)
    assert bad.value.param == "max_tokens" and bad.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-4", prompt="a")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="another").models.list()
