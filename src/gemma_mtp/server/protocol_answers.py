"""Answers of completions and chat, whole and by chunks, as the OpenAPI description has them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from gemma_mtp.chat.marks import Region
from gemma_mtp.engine.result import TokenKind


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class CompletionTokensDetails(BaseModel):
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int
    reasoning_tokens: int = 0


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


FinishReason = Literal["stop", "length", "tool_calls"]


class RoundToken(BaseModel):
    id: int
    text: str
    kind: TokenKind
    part: Region = "text"


class RoundReport(BaseModel):
    """Extension: one round of one choice."""

    drafted: int
    accepted: int
    tokens: list[RoundToken]
    seconds: float


class CompletionLogprobs(BaseModel):
    """With `echo` those of the prompt come first; its first token has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptTokenLogprob(BaseModel):
    """Extension: of a token in a prompt's place. `rank`: 1 for the likeliest of all."""

    logprob: float
    rank: int
    decoded_token: str


#: of each token of a prompt, by token id: it and the likeliest ones; null for the first
PromptTokenLogprobs = list[dict[str, PromptTokenLogprob] | None]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None
    prompt_logprobs: PromptTokenLogprobs | None = None


class Answer(BaseModel):
    """What every answer and every chunk begins with."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage | None = None


class Completion(Answer):
    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]


class CompletionChunk(Completion):
    gemma_mtp: RoundReport | None = None


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatLogprob]
    refusal: None = None


class MadeFunction(BaseModel):
    name: str
    arguments: str


class MadeCall(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: MadeFunction


class ChatMessage(BaseModel):
    """What is null of the last three is left out."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[MadeCall] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason


class ChatCompletion(Answer):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    prompt_logprobs: PromptTokenLogprobs | None = None


class FunctionDelta(BaseModel):
    name: str | None = None
    arguments: str = ""


class CallDelta(BaseModel):
    """A call's beginning, with its id, type and name, or more of its arguments."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class Delta(BaseModel):
    """What is null is left out."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[CallDelta] | None = None


class ChatChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatCompletionChunk(Answer):
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]
    gemma_mtp: RoundReport | None = None
