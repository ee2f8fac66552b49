"""From generations to OpenAI's answers, whole or chunk by chunk."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from gemma_mtp import __version__
from gemma_mtp.chat.marks import Region, Regions
from gemma_mtp.chat.turn import Arguments, CallBegin, CallEnd, Event, Text, Thought, TurnReader
from gemma_mtp.engine.request import Generation, Update, merged
from gemma_mtp.engine.result import GenerationResult, TokenLogprob, token_kinds
from gemma_mtp.server.errors import ApiError
from gemma_mtp.server.protocol import (
    Answer,
    CallDelta,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatLogprob,
    ChatLogprobs,
    ChatMessage,
    Completion,
    CompletionChoice,
    CompletionChunk,
    CompletionLogprobs,
    CompletionTokensDetails,
    Delta,
    FinishReason,
    FunctionDelta,
    GenerationRequest,
    MadeCall,
    MadeFunction,
    PromptTokensDetails,
    RoundReport,
    RoundToken,
    TopLogprob,
    Usage,
)
from gemma_mtp.server.service import Batch, Service
from gemma_mtp.server.translate import Prompt
from gemma_mtp.tokenizer import Tokenizer
from gemma_mtp.tokenizer.token_text import TextDecoder

FINGERPRINT = f"gemma-mtp-{__version__}"
END = b"data: [DONE]\n\n"
#: fields of messages and deltas that are left out where they are null
MAY_BE_ABSENT = {
    "message": ("tool_calls", "reasoning_content", "reasoning"),
    "delta": ("role", "content", "tool_calls", "reasoning_content", "reasoning"),
}
#: what is left out of a delta that has text alone, as most do
TEXT_ALONE = {"delta": {"role": True, "tool_calls": True, "reasoning_content": True, "reasoning": True}}


def usage(batch: Batch, prompts: Sequence[Prompt]) -> Usage:
    """Tokens so far; a prompt counts once, however many choices it has. Accepted and rejected ones are drafts."""
    results = [generation.result for generation in batch.generations]
    prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
    completion_tokens = sum(len(result.token_ids) for result in results)
    accepted, drafted = sum(result.accepted for result in results), sum(result.drafted for result in results)
    each = max(1, len(results) // len(prompts))
    cached = sum(generation.cached_tokens for generation in batch.generations[::each])
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
        completion_tokens_details=CompletionTokensDetails(
            accepted_prediction_tokens=accepted,
            rejected_prediction_tokens=drafted - accepted,
            reasoning_tokens=sum(map(thought_tokens, results)),
        ),
    )


def regions_of(result: GenerationResult) -> Regions | None:
    """What says which part of a turn each of its tokens belongs to; None where all of them are text."""
    if result.begin is None or result.tokenizer is None:
        return None
    return Regions(result.tokenizer.marks, result.begin)


def thought_tokens(result: GenerationResult) -> int:
    regions = regions_of(result)
    return 0 if regions is None else sum(regions.enter(token_id) == "thought" for token_id in result.token_ids)


def token_text(token_id: int, tokenizer: Tokenizer) -> str:
    """A token by itself; the replacement character stands for a part of a character."""
    return tokenizer.decode([token_id], skip_special_tokens=False)


@dataclass
class _Choice:
    """What is kept between a choice's chunks: texts of its tokens, where anybody asked for them."""

    generation: Generation
    decoder: TextDecoder
    offset: int
    begun: bool = False
    texts: list[str] = field(default_factory=list)
    reader: TurnReader | None = None
    regions: Regions | None = None  # of tokens with log-probabilities or reports
    calls: list[CallDelta] = field(default_factory=list)  # each call's beginning
    complete_calls: int = 0

    def parts(self, token_ids: Sequence[int]) -> list[Region]:
        """The part of the turn that each of an update's tokens belongs to, marks to that which they begin or end."""
        if self.regions is None:
            return ["text"] * len(token_ids)
        found: list[Region] = []
        for token_id in token_ids:
            before, part = self.regions.current, self.regions.enter(token_id)
            after = self.regions.current
            found.append(part or (after if after != "text" else before))
        return found

    def push(self, update: Update) -> list[str]:
        """The text that each of an update's tokens adds; a character split over tokens comes with its last one."""
        texts = [self.decoder.push([token_id]) for token_id in update.token_ids]
        if update.finish_reason is not None and texts:
            texts[-1] += self.decoder.flush()
        self.texts += texts
        return texts


