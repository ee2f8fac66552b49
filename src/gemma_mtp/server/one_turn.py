"""One model's turn for routes that write it in forms of their own: its events as they come, and how it ended."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Collection, Iterator, Mapping
from typing import Any, NamedTuple

from fastapi import Request
from pydantic import BaseModel, ValidationError

from gemma_mtp.chat.turn import Event
from gemma_mtp.engine.request import merged
from gemma_mtp.engine.result import GenerationResult
from gemma_mtp.server.answers import usage
from gemma_mtp.server.errors import ApiError, from_validation
from gemma_mtp.server.fields import Refused, check_others
from gemma_mtp.server.protocol import ChatCompletionRequest
from gemma_mtp.server.protocol_answers import Usage
from gemma_mtp.server.routing import begun
from gemma_mtp.server.service import Batch, Service
from gemma_mtp.server.translate import ChatPlan, Prompt, chat_requests


class OneTurn:
    """The one generation of a batch, read as a turn."""

    def __init__(self, batch: Batch, prompt: Prompt, tools: Collection[str]) -> None:
        (self.generation,) = batch.generations
        self.batch, self.prompt = batch, prompt
        self.generation.leave_out_text()  # the reader makes it
        self._reader = self.result.turn_reader(tools)

    @property
    def result(self) -> GenerationResult:
        return self.generation.result

    @property
    def stop(self) -> str | None:
        """The stop string that ended the text."""
        return self._reader.stop

    def usage(self) -> Usage:
        """Tokens so far."""
        return usage(self.batch, [self.prompt])

    async def events(self) -> AsyncIterator[list[Event]]:
        """What each round brings. Raises ApiError."""
        async for _, updates in self.batch.updates():
            update = merged(updates)
            yield self._reader.push(update.token_ids, update.finish_reason in ("stop", "length"))


class TurnAnswers(ABC):
    """Makes the answer to one request from its turn: `made`, as its parts become whole, and the server-sent events that
    say so."""

    made: BaseModel

    def __init__(self, turn: OneTurn) -> None:
        self.turn = turn
        self.failure: ApiError | None = None

    async def events(self) -> AsyncIterator[bytes]:
        """The answer as server-sent events; where the turn fails, the last of them say so."""
        yield b"".join(self._opening())
        try:
            async for events in self.turn.events():
                if said := b"".join(part for event in events for part in self._say(event)):
                    yield said
        except ApiError as error:
            self.failure = error
            yield b"".join(self._fail(error))
        else:
            yield b"".join(self._end())

    async def json(self) -> str:
        """The answer when it has ended. Raises ApiError."""
        async for _ in self.events():
            pass
        if self.failure is not None:
            raise self.failure
        return self.made.model_dump_json()

    @abstractmethod
    def _opening(self) -> Iterator[bytes]: ...

    @abstractmethod
    def _say(self, event: Event) -> Iterator[bytes]: ...

    @abstractmethod
    def _end(self) -> Iterator[bytes]: ...

    @abstractmethod
    def _fail(self, error: ApiError) -> Iterator[bytes]: ...


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


async def planned(fields: Mapping[str, Any], service: Service, names: Names) -> ChatPlan:
    """What is to be decoded for a chat's request of these fields. Raises ApiError."""
    given = {name: value for name, value in fields.items() if value is not None}
    try:
        return await chat_requests(ChatCompletionRequest.model_validate(given), service)
    except ValidationError as error:
        found = [{**each, "loc": ("body", *each["loc"])} for each in error.errors(include_url=False)]
        raise names.error(from_validation(found)) from None
    except ApiError as error:
        raise names.error(error) from None


async def begun_turn(fields: Mapping[str, Any], names: Names, request: Request, service: Service) -> OneTurn:
    """The turn that answers a chat's request of these fields, begun. Raises ApiError."""
    plan = await planned(fields, service, names)
    return OneTurn(begun(plan.requests, [plan.prompt], request, service), plan.prompt, plan.tools)


def sse(kind: str, **fields: Any) -> bytes:
    """A server-sent event with a name, which its data has as well."""
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields}, ensure_ascii=False)}\n\n".encode()
