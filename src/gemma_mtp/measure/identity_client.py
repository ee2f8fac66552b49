"""Asks both sides the same prompts, so many at a time, and finds out where their answers part. Needs httpx."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import httpx

from gemma_mtp.measure.identity import Compared, Output, ScoredToken, parting
from gemma_mtp.measure.load_client import DELTAS
from gemma_mtp.measure.load_requests import Ask, RequestMix

#: alternatives asked for in a token's place, as many as OpenAI's API gives
ALTERNATIVES = 20
COMPLETIONS = "/v1/completions"


@dataclass(frozen=True)
class Side:
    """A server, and what its requests say beside the other side's."""

    client: httpx.AsyncClient
    model: str
    fields: Mapping[str, Any]

    async def ask(self, ask: Ask, timeout: float) -> Output:
        """One answer; a failure is an output with an error."""
        try:
            return output_of(await self._content(ask, {}, timeout))
        except httpx.TimeoutException:
            return Output(error="timeout")
        except httpx.HTTPStatusError as error:
            return Output(error=f"http {error.response.status_code}")
        except httpx.HTTPError:
            return Output(error="connection")
        except (ValueError, LookupError, TypeError, AttributeError):
            return Output(error="protocol")

    async def scored(self, ask: Ask, timeout: float) -> list[ScoredToken] | None:
        """The answer's tokens with log-probabilities; None where the server gives none."""
        plain = ask.path == COMPLETIONS
        asked = {"logprobs": ALTERNATIVES} if plain else {"logprobs": True, "top_logprobs": ALTERNATIVES}
        try:
            return scored_of(await self._content(ask, asked, timeout))
        except (httpx.HTTPError, ValueError, LookupError, TypeError, AttributeError):
            return None

    async def _content(self, ask: Ask, more: Mapping[str, Any], timeout: float) -> Any:
        body = {**ask.body, "model": self.model, **self.fields, **more}
        response = await self.client.post(ask.path, json=body, timeout=timeout)
        response.raise_for_status()
        return response.json()


def output_of(content: Mapping[str, Any]) -> Output:
    """Of an answer's JSON. Raises LookupError, TypeError, ValueError or AttributeError for what is none."""
    (choice, *_) = content["choices"]
    message = choice.get("message")
    text = choice["text"] if message is None else "".join(message.get(name) or "" for name in DELTAS[::-1])
    if message is not None and message.get("tool_calls"):
        text += json.dumps([call["function"] for call in message["tool_calls"]], ensure_ascii=False)
    usage = content.get("usage") or {}
    return Output(str(text), choice.get("finish_reason"), usage.get("prompt_tokens") or 0, _drafts(content, usage))


def _drafts(content: Mapping[str, Any], usage: Mapping[str, Any]) -> int | None:
    """OpenAI's counts of prediction tokens, or llama.cpp's `timings.draft_n`, which is left out without drafts."""
    details = usage.get("completion_tokens_details") or {}
    counts = [details.get(f"{name}_prediction_tokens") for name in ("accepted", "rejected")]
    if any(count is not None for count in counts):
        return sum(count or 0 for count in counts)
    timings = content.get("timings")
    return None if timings is None else timings.get("draft_n", 0)


def scored_of(content: Mapping[str, Any]) -> list[ScoredToken] | None:
    """Of an answer with log-probabilities, in the form of completions or of chats."""
    logprobs = content["choices"][0].get("logprobs")
    if not logprobs:
        return None
    if "tokens" in logprobs:
        rows = zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
        return [ScoredToken(text, logprob, tuple((top or {}).items())) for text, logprob, top in rows]
    return [
        ScoredToken(one["token"], one["logprob"], tuple((top["token"], top["logprob"]) for top in one["top_logprobs"]))
        for one in logprobs["content"]
    ]


async def compare(
    plain: Side,
    drafted: Side,
    mix: RequestMix,
    clients: int,
    repeats: int,
    timeout: float,
    say: Callable[[str], object] = lambda text: None,
) -> list[Compared]:
    """Ask every prompt `repeats` times on both sides, in turn, `clients` at a time; then, one at a time, the plain side
    again for log-probabilities where outputs differ."""
    asks = [mix.ask(0, number) for number in range(len(mix.examples))]
    outputs: dict[int, list[list[Output]]] = {0: [], 1: []}
    for repeat in range(repeats):
        for which in (0, 1) if repeat % 2 == 0 else (1, 0):
            say(f"{clients} at a time, {('plain', 'drafted')[which]}, repetition {repeat + 1} of {repeats}")
            outputs[which].append(await _all((plain, drafted)[which], asks, clients, timeout))
    found = []
    for number, ask in enumerate(asks):
        of_plain, of_drafted = (tuple(of_repeat[number] for of_repeat in outputs[which]) for which in (0, 1))
        found.append(await _parted(Compared(f"{number}", clients, of_plain, of_drafted), plain, ask, timeout))
    return found


async def _parted(one: Compared, plain: Side, ask: Ask, timeout: float) -> Compared:
    differ = one.first_difference
    if one.failed or differ is None:
        return one
    scored = await plain.scored(ask, timeout)
    return replace(one, parting=parting(differ[0].text, differ[1].text, scored))


async def _all(side: Side, asks: Sequence[Ask], clients: int, timeout: float) -> list[Output]:
    slots = asyncio.Semaphore(clients)

    async def one(ask: Ask) -> Output:
        async with slots:
            return await side.ask(ask, timeout)

    return await asyncio.gather(*map(one, asks))