@dataclass
class Said:
    """What an update adds to a choice."""

    text: str = ""
    thought: str = ""
    calls: list[CallDelta] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.text or self.thought or self.calls)


class Answers(ABC):
    """Makes the answer to one request from its batch."""

    prefix = ""

    def __init__(self, body: GenerationRequest, service: Service, batch: Batch, prompts: Sequence[Prompt]) -> None:
        self.body, self.batch, self.prompts, self.tokenizer = body, batch, prompts, service.tokenizer
        self.wants_texts = body.include_rounds or bool(body.logprobs or body.logprobs == 0)  # type: ignore[attr-defined]
        wanted = {"usage": body.include_usage, "gemma_mtp": body.include_rounds}
        self._left_out = {name: True for name, is_wanted in wanted.items() if not is_wanted}
        self.head: dict[str, Any] = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": service.settings.model_name,
            "system_fingerprint": FINGERPRINT,
        }
        self.choices = [
            _Choice(generation, self.tokenizer.stream(), self._first_offset(i))
            for i, generation in enumerate(batch.generations)
        ]

    async def whole(self) -> Answer:
        """The answer, when all choices have ended. Raises ApiError."""
        async for index, updates in self.batch.updates(at_end=True):
            if self.wants_texts:
                self.choices[index].push(merged(updates))
        return self._whole({**self.head, "usage": usage(self.batch, self.prompts)})

    async def events(self) -> AsyncIterator[bytes]:
        """The answer as server-sent events. An error after the first is the last event: no [DONE] follows."""
        try:
            for chunk in self._opening():
                yield self._event(chunk)
            async for index, updates in self.batch.updates():
                # rounds that came while others were being sent are sent together, unless each is asked for
                for update in updates if self.body.include_rounds else [merged(updates)]:
                    made = self._update(index, update)
                    if made is not None:
                        yield self._event(made)
            if self.body.include_usage:
                yield self._event(self._chunk([], usage=usage(self.batch, self.prompts)))
        except ApiError as error:
            yield b"data: " + error.response().body + b"\n\n"
        else:
            yield END

    def _update(self, index: int, update: Update) -> Answer | None:
        """The chunk that says what an update brought; None where it brought nothing to say yet."""
        choice = self.choices[index]
        texts = choice.push(update) if self.wants_texts else []
        said, report = self._say(choice, update), None
        parts = choice.parts(update.token_ids) if self.wants_texts else []
        if self.body.include_rounds and update.round is not None:
            kinds = token_kinds(update.round, not choice.begun)
            tokens = [
                RoundToken(id=token_id, text=text, kind=kind, part=part)
                for token_id, text, kind, part in zip(update.token_ids, texts, kinds, parts, strict=True)
            ]
            report = RoundReport(
                drafted=update.round.drafted, accepted=update.round.accepted, tokens=tokens, seconds=update.seconds
            )
        choice.begun = True
        if not (said or update.logprobs or report or update.finish_reason):
            return None
        return self._chunk([self._delta(index, update, said, texts, parts)], gemma_mtp=report)

    def _event(self, chunk: Answer) -> bytes:
        left_out: dict[str, Any] = dict(self._left_out)
        if nulls := self._nulls(chunk):
            left_out["choices"] = nulls
        return b"data: " + chunk.model_dump_json(exclude=left_out).encode() + b"\n\n"

    def to_json(self, answer: Answer) -> str:
        """A whole answer."""
        nulls = self._nulls(answer)
        return answer.model_dump_json(exclude={"choices": nulls} if nulls else None)

    def _nulls(self, answer: Answer) -> dict[int, Any]:
        """What clients expect to be absent rather than null, by choice."""
        return {}

    def _say(self, choice: _Choice, update: Update) -> Said:
        return Said(update.text)

    def _first_offset(self, index: int) -> int:
        return 0

    @abstractmethod
    def _whole(self, head: dict[str, Any]) -> Answer: ...

    @abstractmethod
    def _opening(self) -> Iterator[Answer]: ...

    @abstractmethod
    def _delta(self, index: int, update: Update, said: Said, texts: list[str], parts: list[Region]) -> Any: ...

    @abstractmethod
    def _chunk(self, choices: list[Any], **fields: Any) -> Answer: ...


