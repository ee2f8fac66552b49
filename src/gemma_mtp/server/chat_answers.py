"""From generations to answers of a conversation."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from gemma_mtp.chat.marks import Region
from gemma_mtp.chat.turn import Arguments, CallBegin, CallEnd, Event, Text, Thought
from gemma_mtp.engine.request import Update
from gemma_mtp.engine.result import TokenLogprob
from gemma_mtp.server import protocol_answers as wire
from gemma_mtp.server.answers import Answers, Choice, Said, finish_reason, regions_of, token_text
from gemma_mtp.server.protocol import ChatCompletionRequest
from gemma_mtp.server.service import Batch, Service
from gemma_mtp.server.translate import Prompt

#: fields of messages and deltas that are left out where they are null
MAY_BE_ABSENT = {
    "message": ("tool_calls", "reasoning_content", "reasoning"),
    "delta": ("role", "content", "tool_calls", "reasoning_content", "reasoning"),
}
#: what is left out of a delta that has text alone, as most do
TEXT_ALONE = {"delta": {"role": True, "tool_calls": True, "reasoning_content": True, "reasoning": True}}


class ChatAnswers(Answers):
    """`tools`: names of those that may be called."""

    prefix, chunk = "chatcmpl", wire.ChatCompletionChunk

    def __init__(
        self, body: ChatCompletionRequest, service: Service, batch: Batch, prompts: Sequence[Prompt],
        tools: Collection[str] = (),
    ) -> None:  # fmt: skip
        super().__init__(body, service, batch, prompts)
        self.shows_thoughts = body.include_reasoning is not False
        for choice in self.choices:
            result = choice.generation.result
            if result.begin is not None:  # then this reader makes the text
                choice.generation.leave_out_text()
                choice.reader, choice.regions = result.turn_reader(tools), regions_of(result)

    def _whole(self, head: dict[str, Any]) -> wire.ChatCompletion:
        choices = [self._choice(i) for i in range(len(self.choices))]
        return wire.ChatCompletion(
            choices=choices, prompt_logprobs=self.prompt_logprobs(self.choices[0].generation.result), **head
        )

    def _choice(self, index: int) -> wire.ChatChoice:
        choice = self.choices[index]
        result = choice.generation.result
        said = Said(result.text or "")
        if choice.reader is not None:
            said = self._of_events(choice, choice.reader.push(result.token_ids, last=result.ended))
        parts = choice.parts(result.token_ids) if result.logprobs is not None else []
        calls = [
            wire.MadeCall(
                id=call.id or "",
                function=wire.MadeFunction(name=call.function.name or "", arguments=call.function.arguments),
            )
            for call in said.calls
        ]  # fmt: skip
        return wire.ChatChoice(
            index=index,
            message=wire.ChatMessage(
                content=said.text or (None if calls else ""), tool_calls=calls or None,
                reasoning_content=said.thought or None, reasoning=said.thought or None,
            ),
            logprobs=self._logprobs(result.logprobs, parts),
            finish_reason=self._reason(choice, result.finish_reason),
        )  # fmt: skip

    def _say(self, choice: Choice, update: Update) -> Said:
        if choice.reader is None:
            return Said(update.text)
        last = update.finish_reason in ("stop", "length")
        return self._of_events(choice, choice.reader.push(update.token_ids, last))

    def _of_events(self, choice: Choice, events: Sequence[Event]) -> Said:
        """What events say, those of one call together."""
        said = Said()
        for event in events:
            match event:
                case Text(text):
                    said.text += text
                case Thought(text) if self.shows_thoughts:
                    said.thought += text
                case CallBegin(name):
                    made = wire.CallDelta(
                        index=len(choice.calls), id=f"call_{secrets.token_hex(12)}", type="function",
                        function=wire.FunctionDelta(name=name),
                    )  # fmt: skip
                    choice.calls.append(made)
                    said.calls.append(made)
                case Arguments(json):
                    index = len(choice.calls) - 1
                    if not said.calls or said.calls[-1].index != index:
                        said.calls.append(wire.CallDelta(index=index, function=wire.FunctionDelta()))
                    said.calls[-1].function.arguments += json
                case CallEnd():
                    choice.complete_calls += 1
        return said

    def _opening(self) -> Iterator[wire.Answer]:
        for index in range(len(self.choices)):
            yield self._chunk([wire.ChatChunkChoice(index=index, delta=wire.Delta(role="assistant", content=""))])

    def _delta(
        self, index: int, update: Update, said: Said, texts: list[str], parts: list[Region]
    ) -> wire.ChatChunkChoice:
        other = said.thought or said.calls
        delta = wire.Delta(
            content=said.text if said.text or not other else None, reasoning_content=said.thought or None,
            reasoning=said.thought or None, tool_calls=said.calls or None,
        )  # fmt: skip
        reason = update.finish_reason
        return wire.ChatChunkChoice(
            index=index,
            delta=delta,
            logprobs=self._logprobs(update.logprobs, parts),
            finish_reason=None if reason is None else self._reason(self.choices[index], reason),
        )

    def _nulls(self, answer: wire.Answer) -> dict[int, Any]:
        found: dict[int, Any] = {}
        for i, choice in enumerate(answer.choices):  # type: ignore[attr-defined]
            name = "message" if isinstance(choice, wire.ChatChoice) else "delta"
            part = getattr(choice, name)
            if name == "delta" and part.role is part.reasoning is part.tool_calls is None and part.content is not None:
                found[i] = TEXT_ALONE
                continue
            left_out: dict[str, Any] = {field: True for field in MAY_BE_ABSENT[name] if getattr(part, field) is None}
            if name == "delta" and part.tool_calls:
                left_out["tool_calls"] = {
                    j: {"id": True, "type": True, "function": {"name": True}}
                    for j, call in enumerate(part.tool_calls)
                    if call.id is None
                }
            found[i] = {name: left_out}
        return found

    def _reason(self, choice: Choice, reason: str) -> wire.FinishReason:
        return "tool_calls" if reason == "stop" and choice.complete_calls else finish_reason(reason)

    def _logprobs(self, logprobs: list[TokenLogprob] | None, parts: Sequence[Region]) -> wire.ChatLogprobs | None:
        """Of the text's tokens; `parts` say which those are."""
        if logprobs is None:
            return None
        kept = [entry for entry, part in zip(logprobs, parts, strict=True) if part == "text"]
        return wire.ChatLogprobs(content=[self._logprob(entry) for entry in kept])

    def _logprob(self, entry: TokenLogprob) -> wire.ChatLogprob:
        top = [self._top(token_id, logprob) for token_id, logprob in entry.top]
        chosen = self._top(entry.token_id, entry.logprob)
        return wire.ChatLogprob(token=chosen.token, logprob=chosen.logprob, bytes=chosen.bytes, top_logprobs=top)

    def _top(self, token_id: int, logprob: float) -> wire.TopLogprob:
        text = token_text(token_id, self.tokenizer)
        # the text of a part of a character is none that could be encoded
        raw = text.encode() if "\ufffd" not in text else self.tokenizer.token_bytes(token_id)
        return wire.TopLogprob(token=text, logprob=logprob, bytes=list(raw))
