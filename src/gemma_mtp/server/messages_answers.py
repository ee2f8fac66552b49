"""From the events of a turn to Anthropic's message and its stream."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from typing import Any

from gemma_mtp.chat.turn import Arguments, CallBegin, CallEnd, Event, Text, Thought
from gemma_mtp.server import messages_protocol as wire
from gemma_mtp.server.errors import ApiError, as_messages_error
from gemma_mtp.server.one_turn import OneTurn, TurnAnswers, sse
from gemma_mtp.server.service import Service


class MessageAnswers(TurnAnswers):
    """`thoughts`: whether they are sent."""

    def __init__(self, turn: OneTurn, service: Service, thoughts: bool) -> None:
        super().__init__(turn)
        self.thoughts = thoughts
        self.made: wire.MadeMessage = wire.MadeMessage(
            id=f"msg_{secrets.token_hex(12)}", model=service.settings.model_name, usage=self._usage()
        )
        self._open: wire.MadeBlock | None = None
        self._arguments = ""

    def _opening(self) -> Iterator[bytes]:
        yield sse("message_start", message=self.made.model_dump())

    def _say(self, event: Event) -> Iterator[bytes]:
        match event:
            case Thought(text) if self.thoughts:
                if not isinstance(self._open, wire.MadeThought):
                    yield from self._begin(wire.MadeThought())
                assert isinstance(self._open, wire.MadeThought)
                self._open.thinking += text
                yield self._delta(type="thinking_delta", thinking=text)
            case Text(text):
                if not isinstance(self._open, wire.MadeText):
                    yield from self._begin(wire.MadeText())
                assert isinstance(self._open, wire.MadeText)
                self._open.text += text
                yield self._delta(type="text_delta", text=text)
            case CallBegin(name):
                yield from self._begin(wire.MadeUse(id=f"toolu_{secrets.token_hex(12)}", name=name))
            case Arguments(text):
                self._arguments += text
                yield self._delta(type="input_json_delta", partial_json=text)
            case CallEnd():
                yield from self._close()

    def _begin(self, block: wire.MadeBlock) -> Iterator[bytes]:
        yield from self._close()
        self._open, self._arguments = block, ""
        self.made.content = [*self.made.content, block]
        yield sse("content_block_start", index=self._index, content_block=block.model_dump())

    def _close(self) -> Iterator[bytes]:
        block = self._open
        if block is None:
            return
        if isinstance(block, wire.MadeUse):
            block.input = _object(self._arguments)
        elif isinstance(block, wire.MadeThought):
            block.signature = "none"  # clients keep it; nothing is checked by it
            yield self._delta(type="signature_delta", signature=block.signature)
        yield sse("content_block_stop", index=self._index)
        self._open = None

    def _fail(self, error: ApiError) -> Iterator[bytes]:
        yield sse("error", **as_messages_error(error))

    def _end(self) -> Iterator[bytes]:
        yield from self._close()
        message = self.made
        message.usage, message.stop_sequence = self._usage(), self.turn.stop
        message.stop_reason = self._reason()
        delta = {"stop_reason": message.stop_reason, "stop_sequence": message.stop_sequence}
        yield sse("message_delta", delta=delta, usage=message.usage.model_dump())
        yield sse("message_stop")

    def _reason(self) -> wire.StopReason:
        if self.turn.result.finish_reason != "stop":
            return "max_tokens"
        if any(isinstance(block, wire.MadeUse) for block in self.made.content):
            return "tool_use"
        return "end_turn" if self.turn.stop is None else "stop_sequence"

    def _usage(self) -> wire.MessageUsage:
        found = self.turn.usage()
        cached = found.prompt_tokens_details.cached_tokens
        return wire.MessageUsage(
            input_tokens=found.prompt_tokens - cached, output_tokens=found.completion_tokens,
            cache_read_input_tokens=cached,
        )  # fmt: skip

    @property
    def _index(self) -> int:
        return len(self.made.content) - 1

    def _delta(self, **delta: str) -> bytes:
        return sse("content_block_delta", index=self._index, delta=delta)


def _object(arguments: str) -> dict[str, Any]:
    """The arguments of a call; of one that broke off none."""
    try:
        found = json.loads(arguments)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
