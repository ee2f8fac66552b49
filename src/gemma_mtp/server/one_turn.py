"""One model's turn for routes that write it in forms of their own: its events as they come, and how it ended."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping
from typing import Any, NamedTuple

from pydantic import ValidationError

from gemma_mtp.chat.turn import Event
from gemma_mtp.engine.request import merged
from gemma_mtp.engine.result import GenerationResult
from gemma_mtp.server.errors import ApiError, from_validation
from gemma_mtp.server.fields import Refused, check_others
from gemma_mtp.server.protocol import ChatCompletionRequest
from gemma_mtp.server.service import Batch, Service
from gemma_mtp.server.translate import ChatPlan, chat_requests


class OneTurn:
    """The one generation of a batch, read as a turn."""

    def __init__(self, batch: Batch, tools: Collection[str]) -> None:
        (self.generation,) = batch.generations
        self.batch = batch
        self.generation.leave_out_text()  # the reader makes it
        self._reader = self.result.turn_reader(tools)

    @property
    def result(self) -> GenerationResult:
        return self.generation.result

    @property
    def stop(self) -> str | None:
        """The stop string that ended the text."""
        return self._reader.stop

    async def events(self) -> AsyncIterator[list[Event]]:
        """What each round brings. Raises ApiError."""
        async for _, updates in self.batch.updates():
            update = merged(updates)
            yield self._reader.push(update.token_ids, update.finish_reason in ("stop", "length"))


class Names(NamedTuple):
    """What a route calls fields that chat has by other names, with dots between parts."""

    of: Mapping[str, str]

    def error(self, error: ApiError) -> ApiError:
        """The same error under the route's names."""
        param = error.param or ""
        head = next((name for name in self.of if param == name or param.startswith((f"{name}.", f"{name}["))), None)
        if head is None:
            return error
        renamed, message = self.of[head], str(error.detail)
        if message.startswith(f"{param}:"):
            message = f"{renamed}{message[len(param) :]}"
        return ApiError(error.status_code, message, param=renamed, code=error.code, headers=error.headers)


def check_extra(extra: Mapping[str, Any], refused: Refused, route: str, own: Collection[str]) -> None:
    """Raise ApiError where fields beside a route's `own` would change the output: those that are `refused` there or
    everywhere, and those of chat."""
    check_others(extra, refused)
    for name, value in extra.items():
        if value is not None and name in ChatCompletionRequest.model_fields and name not in own:
            raise ApiError(400, f"{name} is not a field of {route}; use /v1/chat/completions.", param=name)


async def planned(fields: Mapping[str, Any], service: Service, names: Names) -> tuple[ChatCompletionRequest, ChatPlan]:
    """A chat's request of fields, and what is to be decoded for it. Raises ApiError."""
    given = {name: value for name, value in fields.items() if value is not None}
    try:
        body = ChatCompletionRequest.model_validate(given)
        return body, await chat_requests(body, service)
    except ValidationError as error:
        found = [{**each, "loc": ("body", *each["loc"])} for each in error.errors(include_url=False)]
        raise names.error(from_validation(found)) from None
    except ApiError as error:
        raise names.error(error) from None


def sse(kind: str, data: str) -> bytes:
    """A server-sent event with a name."""
    return f"event: {kind}\ndata: {data}\n\n".encode()
