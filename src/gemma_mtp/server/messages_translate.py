"""From Anthropic's messages to a chat's request."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from gemma_mtp.server import messages_protocol as wire
from gemma_mtp.server.conversation import TextPart
from gemma_mtp.server.fields import Refused
from gemma_mtp.server.one_turn import Names, check_extra

NAMES = Names({
    "prompt": "messages", "max_completion_tokens": "max_tokens", "stop": "stop_sequences",
    "reasoning_effort": "thinking", "max_thinking_tokens": "thinking.budget_tokens",
})  # fmt: skip
#: fields of Anthropic's that are not offered
REFUSED: Refused = {
    "container": ((), "nothing is run here"),
    "context_management": ((), "shorten the messages yourself"),
    "mcp_servers": (([],), "call the tools yourself"),
    "output_config": ((), "use response_format of /v1/chat/completions"),
    "output_format": ((), "use response_format of /v1/chat/completions"),
}


def check_fields(body: wire.CountRequest) -> None:
    """Raise ApiError for a field that would change the output and is not offered here."""
    check_extra(body.model_extra or {}, REFUSED, "messages", wire.MessagesRequest.model_fields)


def chat_fields(body: wire.CountRequest) -> dict[str, Any]:
    """Fields of the chat's request."""
    messages = [made for message in body.messages for made in _messages_of(message)]
    if body.system:
        messages.insert(0, {"role": "system", "content": _text(body.system)})
    choice, thinking = body.tool_choice, body.thinking
    fields: dict[str, Any] = {
        "messages": messages,
        "tools": None if body.tools is None else [
            {"type": "function", "function": {
                "name": tool.name, "description": tool.description, "parameters": tool.input_schema,
                "strict": tool.strict,
            }}
            for tool in body.tools
        ],
        "tool_choice": None if choice is None else "required" if choice.type == "any" else choice.type,
        "parallel_tool_calls": False if choice is not None and choice.disable_parallel_tool_use else None,
        "reasoning_effort": None if thinking is None else "none" if thinking.type == "disabled" else "high",
        "max_thinking_tokens": thinking.budget_tokens if isinstance(thinking, wire.ThinkingOn) else None,
    }  # fmt: skip
    if isinstance(choice, wire.NamedChoice):
        fields["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
    if body.messages[-1].role == "assistant":  # which the answer goes on with
        fields["continue_final_message"] = True
    if isinstance(body, wire.MessagesRequest):
        fields |= {"max_completion_tokens": body.max_tokens, "stop": body.stop_sequences, "top_k": body.top_k}
        fields |= body.same_fields()
    return fields


def _messages_of(message: wire.GivenMessage) -> Iterable[dict[str, Any]]:
    """A message as chat has it: answers of tools are messages of their own, before the user's text."""
    blocks = message.content if not isinstance(message.content, str) else [TextPart(type="text", text=message.content)]
    text = "".join(block.text for block in blocks if isinstance(block, TextPart))
    for block in blocks:
        if isinstance(block, wire.AnswerBlock):
            said = _text(block.content or "")
            content = f"error: {said}" if block.is_error else said
            yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": content}
    if message.role == "assistant":
        calls = [
            {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": json.dumps(block.input)}}
            for block in blocks if isinstance(block, wire.CallBlock)
        ]  # fmt: skip
        thought = "".join(block.thinking for block in blocks if isinstance(block, wire.ThoughtBlock))
        fields = {"content": text or None, "tool_calls": calls or None, "reasoning_content": thought or None}
        yield {"role": "assistant", **{name: value for name, value in fields.items() if value is not None}}
    elif any(isinstance(block, TextPart) for block in blocks):
        yield {"role": "user", "content": text}


def _text(content: str | list[TextPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)
