"""From a request for a response to a chat's request: items to messages, fields to their names there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from gemma_mtp.server import responses_protocol as wire
from gemma_mtp.server.conversation import TextFormat
from gemma_mtp.server.errors import wrong_field
from gemma_mtp.server.fields import Refused
from gemma_mtp.server.one_turn import Names, check_extra
from gemma_mtp.server.response_store import ResponseStore

NAMES = Names({
    "messages": "input", "prompt": "input", "max_completion_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort", "response_format": "text.format",
})  # fmt: skip
#: fields of OpenAI's that are not offered
REFUSED: Refused = {
    "context_management": (([],), "shorten the input yourself"),
    "conversation": ((), "use previous_response_id"),
    "max_tool_calls": ((), "nothing is called here; call the tools yourself"),
    "prompt": ((), "send the input itself"),
    "top_logprobs": ((0,), "use /v1/chat/completions"),
}
LOGPROBS = "message.output_text.logprobs"


def check_fields(body: wire.ResponsesRequest) -> None:
    """Raise ApiError for a field that would change the output and is not offered here."""
    extra = dict(body.model_extra or {})
    include = extra.pop("include", None)
    if isinstance(include, list) and LOGPROBS in include:
        raise wrong_field("include", f"{LOGPROBS} is not offered; use /v1/chat/completions")
    extra.pop("stream_options", None)  # obfuscation, of which there is none
    check_extra(extra, REFUSED, "responses", wire.ResponsesRequest.model_fields)


def items_of(body: wire.ResponsesRequest, store: ResponseStore) -> list[wire.Item]:
    """The items that a request brings, with those that it refers to. Raises ApiError."""
    if isinstance(body.input, str):
        return [wire.MessageItem(role="user", content=body.input)]
    return [store.item(item.id) if isinstance(item, wire.ItemReference) else item for item in body.input]


def chat_fields(body: wire.ResponsesRequest, items: Sequence[wire.Item]) -> dict[str, Any]:
    """Fields of the chat's request."""
    messages = list(messages_of(items))
    if body.instructions is not None:
        messages.insert(0, {"role": "system", "content": body.instructions})
    choice: Any = body.tool_choice
    if isinstance(choice, wire.NamedResponseTool):
        choice = {"type": "function", "function": {"name": choice.name}}
    return {
        "messages": messages,
        "tools": None if body.tools is None else [
            {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}
            for tool in body.tools
        ],
        "tool_choice": choice,
        "parallel_tool_calls": body.parallel_tool_calls,
        "response_format": _format(body),
        "reasoning_effort": body.reasoning.effort if body.reasoning else None,
        "max_completion_tokens": body.max_output_tokens,
        **body.same_fields(),
    }  # fmt: skip


def _format(body: wire.ResponsesRequest) -> dict[str, Any] | None:
    wanted = body.text.format if body.text else None
    if wanted is None or isinstance(wanted, TextFormat):
        return None
    fields = wanted.model_dump(by_alias=True, exclude_none=True)
    if not isinstance(wanted, wire.ResponseSchemaFormat):
        return fields
    kind = fields.pop("type")
    return {"type": kind, "json_schema": fields}


def messages_of(items: Iterable[wire.Item]) -> Iterable[dict[str, Any]]:
    """Items as a chat's messages: a thought, a text and calls that follow each other are one of the assistant's."""
    turn: dict[str, Any] = {}
    for item in items:
        if isinstance(item, wire.ReasoningItem):
            yield from _whole(turn, "content", "tool_calls")
            turn["reasoning_content"] = "".join(part.text for part in item.content or item.summary or ()) or None
        elif isinstance(item, wire.MessageItem) and item.role == "assistant":
            yield from _whole(turn, "content", "tool_calls")
            turn["content"] = _text(item.content)
        elif isinstance(item, wire.FunctionCallItem):
            function = {"name": item.name, "arguments": item.arguments}
            turn.setdefault("tool_calls", []).append({"id": item.call_id, "type": "function", "function": function})
        else:
            yield from _whole(turn, "content", "tool_calls")
            turn.clear()  # a thought that led to nothing
            if isinstance(item, wire.MessageItem):
                yield {"role": item.role, "content": _text(item.content)}
            elif isinstance(item, wire.FunctionCallOutputItem):
                yield {"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)}
    yield from _whole(turn, "content", "tool_calls")


def _whole(turn: dict[str, Any], *parts: str) -> Iterable[dict[str, Any]]:
    """The turn so far as a message, where it has one of these parts; then a new one begins."""
    if any(part in turn for part in parts):
        yield {"role": "assistant", **turn}
        turn.clear()


def _text(content: str | list[wire.InputText | wire.Refusal]) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.refusal if isinstance(part, wire.Refusal) else part.text for part in content)