class CompletionAnswers(Answers):
    prefix = "cmpl"

    def _whole(self, head: dict[str, Any]) -> Completion:
        return Completion(choices=[self._choice(i) for i in range(len(self.choices))], **head)

    def _choice(self, index: int) -> CompletionChoice:
        choice = self.choices[index]
        result = choice.generation.result
        return CompletionChoice(
            index=index,
            text=self._echo(index) + (result.text or ""),
            logprobs=self._logprobs(choice, result.logprobs, choice.texts),
            finish_reason=_reason(result.finish_reason),
        )

    def _opening(self) -> Iterator[Answer]:
        for index in range(len(self.choices)):
            if echo := self._echo(index):
                yield self._chunk([CompletionChoice(index=index, text=echo)])

    def _delta(self, index: int, update: Update, said: Said, texts: list[str], parts: list[Region]) -> CompletionChoice:
        return CompletionChoice(
            index=index,
            text=said.text,
            logprobs=self._logprobs(self.choices[index], update.logprobs, texts),
            finish_reason=None if update.finish_reason is None else _reason(update.finish_reason),
        )

    def _chunk(self, choices: list[Any], **fields: Any) -> Answer:
        return CompletionChunk(choices=choices, **self.head, **fields)

    def _echo(self, index: int) -> str:
        each = len(self.choices) // len(self.prompts)
        return self.prompts[index // each].text if self.body.echo else ""  # type: ignore[attr-defined]

    def _logprobs(
        self, choice: _Choice, logprobs: list[TokenLogprob] | None, texts: list[str]
    ) -> CompletionLogprobs | None:
        if logprobs is None:
            return None
        offsets = []
        for text in texts:
            offsets.append(choice.offset)
            choice.offset += len(text)
        return CompletionLogprobs(
            tokens=[token_text(entry.token_id, self.tokenizer) for entry in logprobs],
            token_logprobs=[entry.logprob for entry in logprobs],
            top_logprobs=[self._top(entry) for entry in logprobs],
            text_offset=offsets,
        )

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """By text, the chosen token among them; of several tokens with one text, the likeliest."""
        top: dict[str, float] = {}
        for token_id, logprob in (*entry.top, (entry.token_id, entry.logprob)):
            top.setdefault(token_text(token_id, self.tokenizer), logprob)
        return top


class ChatAnswers(Answers):
    """`tools`: names of those that may be called."""

    prefix = "chatcmpl"

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

    def _whole(self, head: dict[str, Any]) -> ChatCompletion:
        return ChatCompletion(choices=[self._choice(i) for i in range(len(self.choices))], **head)

    def _choice(self, index: int) -> ChatChoice:
        choice = self.choices[index]
        result = choice.generation.result
        said = Said(result.text or "")
        if choice.reader is not None:
            said = self._of_events(choice, choice.reader.push(result.token_ids, last=result.ended))
        parts = choice.parts(result.token_ids) if result.logprobs is not None else []
        calls = [
            MadeCall(
                id=call.id or "",
                function=MadeFunction(name=call.function.name or "", arguments=call.function.arguments),
            )
            for call in said.calls
        ]  # fmt: skip
        return ChatChoice(
            index=index,
            message=ChatMessage(
                content=said.text or (None if calls else ""), tool_calls=calls or None,
                reasoning_content=said.thought or None, reasoning=said.thought or None,
            ),
            logprobs=self._logprobs(result.logprobs, parts),
            finish_reason=self._reason(choice, result.finish_reason),
        )  # fmt: skip

    def _say(self, choice: _Choice, update: Update) -> Said:
        if choice.reader is None:
            return Said(update.text)
        last = update.finish_reason in ("stop", "length")
        return self._of_events(choice, choice.reader.push(update.token_ids, last))

    def _of_events(self, choice: _Choice, events: Sequence[Event]) -> Said:
        """What events say, those of one call together."""
        said = Said()
        for event in events:
            match event:
                case Text(text):
                    said.text += text
                case Thought(text) if self.shows_thoughts:
                    said.thought += text
                case CallBegin(name):
                    made = CallDelta(
                        index=len(choice.calls), id=f"call_{secrets.token_hex(12)}", type="function",
                        function=FunctionDelta(name=name),
                    )  # fmt: skip
                    choice.calls.append(made)
                    said.calls.append(made)
                case Arguments(json):
                    index = len(choice.calls) - 1
                    if not said.calls or said.calls[-1].index != index:
                        said.calls.append(CallDelta(index=index, function=FunctionDelta()))
                    said.calls[-1].function.arguments += json
                case CallEnd():
                    choice.complete_calls += 1
        return said

    def _opening(self) -> Iterator[Answer]:
        for index in range(len(self.choices)):
            yield self._chunk([ChatChunkChoice(index=index, delta=Delta(role="assistant", content=""))])

    def _delta(self, index: int, update: Update, said: Said, texts: list[str], parts: list[Region]) -> ChatChunkChoice:
        other = said.thought or said.calls
        delta = Delta(
            content=said.text if said.text or not other else None, reasoning_content=said.thought or None,
            reasoning=said.thought or None, tool_calls=said.calls or None,
        )  # fmt: skip
        reason = update.finish_reason
        return ChatChunkChoice(
            index=index,
            delta=delta,
            logprobs=self._logprobs(update.logprobs, parts),
            finish_reason=None if reason is None else self._reason(self.choices[index], reason),
        )

    def _chunk(self, choices: list[Any], **fields: Any) -> Answer:
        return ChatCompletionChunk(choices=choices, **self.head, **fields)

    def _nulls(self, answer: Answer) -> dict[int, Any]:
        found: dict[int, Any] = {}
        for i, choice in enumerate(answer.choices):  # type: ignore[attr-defined]
            name = "message" if isinstance(choice, ChatChoice) else "delta"
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

    def _reason(self, choice: _Choice, reason: str) -> FinishReason:
        return "tool_calls" if reason == "stop" and choice.complete_calls else _reason(reason)

    def _logprobs(self, logprobs: list[TokenLogprob] | None, parts: Sequence[Region]) -> ChatLogprobs | None:
        """Of the text's tokens; `parts` say which those are."""
        if logprobs is None:
            return None
        kept = [entry for entry, part in zip(logprobs, parts, strict=True) if part == "text"]
        return ChatLogprobs(content=[self._logprob(entry) for entry in kept])

    def _logprob(self, entry: TokenLogprob) -> ChatLogprob:
        top = [self._top(token_id, logprob) for token_id, logprob in entry.top]
        chosen = self._top(entry.token_id, entry.logprob)
        return ChatLogprob(token=chosen.token, logprob=chosen.logprob, bytes=chosen.bytes, top_logprobs=top)

    def _top(self, token_id: int, logprob: float) -> TopLogprob:
        text = token_text(token_id, self.tokenizer)
        whole = "\ufffd" not in text  # a part of a character has no text, and so no bytes that we know
        return TopLogprob(token=text, logprob=logprob, bytes=list(text.encode()) if whole else None)


def _reason(reason: str) -> FinishReason:
    return "stop" if reason == "stop" else "length"
