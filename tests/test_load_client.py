"""Streamed answers and every way in which they fail, at times that the test sets; requests; a server started here."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_server import DONE, USAGE, USAGE_EVENT, Body, answer, event, served, text_event, transport
from virtual_time import run

from gemma_mtp.datasets import Example, read_examples
from gemma_mtp.errors import ServerError
from gemma_mtp.measure.load import Extent, OpenLoop, Reply, run_load
from gemma_mtp.measure.load_client import connect, first_model, shared_prefix, stream
from gemma_mtp.measure.load_requests import Ask, RequestMix
from gemma_mtp.measure.load_server import OwnServer
from gemma_mtp.measure.load_stats import summarise

Handler = Callable[[httpx.Request], Awaitable[httpx.Response]]
ASK = Ask("/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": 5})
REPLY = Reply((), 9, 5, 3, 2, 1)


def asked(response: httpx.Response | Exception, ask: Ask = ASK, timeout: float | None = None) -> Reply:
    async def handler(request: httpx.Request) -> httpx.Response:
        if isinstance(response, Exception):
            raise response
        return response

    async def main() -> Reply:
        async with connect("http://fake", transport=transport(handler)) as client:
            return await stream(client, ask, timeout)

    return run(main())


def body(*parts: tuple[float, bytes | Exception]) -> httpx.Response:
    return httpx.Response(200, stream=Body(*parts))


def test_chunks_are_timed_and_the_usage_is_taken() -> None:
    assert asked(answer(1.5, 0.25)) == replace(REPLY, chunk_times=(1.5, 1.75, 2.0))


def test_the_request_is_what_was_asked_and_streams() -> None:
    seen: list[httpx.Request] = []

    async def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return answer(0.0)

    async def main() -> None:
        for key in ("secret", None):
            async with connect("http://fake:1/v1/", key, transport(handler)) as client:
                await stream(client, ASK)

    run(main())
    assert [str(request.url) for request in seen] == ["http://fake:1/v1/completions"] * 2
    assert json.loads(seen[0].content) == {**ASK.body, "stream": True, "stream_options": {"include_usage": True}}
    assert [request.headers.get("authorization") for request in seen] == ["Bearer secret", None]


def test_chunks_without_text_do_not_count_as_tokens() -> None:
    """The role that begins a chat, the finish reason, comments, and usage beside text."""
    chat: list[dict[str, Any]] = [
        {"role": "assistant", "content": ""},
        {"content": "a"},
        {"reasoning_content": "b"},
        {},
    ]
    parts = [(1.0, event({"choices": [{"delta": delta}]})) for delta in chat]
    found = asked(body(*parts, (1.0, b": waiting\n\n"), (0.0, USAGE_EVENT), (0.0, DONE)))
    assert found == replace(REPLY, chunk_times=(2.0, 3.0))
    beside = event({"choices": [{"text": "a"}], "usage": USAGE})
    assert asked(body((1.0, beside), (0.0, DONE))) == replace(REPLY, chunk_times=(1.0,))


def test_events_may_come_in_pieces_and_usage_without_details() -> None:
    whole = text_event("é") + event({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2}}) + DONE
    pieces = [(1.0, whole[i : i + 7]) for i in range(0, len(whole), 7)]
    found = asked(body(*pieces))
    assert (found.error, found.prompt_tokens, found.output_tokens, found.accepted_drafts) == (None, 1, 2, 0)
    assert len(found.chunk_times) == 1


@pytest.mark.parametrize(
    ("response", "kind", "chunks"),
    [
        (httpx.Response(500), "http 500", 0),
        (httpx.Response(401, json={"error": {}}), "http 401", 0),
        (httpx.Response(429), "http 429", 0),
        (httpx.ConnectError("refused"), "connection", 0),
        (body((1.0, text_event("a")), (1.0, httpx.ReadError("reset"))), "connection", 1),
        (body((1.0, text_event("a")), (1.0, USAGE_EVENT)), "protocol", 1),
        (body((1.0, text_event("a")), (1.0, DONE)), "protocol", 1),
        (body((1.0, event("{oops")), (1.0, DONE)), "protocol", 0),
        (body((1.0, event("[1]")), (1.0, DONE)), "protocol", 0),
        (body((1.0, event({"choices": 3})), (1.0, DONE)), "protocol", 0),
        (body((1.0, text_event("a")), (1.0, event({"error": {"message": "x"}}))), "error event", 1),
        (body((1.0, text_event("a")), (9.0, text_event("b"))), "timeout", 1),
        (body((10.5, text_event("a"))), "timeout", 0),
    ],
)
def test_failures_by_kind(response: httpx.Response | Exception, kind: str, chunks: int) -> None:
    found = asked(response, timeout=10.0)
    assert (found.error, found.retry_after, len(found.chunk_times)) == (kind, None, chunks)


@pytest.mark.parametrize(
    ("status", "wait", "expected"), [(429, "3", 3.0), (429, "0.5", 0.5), (429, "soon", None), (503, "3", None)]
)
def test_a_refusal_says_how_long_to_wait(status: int, wait: str, expected: float | None) -> None:
    found = asked(httpx.Response(status, headers={"Retry-After": wait}))
    assert (found.error, found.retry_after) == (f"http {status}", expected)


def test_a_whole_load_over_http_has_the_latencies_of_its_server() -> None:
    """Answers take 0.2 s to the first token and 0.1 s to each later chunk; every fifth request fails or is refused."""
    numbers = iter(range(100))

    async def handler(request: httpx.Request) -> httpx.Response:
        number = next(numbers)
        if number % 10 == 4:
            return httpx.Response(500)
        if number % 10 == 9:
            return httpx.Response(429, headers={"Retry-After": "1"})
        return answer(0.2 if number < 50 else 0.6, 0.1)

    async def main() -> Any:
        async with connect("http://fake", transport=transport(handler)) as client:
            return await run_load(OpenLoop(20.0), lambda number: stream(client, ASK), Extent(100))

    summary = summarise([run(main())])
    assert (summary.completed, summary.errors, summary.refused) == (80, {"http 500": 10}, 10)
    assert summary.time_to_first_token.at("p50") == pytest.approx(0.4)  # between the halves
    assert summary.time_to_first_token.at("p95") == pytest.approx(0.6)
    assert summary.end_to_end.longest == pytest.approx(0.8)
    assert summary.time_per_output_token.at("p90") == pytest.approx(0.2 / 4)  # 0.2 s for the usage's other four tokens
    assert summary.chunk_gap.at("p99") == pytest.approx(0.1)
    assert summary.acceptance == pytest.approx(2 / 3)


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://host", "http://", "http://[::1", "unix:/tmp/x"])
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(ServerError, match="must be a server's address"):
        connect(url)


@pytest.mark.parametrize(
    ("response", "message"),
    [
        (httpx.Response(200, json={"data": []}), "lists no model at /v1/models"),
        (httpx.Response(200, json=[1]), "did not answer with a JSON object"),
        (httpx.Response(200, text="<html>"), "did not answer with JSON"),
        (httpx.Response(401), "answered with status 401"),
        (httpx.ConnectError(""), r"can not be reached \(ConnectError\)"),
    ],
)
def test_a_server_without_models(response: httpx.Response | Exception, message: str) -> None:
    async def handler(request: httpx.Request) -> httpx.Response:
        if isinstance(response, Exception):
            raise response
        return response

    async def main() -> str:
        async with connect("http://fake", transport=transport(handler)) as client:
            return await first_model(client)

    with pytest.raises(ServerError, match=message):
        run(main())


def test_the_shared_prefix_is_cut_in_the_servers_own_tokens() -> None:
    async def main(url: str, text: str, tokens: int) -> str:
        async with connect(url) as client:
            return await shared_prefix(client, await first_model(client), text, tokens)

    with served() as (url, _):
        assert asyncio.run(main(url, "abc", 7)) == "abcabca"
        assert asyncio.run(main(url, "abc", 2)) == "ab"
        with pytest.raises(ServerError, match="gives no tokens"):
            asyncio.run(main(url, "", 2))


EXAMPLES = [
    Example("text", "def a", "x:1", "x"),
    Example("prompt", "hello", "x:2", "x"),
    Example("messages", ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "no"}), "x:3", "x"),
]


def test_requests_are_a_function_of_the_seed_and_their_number() -> None:
    mix = RequestMix(EXAMPLES, "tiny", (4, 8), {"temperature": 0.0}, seed=3)
    asks = [mix.ask(0, number) for number in range(300)]
    assert asks == [mix.ask(0, number) for number in range(300)]
    assert asks != [replace(mix, seed=4).ask(0, number) for number in range(300)]
    assert {ask.body["max_tokens"] for ask in asks} == {4, 5, 6, 7, 8}
    assert [ask.body["seed"] for ask in asks[:3]] == [3, 4, 5]
    for start in range(0, 300, 3):  # each pass has every example once, and passes differ in their order
        assert sum(ask.path == "/v1/completions" for ask in asks[start : start + 3]) == 1
    assert len({tuple(ask.path for ask in asks[start : start + 3]) for start in range(0, 300, 3)}) == 3
    assert mix.ask(0, 0, draft_tokens=0).body == {**asks[0].body, "draft_tokens": 0}


def test_runs_differ_in_a_line_of_their_own_after_the_shared_prefix() -> None:
    mix = RequestMix(EXAMPLES[:1], "tiny", (4, 4), prefix="PREFIX\n")
    first, second = (mix.ask(run, 0).body for run in (0, 1))
    assert {**first, "prompt": ""} == {**second, "prompt": ""}
    lines = [body["prompt"].split("\n") for body in (first, second)]
    assert [(line[0], line[2]) for line in lines] == [("PREFIX", "def a")] * 2
    assert lines[0][1].startswith("# ") and lines[0][1] != lines[1][1]
    assert replace(mix, fresh=False).ask(0, 0).body["prompt"] == "PREFIX\ndef a"


def test_chats_begin_with_the_prefix_and_end_with_the_user(tmp_path: Path) -> None:
    mix = RequestMix(EXAMPLES[2:], "tiny", (4, 4), prefix="P ", fresh=False)
    assert mix.ask(0, 0).body["messages"] == [{"role": "user", "content": "P hi"}]
    parts = [{"type": "text", "text": text} for text in ("h", "i")]
    (file := tmp_path / "a.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": parts}]}), "utf-8")
    listed = replace(mix, examples=list(read_examples(file)))
    assert listed.ask(0, 0).body["messages"] == [{"role": "user", "content": "P hi"}]
    assert replace(listed, prefix="").ask(0, 0).body["messages"] == [{"role": "user", "content": "hi"}]


SERVER = """
import http.server, signal, sys
class Handler(http.server.BaseHTTPRequestHandler):
    asked = 0
    def do_GET(self):
        Handler.asked += 1
        self.send_response(200 if self.path == "/health/ready" and Handler.asked > 1 else 503)
        self.end_headers()
    def log_message(self, *arguments): pass
server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
print(f"serving tiny at http://127.0.0.1:{server.server_port}: 64 tokens a request", flush=True)
server.serve_forever()
"""


def test_a_started_server_is_waited_for_and_stopped_by_sigterm() -> None:
    server = OwnServer([sys.executable, "-c", SERVER])
    try:
        server.wait_until_ready()
        assert httpx.get(f"{server.url}/health/ready").is_success
    finally:
        server.stop()
    assert server.process.returncode == 0


def test_a_server_that_ends_or_never_gets_ready_is_an_error_that_says_what_it_said() -> None:
    ended = OwnServer([sys.executable, "-c", "import sys; print('no such model.'); sys.exit(2)"])
    with pytest.raises(ServerError, match=r"ended with code 2 and said: no such model\.$"):
        ended.wait_until_ready()
    ended.stop()
    silent = OwnServer([sys.executable, "-c", "import time; time.sleep(600)"])
    with pytest.raises(ServerError, match=r"was not ready within 0\.2 seconds"):
        silent.wait_until_ready(0.2)
    silent.stop()
    assert silent.process.returncode == -15
