"""JSON by a schema over HTTP, many at once and drafted: all of it is valid, and the same bytes as undrafted."""

import asyncio
import json
from typing import Any

import httpx
import jsonschema
import pytest
from live_server import SECONDS, serving
from table_models import table_pair

#: short enough that every output is whole
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6}, "n": {"type": "integer", "minimum": -50, "maximum": 5000},
        "kind": {"enum": ["a", "b", "some other one"]}, "ok": {"type": ["boolean", "null"]},
        "list": {"type": "array", "items": {"type": "string", "pattern": "^[a-f]{1,3}$"}, "maxItems": 3},
    },
    "required": ["name", "n", "kind", "ok", "list"], "additionalProperties": False, "x-guidance": {
        "whitespace_flexible": False
    },
}  # fmt: skip
FORM = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}


def play(count: int, at_once: int) -> None:
    """`count` outputs, drafted and plain. At a high temperature every token that is allowed comes."""
    bodies = [
        {"messages": [{"role": "user", "content": "JSON"}], "response_format": FORM, "max_tokens": 400, "seed": seed,
         "temperature": (0.0, 1.0, 30.0)[seed % 3]}
        for seed in range(count)
    ]  # fmt: skip
    with serving(table_pair("half")) as live:

        async def all_of(draft_tokens: int) -> list[str]:
            limit = asyncio.Semaphore(at_once)
            async with httpx.AsyncClient(base_url=live.url, timeout=SECONDS, verify=False) as client:

                async def one(body: dict[str, Any]) -> str:
                    async with limit:
                        answer = await client.post("/v1/chat/completions", json={**body, "draft_tokens": draft_tokens})
                    choice = answer.json()["choices"][0]
                    assert choice["finish_reason"] == "stop"
                    text: str = choice["message"]["content"]
                    return text

                return list(await asyncio.gather(*map(one, bodies)))

        drafted, plain = asyncio.run(all_of(4)), asyncio.run(all_of(0))
        stats = live.service.engine.stats()
    for text in drafted:
        jsonschema.validate(json.loads(text), SCHEMA)
    assert drafted == plain and stats.draft_tokens > stats.accepted_tokens > 0
    assert len(set(drafted)) > count // 2


@pytest.mark.parametrize("at_once", [1, 32])
def test_a_share(at_once: int) -> None:
    play(max(5, at_once), at_once)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "at_once"), [(400, 1), (800, 8), (800, 32)])
def test_two_thousand(count: int, at_once: int) -> None:
    play(count, at_once)
