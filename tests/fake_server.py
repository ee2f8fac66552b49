"""Servers that answer as OpenAI's API does, with delays that are known: in process, and on a real socket."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx

USAGE: dict[str, Any] = {
    "prompt_tokens": 9,
    "completion_tokens": 5,
    "prompt_tokens_details": {"cached_tokens": 3},
    "completion_tokens_details": {"accepted_prediction_tokens": 2, "rejected_prediction_tokens": 1},
}


def event(content: Any) -> bytes:
    return f"data: {content if isinstance(content, str) else json.dumps(content)}\n\n".encode()


def text_event(text: str) -> bytes:
    return event({"choices": [{"index": 0, "text": text}]})


DONE = event("[DONE]")
USAGE_EVENT = event({"choices": [], "usage": USAGE})


class Body(httpx.AsyncByteStream):
    """(seconds to wait, bytes) one after the other; an exception in place of bytes is raised."""

    def __init__(self, *parts: tuple[float, bytes | Exception]) -> None:
        self.parts = parts

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for seconds, content in self.parts:
            await asyncio.sleep(seconds)
            if isinstance(content, Exception):
                raise content
            yield content


def answer(first: float, gap: float = 0.0, chunks: int = 3) -> httpx.Response:
    """Text after `first` seconds, then every `gap`; the usage says 5 tokens."""
    parts = [(gap if i else first, text_event("x")) for i in range(chunks)]
    return httpx.Response(200, stream=Body(*parts, (0, USAGE_EVENT), (0, DONE)))


def transport(handler: Callable[[httpx.Request], Coroutine[None, None, httpx.Response]]) -> httpx.MockTransport:
    return httpx.MockTransport(handler)


class _Handler(BaseHTTPRequestHandler):
    bodies: list[dict[str, Any]]
    status = 200

    def do_GET(self) -> None:
        self._send(json.dumps({"data": [{"id": "tiny"}]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            return self._send(json.dumps({"tokens": [ord(letter) for letter in body["prompt"]]}).encode())
        if self.path == "/detokenize":
            return self._send(json.dumps({"prompt": "".join(map(chr, body["tokens"]))}).encode())
        self.bodies.append({**body, "path": self.path, "authorization": self.headers["Authorization"]})
        usage = {**USAGE, "completion_tokens": body["max_tokens"]}
        delta = {"delta": {"content": "x"}} if "messages" in body else {"text": "x"}
        chunks = [event({"choices": [{"index": 0, **delta}]})] * 2
        return self._send(b"".join([*chunks, event({"choices": [], "usage": usage}), DONE]))

    def _send(self, content: bytes) -> None:
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def served(status: int = 200) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server's URL, and the bodies it was sent for completion."""
    handler: type[_Handler] = type("Handler", (_Handler,), {"bodies": [], "status": status})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler.bodies
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
