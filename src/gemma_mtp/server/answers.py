"""From generations to OpenAI's answers, whole or chunk by chunk."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from gemma_mtp import __version__
from gemma_mtp.engine.request import Generation, Update, merged
from gemma_mtp.engine.result import TokenLogprob, token_kinds
from gemma_mtp.server.errors import ApiError
from gemma_mtp.server.protocol import (
    Answer,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
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
    GenerationRequest,
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
            accepted_prediction_tokens=accepted, rejected_prediction_tokens=drafted - accepted
        ),
    )


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

    def push(self, update: Update) -> list[str]:
        """The text that each of an update's tokens adds; a character split over tokens comes with its last one."""
        texts = [self.decoder.push([token_id]) for token_id in update.token_ids]
        if update.finish_reason is not None and texts:
            texts[-1] += self.decoder.flush()
        self.texts += texts
        return texts


class Answers(ABC):
    """Makes the answer to one request from its batch."""

    prefix = ""

    def __init__(self, body: GenerationRequest, service: Service, batch: Batch, prompts: Sequence[Prompt]) -> None:
        self.body, self.batch, self.prompts, self.tokenizer = body, batch, prompts, service.tokenizer
        self.wants_texts = body.include_rounds or bool(body.logprobs or body.logprobs == 0)  # type: ignore[attr-defined]
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
        report = None
        if self.body.include_rounds and update.round is not None:
            kinds = token_kinds(update.round, not choice.begun)
            tokens = [
                RoundToken(id=token_id, text=text, kind=kind)
                for token_id, text, kind in zip(update.token_ids, texts, kinds, strict=True)
            ]
            report = RoundReport(
                drafted=update.round.drafted, accepted=update.round.accepted, tokens=tokens, seconds=update.seconds
            )
        choice.begun = True
        if not (update.text or update.logprobs or report or update.finish_reason):
            return None
        return self._chunk([self._delta(index, update, texts)], gemma_mtp=report)

    def _event(self, chunk: Answer) -> bytes:
        left_out = {
            name
            for name, wanted in (("usage", self.body.include_usage), ("gemma_mtp", self.body.include_rounds))
            if not wanted
        }
        return b"data: " + chunk.model_dump_json(exclude=left_out).encode() + b"\n\n"

    def _first_offset(self, index: int) -> int:
        return 0

    @abstractmethod
    def _whole(self, head: dict[str, Any]) -> Answer: ...

    @abstractmethod
    def _opening(self) -> Iterator[Answer]: ...

    @abstractmethod
    def _delta(self, index: int, update: Update, texts: list[str]) -> Any: ...

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

    def _delta(self, index: int, update: Update, texts: list[str]) -> CompletionChoice:
        return CompletionChoice(
            index=index,
            text=update.text,
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
    prefix = "chatcmpl"

    def _whole(self, head: dict[str, Any]) -> ChatCompletion:
        return ChatCompletion(choices=[self._choice(i) for i in range(len(self.choices))], **head)

    def _choice(self, index: int) -> ChatChoice:
        result = self.choices[index].generation.result
        return ChatChoice(
            index=index,
            message=ChatMessage(content=result.text or ""),
            logprobs=self._logprobs(result.logprobs),
            finish_reason=_reason(result.finish_reason),
        )

    def _opening(self) -> Iterator[Answer]:
        for index in range(len(self.choices)):
            yield self._chunk([ChatChunkChoice(index=index, delta=Delta(role="assistant", content=""))])

    def _delta(self, index: int, update: Update, texts: list[str]) -> ChatChunkChoice:
        return ChatChunkChoice(
            index=index,
            delta=Delta(content=update.text),
            logprobs=self._logprobs(update.logprobs),
            finish_reason=None if update.finish_reason is None else _reason(update.finish_reason),
        )

    def _chunk(self, choices: list[Any], **fields: Any) -> Answer:
        return ChatCompletionChunk(choices=choices, **self.head, **fields)

    def _logprobs(self, logprobs: list[TokenLogprob] | None) -> ChatLogprobs | None:
        if logprobs is None:
            return None
        return ChatLogprobs(content=[self._logprob(entry) for entry in logprobs])

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
