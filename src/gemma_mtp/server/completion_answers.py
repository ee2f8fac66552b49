"""From generations to completions of prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from gemma_mtp.chat.marks import Region
from gemma_mtp.engine.request import Update
from gemma_mtp.engine.result import TokenLogprob
from gemma_mtp.server.answers import Answers, Choice, Said, finish_reason, token_text
from gemma_mtp.server.protocol import CompletionRequest
from gemma_mtp.server.protocol_answers import Answer, Completion, CompletionChoice, CompletionChunk, CompletionLogprobs
from gemma_mtp.server.service import Batch, Service
from gemma_mtp.server.translate import Prompt


class CompletionAnswers(Answers):
    prefix, chunk = "cmpl", CompletionChunk
    body: CompletionRequest

    def __init__(self, body: CompletionRequest, service: Service, batch: Batch, prompts: Sequence[Prompt]) -> None:
        super().__init__(body, service, batch, prompts)
        self._echoed: set[int] = set()
        for index, choice in enumerate(self.choices):
            choice.offset = len(self._echo(index))

    def _whole(self, head: dict[str, Any]) -> Completion:
        return Completion(choices=[self._choice(i) for i in range(len(self.choices))], **head)

    def _choice(self, index: int) -> CompletionChoice:
        choice = self.choices[index]
        result = choice.generation.result
        return CompletionChoice(
            index=index,
            text=self._echo(index) + (result.text or ""),
            logprobs=_joined(self._of_echo(index), self._logprobs(choice, result.logprobs, choice.texts)),
            finish_reason=finish_reason(result.finish_reason),
            prompt_logprobs=self.prompt_logprobs(result),
        )

    def _opening(self) -> Iterator[Answer]:
        for index in range(len(self.choices)):
            echo = self._echo(index)
            if echo and not self._scored_echo:  # else it comes with its log-probabilities
                yield self._chunk([CompletionChoice(index=index, text=echo)])

    def _delta(self, index: int, update: Update, said: Said, texts: list[str], parts: list[Region]) -> CompletionChoice:
        choice, text = self.choices[index], said.text
        logprobs = self._logprobs(choice, update.logprobs, texts)
        if self._scored_echo and index not in self._echoed:
            self._echoed.add(index)
            text, logprobs = self._echo(index) + text, _joined(self._of_echo(index), logprobs)
        return CompletionChoice(
            index=index,
            text=text,
            logprobs=logprobs,
            finish_reason=None if update.finish_reason is None else finish_reason(update.finish_reason),
        )

    def _nulls(self, answer: Answer) -> dict[int, Any]:
        choices = answer.choices  # type: ignore[attr-defined]
        return {i: {"prompt_logprobs": True} for i, choice in enumerate(choices) if choice.prompt_logprobs is None}

    def _prompt(self, index: int) -> Prompt:
        return self.prompts[index // (len(self.batch.generations) // len(self.prompts))]

    def _echo(self, index: int) -> str:
        return self._prompt(index).text if self.body.echo else ""

    @property
    def _scored_echo(self) -> bool:
        return bool(self.body.echo) and self.body.logprobs is not None

    def _of_echo(self, index: int) -> CompletionLogprobs | None:
        """The log-probabilities of a choice's prompt, which is echoed; of its first token there are none."""
        scores = self.batch.generations[index].result.prompt_logprobs
        if not self._scored_echo or scores is None:
            return None
        prompt, top = self._prompt(index), self.body.logprobs or 0
        decoder = self.tokenizer.stream(skip_special_tokens=not prompt.special)
        offsets, length = [], 0
        for token_id in prompt.token_ids:
            offsets.append(length)
            length += len(decoder.push([token_id]))
        return CompletionLogprobs(
            tokens=[self._name(token_id) for token_id in prompt.token_ids],
            token_logprobs=[None, *(entry.logprob for entry in scores)],
            top_logprobs=[None, *(self._top(entry, top) for entry in scores)],
            text_offset=offsets,
        )

    def _logprobs(
        self, choice: Choice, logprobs: list[TokenLogprob] | None, texts: list[str]
    ) -> CompletionLogprobs | None:
        if logprobs is None:
            return None
        offsets = []
        for text in texts:
            offsets.append(choice.offset)
            choice.offset += len(text)
        return CompletionLogprobs(
            tokens=[self._name(entry.token_id) for entry in logprobs],
            token_logprobs=[entry.logprob for entry in logprobs],
            top_logprobs=[self._top(entry, len(entry.top)) for entry in logprobs],
            text_offset=offsets,
        )

    def _top(self, entry: TokenLogprob, count: int) -> dict[str, float]:
        """By text, the chosen token among them; of several tokens with one text, the likeliest."""
        top: dict[str, float] = {}
        for token_id, logprob in (*entry.top[:count], (entry.token_id, entry.logprob)):
            top.setdefault(self._name(token_id), logprob)
        return top

    def _name(self, token_id: int) -> str:
        """A token's text; of a part of a character its bytes, as OpenAI writes them, so that they can be told apart."""
        text = token_text(token_id, self.tokenizer)
        if "\ufffd" not in text:
            return text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.tokenizer.token_bytes(token_id))


def _joined(first: CompletionLogprobs | None, then: CompletionLogprobs | None) -> CompletionLogprobs | None:
    if first is None or then is None:
        return first or then
    return CompletionLogprobs(
        tokens=first.tokens + then.tokens,
        token_logprobs=first.token_logprobs + then.token_logprobs,
        top_logprobs=first.top_logprobs + then.top_logprobs,
        text_offset=first.text_offset + then.text_offset,
    )
