"""What a request may take: bytes, time, a place among the others. And the end of its work when its client leaves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gemma_mtp.server.errors import ApiError, retry_later, shutting_down
from gemma_mtp.server.logs import note
from gemma_mtp.server.service import Service

#: seconds beyond its time that a request gets to say that its time is over, which a client may be too slow to read
LAST_WORDS = 5.0


class Intake:
    """ASGI middleware for requests with a body: reads it, waits for the answer, and watches for the client to leave.

    Sets `deadline` (on the event loop's clock) and `cleanup` (an ExitStack that ends with the request) in its state.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service, self.settings = app, service, service.settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        try:
            self._admit()
        except ApiError as error:
            await error.response(scope["path"])(scope, receive, send)
            return
        with self.service.in_work():
            await self._serve(scope, receive, send)

    def _admit(self) -> None:
        if self.service.draining:
            raise shutting_down()
        if self.service.in_flight >= self.settings.max_concurrent:
            raise retry_later(f"{self.service.in_flight} requests are in work, as many as may; try again later.")

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        deadline = asyncio.get_running_loop().time() + self.settings.request_seconds
        try:
            body = await self._read(scope, receive)
        except ApiError as error:
            await error.response(scope["path"])(scope, receive, send)
            return
        if body is None:
            note(scope, left=True)
            return
        with contextlib.ExitStack() as cleanup:
            scope["state"].update(deadline=deadline, cleanup=cleanup)
            await self._answer(scope, body, receive, send, deadline)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None where the client left. Raises ApiError (408, 413)."""
        most = self.settings.max_body_bytes
        too_large = ApiError(413, f"the body is larger than the {most} bytes that this server takes.")
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if declared.isdigit() and int(declared[:20]) > most:
            raise too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.settings.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        raise too_large
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            seconds = self.settings.body_seconds
            raise ApiError(408, f"the body did not arrive within {seconds:g} seconds.") from None

    async def _answer(self, scope: Scope, body: bytes, receive: Receive, send: Send, deadline: float) -> None:
        left, complete = asyncio.Event(), False
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            if messages:
                return messages.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def forward(message: Message) -> None:
            nonlocal complete
            await send(message)
            complete = message["type"] == "http.response.body" and not message.get("more_body", False)

        answer = asyncio.ensure_future(self.app(scope, replay, forward))
        watch = asyncio.create_task(_until_left(receive))
        seconds = deadline + LAST_WORDS - asyncio.get_running_loop().time()
        try:
            await asyncio.wait({answer, watch}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if complete or answer.done():  # servers say "disconnect" after a whole answer, too
                await answer
            else:
                note(scope, left=True)
        finally:
            left.set()
            await _end(answer)
            await _end(watch)


async def _end(task: asyncio.Future[None]) -> None:
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()  # seen: raised above, or of a request that nobody waits for


async def _until_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def parse_json(body: bytes, max_depth: int) -> Any:
    """The value of a JSON text in UTF-8.

    Raises ApiError for what is none, for infinite numbers, lone surrogates, and deep nesting.
    """
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant, parse_float=_number)
        if b"\\u" in body:  # half a surrogate pair is no text that could be encoded
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise _too_deep(max_depth) from None
    except UnicodeError:
        raise ApiError(400, "the body is not valid UTF-8 text.", code="invalid_json") from None
    except ValueError as error:  # its message may repeat what the client sent
        place = f" (line {error.lineno}, column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
        raise ApiError(400, f"the body is not valid JSON{place}.", code="invalid_json") from None
    _check_depth(value, max_depth)
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _number(text: str) -> float:
    """A finite number. JSON has one kind of number: 5.0 is as whole as 5."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("a number is too large")
    return int(number) if number.is_integer() else number


def _check_depth(value: Any, most: int) -> None:
    level, depth = [value], 0
    while level := [node for node in level if isinstance(node, dict | list)]:
        depth += 1
        if depth > most:
            raise _too_deep(most)
        level = [child for node in level for child in (node.values() if isinstance(node, dict) else node)]


def _too_deep(most: int) -> ApiError:
    return ApiError(400, f"the body's JSON is nested deeper than {most} levels.", code="invalid_json")
