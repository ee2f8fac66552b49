"""From the events of a turn to a response and its stream, in OpenAI's order."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from gemma_mtp.chat.turn import Arguments, CallBegin, CallEnd, Event, Text, Thought
from gemma_mtp.server import responses_protocol as wire
from gemma_mtp.server.errors import ApiError
from gemma_mtp.server.one_turn import OneTurn, TurnAnswers, sse
from gemma_mtp.server.response_store import ResponseStore, Stored, new_id
from gemma_mtp.server.service import Service

_ITEM: TypeAdapter[wire.Item] = TypeAdapter(wire.Item)
_CALL = "response.function_call_arguments"
#: items with one part, of text
Spoken = wire.OutputReasoning | wire.OutputMessage


@dataclass(frozen=True)
class _Part:
    """What the events of an item's part are called, and its place among others."""

    said: str
    whole: str
    index: str


_TEXT = _Part("response.output_text", "response.content_part", "content_index")
_THOUGHT = _Part("response.reasoning_text", "response.content_part", "content_index")
_SUMMARY = _Part("response.reasoning_summary_text", "response.reasoning_summary_part", "summary_index")


class ResponseAnswers(TurnAnswers):
    """The answer to one request, which is kept in a store from its beginning on, if the request wants that."""

    def __init__(
        self, body: wire.ResponsesRequest, given: Sequence[wire.Item], turn: OneTurn, service: Service,
        store: ResponseStore,
    ) -> None:  # fmt: skip
        super().__init__(turn)
        self.store = store
        self.made: wire.ModelResponse = _begun(body, turn, service)
        self.stored = Stored(self.made, given, batch=turn.batch)
        if self.made.store:
            store.add(self.stored)
        self._summarised = bool(body.reasoning and body.reasoning.summary)
        self._open: wire.OutputItem | None = None
        self._count = 0
        self._suffix = service.settings.id_suffix

    def _id(self, prefix: str) -> str:
        return new_id(prefix, self._suffix)

    def _opening(self) -> Iterator[bytes]:
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self.made.model_dump(mode="json"))

    def abandon(self) -> None:
        """The client has left, or all is said: what is in work has ended."""
        if self.made.status == "in_progress":
            self.made.status = "cancelled"
            self.store.complete(self.stored, self._made())

    def _say(self, event: Event) -> Iterator[bytes]:
        match event:
            case Thought(text):
                yield from self._more(wire.OutputReasoning, text)
            case Text(text):
                yield from self._more(wire.OutputMessage, text)
            case CallBegin(name):
                yield from self._begin(wire.OutputCall(id=self._id("fc"), call_id=self._id("call"), name=name))
            case Arguments(text):
                assert isinstance(self._open, wire.OutputCall)
                self._open.arguments += text
                yield self._of_item(f"{_CALL}.delta", delta=text)
            case CallEnd():
                yield from self._close()

    def _more(self, kind: type[Spoken], text: str) -> Iterator[bytes]:
        """More of a thought or a text, which begins where another item was open."""
        if not isinstance(self._open, kind):
            yield from self._begin(kind(id=self._id("rs" if kind is wire.OutputReasoning else "msg")))
            assert isinstance(self._open, Spoken)
            self._add_part(self._open)
            yield self._of_part("added", self._open)
        assert isinstance(self._open, Spoken)
        _said(self._open).text += text
        yield self._of_text("delta", self._open, delta=text)

    def _add_part(self, item: Spoken) -> None:
        """The one part of a text or a thought; a client that has asked for a summary looks for the thought there."""
        if isinstance(item, wire.OutputMessage):
            item.content = [wire.OutputText()]
        elif self._summarised:
            item.summary = [wire.OutputSummary()]
        else:
            item.content = [wire.OutputThought()]

    def _begin(self, item: wire.OutputItem) -> Iterator[bytes]:
        broken = isinstance(self._open, wire.OutputCall)
        yield from self._close("incomplete" if broken else "completed")
        self._open = item
        self.made.output = [*self.made.output, item]
        yield self._event("response.output_item.added", output_index=self._index, item=item.model_dump())

    def _close(self, status: str = "completed") -> Iterator[bytes]:
        """The open item ends."""
        item = self._open
        if item is None:
            return
        item.status = status  # type: ignore[assignment]
        if isinstance(item, wire.OutputCall):
            yield self._of_item(f"{_CALL}.done", name=item.name, arguments=item.arguments)
        else:
            yield self._of_text("done", item, text=_said(item).text)
            yield self._of_part("done", item)
        yield self._event("response.output_item.done", output_index=self._index, item=item.model_dump())
        self._open = None

    def _end(self) -> Iterator[bytes]:
        response = self.made
        whole = self.turn.result.finish_reason == "stop"
        yield from self._close("completed" if whole else "incomplete")
        response.status = "completed" if whole else "incomplete"
        response.incomplete_details = None if whole else wire.Incomplete()
        yield from self._finish(f"response.{response.status}")

    def _fail(self, error: ApiError) -> Iterator[bytes]:
        yield from self._close("incomplete")
        if self.stored.cancelled:
            self.failure = None  # it ended as was asked for
            self.made.status = "cancelled"
            yield from self._finish("response.incomplete")
            return
        self.made.status = "failed"
        self.made.error = wire.ResponseFailure(code="server_error", message=str(error.detail))
        yield from self._finish("response.failed")

    def _finish(self, kind: str) -> Iterator[bytes]:
        found = self.turn.usage()
        self.made.usage = wire.ResponseUsage(
            input_tokens=found.prompt_tokens,
            input_tokens_details=wire.InputDetails(cached_tokens=found.prompt_tokens_details.cached_tokens),
            output_tokens=found.completion_tokens,
            output_tokens_details=wire.OutputDetails(reasoning_tokens=found.completion_tokens_details.reasoning_tokens),
            total_tokens=found.total_tokens,
        )
        self.store.complete(self.stored, self._made())
        yield self._event(kind, response=self.made.model_dump(mode="json"))

    def _made(self) -> dict[str, wire.Item]:
        """The output as items of a later input."""
        return {item.id: _ITEM.validate_python(item.model_dump()) for item in self.made.output}

    @property
    def _index(self) -> int:
        return len(self.made.output) - 1

    def _of_part(self, kind: str, item: Spoken) -> bytes:
        names = _part_of(item)
        return self._of_item(f"{names.whole}.{kind}", **{names.index: 0}, part=_said(item).model_dump())

    def _of_text(self, kind: str, item: Spoken, **fields: str) -> bytes:
        names = _part_of(item)
        logprobs: dict[str, Any] = {"logprobs": []} if names is _TEXT else {}
        return self._of_item(f"{names.said}.{kind}", **{names.index: 0}, **fields, **logprobs)

    def _of_item(self, kind: str, **fields: Any) -> bytes:
        assert self._open is not None
        return self._event(kind, item_id=self._open.id, output_index=self._index, **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        number, self._count = self._count, self._count + 1
        return sse(kind, sequence_number=number, **fields)


def _said(item: Spoken) -> wire.OutputText | wire.OutputThought | wire.OutputSummary:
    """The one part of a text or a thought."""
    if isinstance(item, wire.OutputReasoning) and item.summary:
        return item.summary[0]
    return item.content[0]


def _part_of(item: Spoken) -> _Part:
    if isinstance(item, wire.OutputMessage):
        return _TEXT
    return _SUMMARY if item.summary else _THOUGHT


def _begun(body: wire.ResponsesRequest, turn: OneTurn, service: Service) -> wire.ModelResponse:
    params = turn.generation.request.params
    text = body.text.model_dump(by_alias=True, exclude_none=True) if body.text else {}
    reasoning = body.reasoning
    choice = body.tool_choice or "auto"
    return wire.ModelResponse(
        id=new_id("resp", service.settings.id_suffix),
        created_at=int(time.time()),
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        metadata=body.metadata or {},
        model=service.settings.model_name,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        previous_response_id=body.previous_response_id,
        reasoning=reasoning.model_dump() if reasoning else {"effort": None, "summary": None},
        store=body.store is not False,
        temperature=params.temperature,
        text={"format": {"type": "text"}, **text},
        tool_choice=choice if isinstance(choice, str) else choice.model_dump(),
        tools=[{"description": None, "parameters": None, "strict": False, **tool.model_dump(exclude_none=True)}
               for tool in body.tools or []],
        top_p=params.top_p,
        user=body.user,
    )  # fmt: skip
