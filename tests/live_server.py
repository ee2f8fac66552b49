"""A real server in a thread, for the tests of `gemma_mtp.server`."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from gemma_mtp.engine.pair import Pair
from gemma_mtp.engine.settings import EngineSettings
from gemma_mtp.engine.thread import EngineThread
from gemma_mtp.server import limits, run
from gemma_mtp.server import service as service_module
from gemma_mtp.server.service import Service
from gemma_mtp.server.settings import ServerSettings

#: what a busy machine may take; only a test that fails waits so long
SECONDS = 300.0
#: more work than any test waits for: tokens without drafts, over several choices
LONG: dict[str, Any] = {
    "prompt": "import", "max_tokens": 1900, "ignore_eos": True, "draft_tokens": 0, "n": 8, "temperature": 1.0,
}  # fmt: skip
COMPLETIONS = "/v1/completions"
SHORT: dict[str, Any] = {"prompt": "import", "max_tokens": 3, "temperature": 0}


@dataclass
class Live:
    """A server that answers: its parts, and a client for it."""

    service: Service
    server: run.Server
    url: str
    client: httpx.Client
    loop: list[asyncio.AbstractEventLoop] = field(default_factory=list)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def post(self, path: str, body: dict[str, Any], **extra: Any) -> httpx.Response:
        return self.client.post(path, json=body, **extra)

    def events(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """The data of a stream's events; the last one must be [DONE], or an error."""
        with self.client.stream("POST", path, json={**body, "stream": True}) as answer:
            assert answer.status_code == 200, answer.read()
            assert answer.headers["content-type"].startswith("text/event-stream")
            return parse_events(answer.read().decode())

    def stop(self) -> None:
        """What SIGTERM does."""
        self.loop[0].call_soon_threadsafe(self.server.stop)

    def idle(self) -> bool:
        stats = self.service.engine.stats()
        return stats.running == stats.waiting == self.service.in_flight == 0


def parse_events(text: str) -> list[dict[str, Any]]:
    """The data of a stream that ended well with [DONE], or with an error and nothing after it."""
    *events, rest = text.split("\n\n")
    ended_well = events[-1] == "data: [DONE]"
    found = [json.loads(event.removeprefix("data: ")) for event in (events[:-1] if ended_well else events)]
    assert rest == "" and ended_well == ("error" not in found[-1])
    return found


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    body = json.loads(answer.read())
    assert answer.status_code == status, body
    assert set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    return error


def wait_for(condition: Callable[[], object], pause: float = 0.005) -> None:
    """Until it holds; fails after `SECONDS`."""
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "the condition never held"
        time.sleep(pause)


@contextmanager
def serving(pair: Pair, engine_settings: EngineSettings | None = None, **settings: Any) -> Iterator[Live]:
    """A server of a pair on a free port, with `ServerSettings(**settings)`.

    An answer's last words have all the time that a busy machine takes for them.
    """
    with (
        pytest.MonkeyPatch.context() as patch,
        EngineThread(pair, engine_settings) as engine,
        run.listen("127.0.0.1", 0) as listener,
    ):
        for module, name in ((limits, "LAST_WORDS"), (service_module, "LAST_WORDS"), (run, "CLOSING_SECONDS")):
            patch.setattr(module, name, SECONDS)
        service = Service(engine, ServerSettings(**settings))
        ready, loop = threading.Event(), list[asyncio.AbstractEventLoop]()

        def started() -> None:
            loop.append(asyncio.get_running_loop())
            ready.set()

        server = run.server_for(service, started)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            assert ready.wait(SECONDS)
            url = run.url(listener)
            # there is no TLS here, and to read the authorities' certificates takes 20 ms of every client
            with httpx.Client(base_url=url, timeout=SECONDS, verify=False) as client:
                yield Live(service, server, url, client, loop)
        finally:
            server.should_exit = True
            thread.join(SECONDS)
            assert not thread.is_alive()


@contextmanager
def long_stream(live: Live, **fields: Any) -> Iterator[Iterator[str]]:
    """A request that is decoding: the lines after its first event."""
    with live.client.stream("POST", COMPLETIONS, json={**LONG, "stream": True, **fields}) as answer:
        assert answer.status_code == 200
        lines = answer.iter_lines()
        next(lines)
        yield lines


def request_bytes(body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content
