"""What routes have in common: how bodies are read, generations are begun and noted in the log, and answers sent."""

from __future__ import annotations

import email.message
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gemma_mtp.engine.request import Request as Wanted
from gemma_mtp.server.errors import ApiError
from gemma_mtp.server.limits import parse_json
from gemma_mtp.server.logs import note
from gemma_mtp.server.service import Batch, Service
from gemma_mtp.server.settings import ServerSettings
from gemma_mtp.server.translate import Prompt


class EventStream(Response):
    """Server-sent events, sent as they come; the client's leaving is `Intake`'s affair."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with aclosing(self._events) as events:  # type: ignore[type-var]  # an async generator
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class Answering(Protocol):
    """Makes the answer to one request. Both raise ApiError, `events` only before the first one."""

    def events(self) -> AsyncIterator[bytes]: ...
    async def json(self) -> str: ...


async def answered(answers: Answering, stream: bool | None) -> Response:
    """The answer as it comes, or whole."""
    if stream:
        return EventStream(answers.events())
    return Response(await answers.json(), media_type="application/json")


class JsonRoute(APIRoute):
    """A route whose body is JSON by declaration and by our own stricter reading."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def checked(request: Request) -> Response:
            if self.body_field is not None and not _is_json(request.headers.get("content-type", "")):
                raise ApiError(415, "the body must be declared as JSON; send 'Content-Type: application/json'.")
            encoding = request.headers.get("content-encoding", "identity").strip().lower()
            if self.body_field is not None and encoding not in ("", "identity"):
                raise ApiError(415, "the body must not be compressed; send it without Content-Encoding.")
            return await handle(_JsonRequest(request.scope, request.receive))

        return checked


class _JsonRequest(Request):
    async def json(self) -> Any:
        return parse_json(await self.body(), self.app.state.service.settings.max_json_depth)


def _is_json(content_type: str) -> bool:
    message = email.message.Message()
    message["content-type"] = content_type
    return message.get_content_type() == "application/json"


def begun(wanted: Sequence[Wanted], prompts: Sequence[Prompt], request: Request, service: Service) -> Batch:
    """Queue what an HTTP request wants. When that ends, what still runs is cancelled, and the log says what came of it.
    Raises ApiError."""
    batch = service.submit(wanted, request.state.deadline)
    request.state.cleanup.callback(_note_batch, request, batch, prompts, service.settings)
    request.state.cleanup.callback(batch.close)
    return batch


def _note_batch(request: Request, batch: Batch, prompts: Sequence[Prompt], settings: ServerSettings) -> None:
    """What the log says of the generations; their texts only where that was asked for."""
    results = [generation.result for generation in batch.generations]
    first = batch.first_token_seconds
    fields: dict[str, Any] = {
        "prompt_tokens": sum(len(prompt.token_ids) for prompt in prompts),
        "completion_tokens": sum(len(result.token_ids) for result in results),
        "draft_tokens": sum(result.drafted for result in results),
        "accepted_tokens": sum(result.accepted for result in results),
        "first_token_seconds": None if first is None else round(first, 6),
        "finish": batch.reasons,
    }
    if batch.failure is not None:
        fields["error"] = str(batch.failure)
    if settings.log_text:
        fields["prompt_text"] = [prompt.text for prompt in prompts]
        fields["output_text"] = [result.text for result in results]
    note(request.scope, **fields)


def check_model(name: str | None, settings: ServerSettings) -> None:
    if name is not None and name != settings.model_name:
        shown = name if len(name) <= 100 else name[:100] + "..."
        message = f"there is no model {shown!r}; this server has {settings.model_name!r}."
        raise ApiError(404, message, param="model", code="model_not_found")
