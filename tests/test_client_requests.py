"""What clients of others send, as `make clients` wrote it down (`recorded_clients`): each request is answered, and
drafted and plain alike."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from live_server import Live
from recorded_clients import REQUESTS, table_server

RECORDED: dict[str, list[dict[str, Any]]] = json.loads(REQUESTS.read_text(encoding="utf-8"))
#: clients whose requests must be there
CLIENTS = {
    "ai_sdk (npm)", "anthropic", "anthropic (npm)", "instructor", "langchain", "litellm[anthropic]",
    "litellm[hosted_vllm]", "litellm[openai]", "litellm_bridges", "llm", "openai (npm)", "openai_agents", "pydantic_ai",
    "pydantic_ai_by_responses", "smolagents",
}  # fmt: skip
#: what is new each time: ids, times, and what was found in the cache or by drafts
NEW = re.compile(
    r'"(?:call|fc|chatcmpl|resp|msg|rs|toolu)_?-?[0-9a-f]{20,}"|"created(?:_at)?":\s?\d+|"(?:cached|cache_read_input|'
    r'input|accepted_prediction|rejected_prediction)_tokens":\s?\d+'
)
GENERATES = ("/v1/chat/completions", "/v1/responses", "/v1/messages")


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with table_server() as live:
        yield live


def test_every_client_is_there() -> None:
    assert set(RECORDED) == CLIENTS and all(RECORDED.values())
    assert {request["path"] for requests in RECORDED.values() for request in requests} >= set(GENERATES)


def content(text: str) -> str:
    """An answer's words; chunks of a stream depend on how fast they are read, so what they say is put together."""
    if not text.startswith(("data: ", "event: ")):
        return NEW.sub("", text)
    parts: dict[str, str] = {}
    for line in text.splitlines():
        if line.startswith("data: {"):
            for name, said in _texts(json.loads(line.removeprefix("data: "))):
                parts[name] = parts.get(name, "") + said
    return json.dumps(parts)


def _texts(event: Any) -> Iterator[tuple[str, str]]:
    """Texts of deltas, by their names."""
    if isinstance(event, dict):
        for name, value in event.items():
            if name in ("content", "reasoning_content", "arguments", "delta", "text", "thinking", "partial_json") and (
                isinstance(value, str) and event.get("type", "").partition(".done")[1] == ""
            ):
                yield name, value
            else:
                yield from _texts(value)
    elif isinstance(event, list):
        for each in event:
            yield from _texts(each)


@pytest.mark.parametrize("client", sorted(CLIENTS))
def test_recorded_requests(live: Live, client: str) -> None:
    for request in RECORDED[client]:
        path, body = request["path"], request["body"]
        if path not in GENERATES:
            assert live.post(path, body).status_code == 200
            continue
        drafted, plain = (live.post(path, {**body, "draft_tokens": drafts, "seed": 1}) for drafts in (4, 0))
        assert drafted.status_code == 200, (path, drafted.text)
        assert content(drafted.text) == content(plain.text), path
        assert '"error": {' not in drafted.text and '"error":{' not in drafted.text
