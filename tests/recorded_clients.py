"""A server for clients of others, which notes what they send: `GEMMA_MTP_RECORD=1 make clients` writes it down anew.

`test_client_requests.py` plays what was written down without the clients.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from live_server import Live, serving
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from table_models import QUOTE, SCRIPTS, table_pair

#: what each client sends, by its name
REQUESTS = Path(__file__).parent / "client_requests.json"
BUILD = Path(__file__).parents[1] / "build"
#: clients in Python, installed by `make clients`
CLIENTS = BUILD / "clients"
MODEL, CALLED = "gemma-mtp-bundled", {"city": "Paris, France", "days": 3}
#: what the server says
SUNNY, THOUGHT, ANSWER = "It is sunny there.", "Two and two STOP is four", "The answer STOP is 4"
#: longer bodies are those that no context has room for
LONGEST_BODY = 20_000
_WEATHER = ["<|tool_call>", "call:", "get_weather{", "city:", QUOTE, "Paris", ", France", QUOTE, ",days", ":3}",
            "<tool_call|>", "<|tool_response>"]  # fmt: skip


class Recorder:
    """ASGI middleware that keeps the requests that were answered 200: their paths and the JSON of their bodies."""

    def __init__(self, app: ASGIApp) -> None:
        self.app, self.requests = app, list[dict[str, Any]]()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body, status = bytearray(), 0

        async def heard() -> Message:
            message = await receive()
            body.extend(message.get("body", b""))
            return message

        async def said(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        await self.app(scope, heard, said)
        if status == 200 and 0 < len(body) <= LONGEST_BODY:
            request = {"path": scope["path"], "body": json.loads(body)}
            if request not in self.requests:
                self.requests.append(request)


@contextmanager
def table_server() -> Iterator[Live]:
    """A server of the table's model, whose call of a tool is the one that clients expect (`CALLED`). It is greedy where
    a client says nothing of the temperature."""
    scripts = {name: pieces for name, pieces in SCRIPTS.items() if name != "BOTH"}  # which begins a call otherwise
    pair = table_pair(scripts={**scripts, "WEATHER": _WEATHER})
    with serving(dataclasses.replace(pair, generation=dataclasses.replace(pair.generation, temperature=0.0))) as live:
        yield live


@contextmanager
def python_clients_server() -> Iterator[Live]:
    """The same, with the clients in Python ready to be imported."""
    assert CLIENTS.is_dir(), "run `make clients`"
    sys.path.append(str(CLIENTS))  # after our own packages, which stay
    with table_server() as live:
        yield live


@contextmanager
def recorded(live: Live, client: str) -> Iterator[None]:
    """Note what a client sends, where that is wanted."""
    config, app = live.server.config, live.server.config.loaded_app
    config.loaded_app = recorder = Recorder(app)
    try:
        yield
    finally:
        config.loaded_app = app
    if os.environ.get("GEMMA_MTP_RECORD"):
        known = json.loads(REQUESTS.read_text(encoding="utf-8")) if REQUESTS.exists() else {}
        known[client] = recorder.requests
        known = {name: requests for name, requests in known.items() if requests}
        REQUESTS.write_text(json.dumps(known, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
