"""Streams answers from a server with OpenAI's API and times them. Needs httpx and httpx-aiohttp: the `bench-serve`
extra. aiohttp reads HTTP in half the time that httpx's own transport takes, which a server on the same cores lacks."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any

import httpx
from httpx_aiohttp import AiohttpTransport

from gemma_mtp.errors import ServerError
from gemma_mtp.measure.load import Reply
from gemma_mtp.measure.load_requests import Ask

TOO_MANY = 429
#: where a chat's chunk has text: the answer, and the names that servers give to thinking text
DELTAS = ("content", "reasoning_content", "reasoning")


def connect(
    url: str, api_key: str | None = None, transport: httpx.AsyncBaseTransport | None = None, option: str = "--url"
) -> httpx.AsyncClient:
    """A client without limits of its own on connections or time. `option` is what errors call the address.

    Raises ServerError where `url` is no address, and for a key that no header can carry.
    """
    root = url.rstrip("/").removesuffix("/v1")
    if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
        raise ServerError("--api-key has a character that no HTTP header can carry; give it in printable ASCII.")
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    try:
        parsed = httpx.URL(root)
    except httpx.InvalidURL:
        parsed = httpx.URL("")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ServerError(f"{option} is {url!r}, but must be a server's address, such as http://127.0.0.1:8000.")
    if transport is None:
        transport = AiohttpTransport(trust_env=False, limits=httpx.Limits(max_connections=0))  # 0: no limit
    return httpx.AsyncClient(base_url=parsed, headers=headers, timeout=None, transport=transport, trust_env=False)


async def first_model(client: httpx.AsyncClient) -> str:
    """The first model a server lists. Raises ServerError where it can not be reached or lists none."""
    content = await _read(client, "GET", "/v1/models")
    try:
        name = content["data"][0]["id"]
    except (LookupError, TypeError):
        raise ServerError(f"{client.base_url} lists no model at /v1/models; name one by --model.") from None
    return str(name)


async def shared_prefix(client: httpx.AsyncClient, model: str, text: str, tokens: int) -> str:
    """The beginning of `text`, repeated as often as needed, that has about so many tokens in the server's own count.

    Raises ServerError where the server has no /tokenize and /detokenize.
    """
    ids: list[int] = []
    while len(ids) < tokens:
        content = await _read(client, "POST", "/tokenize", {"model": model, "prompt": text})
        if not isinstance(ids := content.get("tokens", []), list) or not ids:
            raise ServerError("the server's /tokenize gives no tokens, which --shared-prefix-tokens needs.")
        text += text
    content = await _read(client, "POST", "/detokenize", {"model": model, "tokens": ids[:tokens]})
    return str(content["prompt"])


async def _read(client: httpx.AsyncClient, method: str, path: str, body: Any = None) -> dict[str, Any]:
    address = f"{client.base_url}".rstrip("/") + path
    try:
        response = await client.request(method, path, json=body, timeout=30.0)
        response.raise_for_status()
        content = response.json()
    except httpx.HTTPStatusError as error:
        raise ServerError(
            f"{address} answered with status {error.response.status_code};"
            " check the address and --api-key, and whether the server has this route."
        ) from None
    except httpx.HTTPError as error:
        said = str(error) or type(error).__name__
        raise ServerError(f"{address} can not be reached ({said}); start the server, or check the address.") from None
    except ValueError:
        raise ServerError(f"{address} did not answer with JSON; check the address.") from None
    if not isinstance(content, dict):
        raise ServerError(f"{address} did not answer with a JSON object; check the address.")
    return content


async def stream(client: httpx.AsyncClient, ask: Ask, timeout: float | None = None) -> Reply:
    """Send one request and read its answer to the end. Failures are replies whose `error` is the kind:

    "http STATUS", "connection" (refused or broken), "timeout" (after `timeout` seconds in all), "error event" (an
    error in the stream), "protocol" (no usage, no [DONE], or not JSON).
    """
    times: list[float] = []
    try:
        async with asyncio.timeout(timeout):
            return replace(await _stream(client, ask, times), chunk_times=tuple(times))
    except TimeoutError:
        return Reply(tuple(times), error="timeout")
    except httpx.TransportError:
        return Reply(tuple(times), error="connection")


async def _stream(client: httpx.AsyncClient, ask: Ask, times: list[float]) -> Reply:
    body = {**ask.body, "stream": True, "stream_options": {"include_usage": True}}
    usage: Mapping[str, Any] | None = None
    async with client.stream("POST", ask.path, json=body) as response:
        if response.status_code != httpx.codes.OK:
            return _refusal(response)
        try:
            async for event in _events(response):
                if event.get("error"):
                    return Reply(error="error event")
                if _has_text(event):
                    times.append(asyncio.get_running_loop().time())
                usage = event.get("usage") or usage
        except (ValueError, LookupError, AttributeError, TypeError):
            return Reply(error="protocol")
    return Reply(error="protocol") if usage is None else reply_of(usage)


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The JSON objects of a stream of server-sent events. Raises ValueError for another, or without [DONE]."""
    async for line in response.aiter_lines():
        if line.startswith("data:"):
            data = line.removeprefix("data:").strip()
            if data == "[DONE]":
                return
            yield json.loads(data)
    raise ValueError("the stream ended without [DONE]")


def _has_text(event: Mapping[str, Any]) -> bool:
    return any(
        choice.get("text") or any((choice.get("delta") or {}).get(name) for name in DELTAS)
        for choice in event.get("choices") or ()
    )


def _refusal(response: httpx.Response) -> Reply:
    """Of a status that is not 200; Retry-After in seconds, as servers of this API give it."""
    wait = response.headers.get("retry-after", "")
    known = response.status_code == TOO_MANY and wait.replace(".", "", 1).isdecimal()
    return Reply(error=f"http {response.status_code}", retry_after=float(wait) if known else None)


def reply_of(usage: Mapping[str, Any]) -> Reply:
    """The counts of a `usage` object."""
    prompt, output = (usage.get(f"{name}_tokens_details") or {} for name in ("prompt", "completion"))
    return Reply(
        prompt_tokens=usage.get("prompt_tokens") or 0,
        output_tokens=usage.get("completion_tokens") or 0,
        cached_tokens=prompt.get("cached_tokens") or 0,
        accepted_drafts=output.get("accepted_prediction_tokens") or 0,
        rejected_drafts=output.get("rejected_prediction_tokens") or 0,
    )
