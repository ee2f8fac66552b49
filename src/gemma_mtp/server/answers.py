"""From generations to OpenAI's answers, whole or chunk by chunk: what completions and chat have in common."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from gemma_mtp import __version__
from gemma_mtp.chat.marks import Region, Regions
from gemma_mtp.chat.turn import TurnReader
from gemma_mtp.engine.request import Generation, Update, merged
from gemma_mtp.engine.result import GenerationResult, PromptLogprob, token_kinds
from gemma_mtp.server import protocol_answers as wire
from gemma_mtp.server.errors import ApiError
from gemma_mtp.server.protocol import GenerationRequest
from gemma_mtp.server.service import Batch, Service
from gemma_mtp.server.translate import Prompt
from gemma_mtp.tokenizer import Tokenizer
from gemma_mtp.tokenizer.token_text import TextDecoder

FINGERPRINT = f"gemma-mtp-{__version__}"
END = b"data: [DONE]\n\n"


def usage(batch: Batch, prompts: Sequence[Prompt]) -> wire.Usage:
    """Tokens so far; a prompt counts once, however many choices it has. Accepted and rejected ones are drafts."""
    results = [generation.result for generation in batch.generations]
    prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
    completion_tokens = sum(len(result.token_ids) for result in results)
    accepted, drafted = sum(result.accepted for result in results), sum(result.drafted for result in results)
    each = max(1, len(results) // len(prompts))
    cached = sum(generation.cached_tokens for generation in batch.generations[::each])
    return wire.Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=wire.PromptTokensDetails(cached_tokens=cached),
        completion_tokens_details=wire.CompletionTokensDetails(
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
class Choice:
    """What is kept between a choice's chunks: texts of its tokens, where anybody asked for them."""

    generation: Generation
    decoder: TextDecoder
    offset: int = 0  # of the next token's text
    begun: bool = False
    texts: list[str] = field(default_factory=list)
    reader: TurnReader | None = None
    regions: Regions | None = None  # of tokens with log-probabilities or reports
    calls: list[wire.CallDelta] = field(default_factory=list)  # each call's beginning
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
    calls: list[wire.CallDelta] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.text or self.thought or self.calls)


class Answers(ABC):
    """Makes the answer to one request from its batch."""

    prefix: ClassVar[str]
    chunk: ClassVar[type[wire.CompletionChunk | wire.ChatCompletionChunk]]

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
        self.choices = [Choice(generation, self.tokenizer.stream()) for generation in batch.generations]

    async def json(self) -> str:
        """The answer, when all choices have ended. Raises ApiError."""
        async for index, updates in self.batch.updates(at_end=True):
            if self.wants_texts:
                self.choices[index].push(merged(updates))
        answer = self._whole({**self.head, "usage": usage(self.batch, self.prompts)})
        nulls = self._nulls(answer)
        return answer.model_dump_json(exclude={"choices": nulls} if nulls else None)

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

    def _update(self, index: int, update: Update) -> wire.Answer | None:
        """The chunk that says what an update brought; None where it brought nothing to say yet."""
        choice = self.choices[index]
        texts = choice.push(update) if self.wants_texts else []
        said, report = self._say(choice, update), None
        parts = choice.parts(update.token_ids) if self.wants_texts else []
        if self.body.include_rounds and update.round is not None:
            kinds = token_kinds(update.round, not choice.begun)
            tokens = [
                wire.RoundToken(id=token_id, text=text, kind=kind, part=part)
                for token_id, text, kind, part in zip(update.token_ids, texts, kinds, parts, strict=True)
            ]
            report = wire.RoundReport(
                drafted=update.round.drafted, accepted=update.round.accepted, tokens=tokens, seconds=update.seconds
            )
        choice.begun = True
        if not (said or update.logprobs or report or update.finish_reason):
            return None
        return self._chunk([self._delta(index, update, said, texts, parts)], gemma_mtp=report)

    def _event(self, chunk: wire.Answer) -> bytes:
        left_out: dict[str, Any] = dict(self._left_out)
        if nulls := self._nulls(chunk):
            left_out["choices"] = nulls
        return b"data: " + chunk.model_dump_json(exclude=left_out).encode() + b"\n\n"

    def _nulls(self, answer: wire.Answer) -> dict[int, Any]:
        """What clients expect to be absent rather than null, by choice."""
        return {}

    def _say(self, choice: Choice, update: Update) -> Said:
        return Said(update.text)

    def prompt_logprobs(self, result: GenerationResult) -> wire.PromptTokenLogprobs | None:
        """Those of a prompt, where the request has asked for them by this name."""
        top, scores = self.body.prompt_logprobs, result.prompt_logprobs
        if top is None or scores is None:
            return None
        return [None, *(self._of_prompt(entry, top) for entry in scores)]

    def _of_prompt(self, entry: PromptLogprob, top: int) -> dict[str, wire.PromptTokenLogprob]:
        found = [(token_id, logprob, rank) for rank, (token_id, logprob) in enumerate(entry.top[:top], start=1)]
        return {
            str(token_id): wire.PromptTokenLogprob(
                logprob=logprob, rank=rank, decoded_token=token_text(token_id, self.tokenizer)
            )
            for token_id, logprob, rank in [(entry.token_id, entry.logprob, entry.rank), *found]
        }

    @abstractmethod
    def _whole(self, head: dict[str, Any]) -> wire.Answer: ...

    @abstractmethod
    def _opening(self) -> Iterator[wire.Answer]: ...

    @abstractmethod
    def _delta(self, index: int, update: Update, said: Said, texts: list[str], parts: list[Region]) -> Any: ...

    def _chunk(self, choices: list[Any], **fields: Any) -> wire.Answer:
        return self.chunk(choices=choices, **self.head, **fields)


def finish_reason(reason: str) -> wire.FinishReason:
    return "stop" if reason == "stop" else "length"
