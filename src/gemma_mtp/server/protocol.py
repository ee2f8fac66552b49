"""Requests of completions and chat: OpenAI's fields, and ours beside them. The OpenAPI description is made from these
models.

Types are exact (no text for numbers), numbers finite, unknown fields ignored, null is the same as a field left out.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, StringConstraints, field_validator

from gemma_mtp.decoding.grammar import MAX_SOURCE_LENGTH
from gemma_mtp.decoding.noise import MAX_DRAFT_TOKENS
from gemma_mtp.decoding.params import MAX_LOGPROBS
from gemma_mtp.decoding.verify import Verification
from gemma_mtp.server.conversation import (
    Choices,
    Content,
    Message,
    ResponseFormat,
    Strict,
    StructuredOutputs,
    Tool,
    ToolChoice,
)

#: a server may allow fewer
MAX_LOGIT_BIAS = 4096

#: numbers that 64 and 32 bits hold
SEEDS, PRIORITIES = 2**63, 2**31

#: -1: no limit but the server's
MaxTokens = Annotated[int, Field(ge=1, lt=2**31)] | Literal[-1]

ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]

#: drafts a round
Drafts = Annotated[int, Field(ge=0, le=MAX_DRAFT_TOKENS)] | Literal["auto"]

TokenId = Annotated[int, Field(ge=0, lt=2**31)]

#: lists end at their first fault, so that a large bad body makes no more errors than one
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]

StopText = Annotated[str, StringConstraints(min_length=1)]

#: a token id as the key of a JSON object
TokenKey = Annotated[str, StringConstraints(pattern=r"^(0|[1-9][0-9]{0,9})$")]

Bias = Annotated[float, Field(ge=-100, le=100)]


class StreamOptions(Strict):
    include_usage: bool | None = Field(None, description="Send a last chunk with the usage.")
    include_rounds: bool | None = Field(
        None, description="Extension: say in each chunk how its round went and how each token came about (`gemma_mtp`)."
    )


class Prediction(Strict):
    type: Literal["content"]
    content: Content


class AnyRequest(Strict):
    """What all routes that generate take under the same names. Fields that are not known are ignored, but for some that
    would change the output, which are refused by name (`fields.REFUSED`)."""

    model_config = ConfigDict(extra="allow")

    stream: bool | None = Field(None, description="Answer by server-sent events, as the output comes.")
    temperature: float | None = Field(None, ge=0, description="0 is greedy; default: the checkpoint's, else 1.")
    top_p: float | None = Field(None, ge=0, le=1, description="0 is greedy; default: the checkpoint's, else 1 (off).")
    seed: int | None = Field(
        None, ge=-SEEDS, lt=SEEDS, description="The same seed gives the same output; choice i has the seed plus i."
    )
    draft_tokens: Drafts | None = Field(
        None, description="Extension: drafts a round; 0 decodes plainly; default: the server's."
    )
    verification: Verification | None = Field(
        None, description="Extension: exact (the default) gives the tokens of plain decoding."
    )

    def same_fields(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in AnyRequest.model_fields}


class GenerationRequest(AnyRequest):
    """What completions and chat have in common."""

    model: str | None = Field(None, description="The served model's name, which is also the default.")
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, lt=2**31, description="Choices for each prompt; default 1.")
    stop: str | Annotated[list[StopText], Field(fail_fast=True)] | None = Field(
        None, description="Text that ends the output, not part of it; the empty text is none."
    )
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[TokenKey, Bias] | None = Field(
        None, max_length=MAX_LOGIT_BIAS, description="Token id -> number added to its logit."
    )
    response_format: ResponseFormat | None = None
    prediction: Prediction | None = Field(None, description="Accepted and not used: the drafter predicts.")
    top_k: int | None = Field(
        None, ge=-1, lt=2**31, description="Extension: 0 and -1 are off; default: the checkpoint's."
    )
    regex: str | None = Field(
        None, min_length=1, max_length=MAX_SOURCE_LENGTH, description="Extension: what the whole output must match."
    )
    guided_json: dict[str, Any] | str | None = Field(None, description="Extension: a JSON schema, or its text.")
    guided_regex: str | None = Field(None, min_length=1, description="Extension: another name of regex.")
    guided_choice: Choices | None = Field(None, description="Extension: texts of which the output is one.")
    structured_outputs: StructuredOutputs | None = Field(None, description="Extension: the same, the newer way.")
    min_p: float | None = Field(None, ge=0, le=1, description="Extension: 0 is off; default: the checkpoint's own.")
    repetition_penalty: float | None = Field(
        None, ge=0.01, le=100, description="Extension: 1 is off; default: the checkpoint's own."
    )
    ignore_eos: bool | None = Field(None, description="Extension: go on after end-of-sequence tokens.")
    stop_token_ids: Annotated[list[TokenId], Field(fail_fast=True)] | None = Field(
        None, description="Extension: token ids that end the output."
    )
    prompt_logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="Extension: the prompt's log-probabilities, not together with stream."
    )
    priority: int | None = Field(
        None, ge=-PRIORITIES, lt=PRIORITIES, description="Extension: of waiting requests the lowest comes first."
    )

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _refuse_many(cls, value: object) -> object:
        """Before the entries are looked at: each bad one would be an error of its own."""
        if isinstance(value, dict) and len(value) > MAX_LOGIT_BIAS:
            raise ValueError(f"there are {len(value)} biased tokens, but at most {MAX_LOGIT_BIAS} are taken")
        return value

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def include_rounds(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_rounds)


class CompletionRequest(GenerationRequest):
    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, fail_fast=True)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)]
    )  # fmt: skip
    max_tokens: Annotated[int, Field(ge=-1, lt=2**31)] | None = Field(
        None, description="Default 16; -1 is what the context has room for; 0, with echo or prompt_logprobs, is none."
    )
    echo: bool | None = Field(None, description="Begin the output with the prompt, with its logprobs if there are any.")
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="Report so many alternatives a token.")
    best_of: Literal[1] | None = Field(None, description="Not offered.")
    suffix: None = Field(None, description="Not offered.")

    @field_validator("best_of", mode="before")
    @classmethod
    def _refuse_best_of(cls, value: object) -> object:
        if value is not None and value != 1:
            raise ValueError("best_of is not offered; ask for n choices with logprobs and keep the likeliest")
        return value


class ChatCompletionRequest(GenerationRequest):
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_tokens: MaxTokens | None = Field(None, description="The older name of max_completion_tokens.")
    max_completion_tokens: MaxTokens | None = Field(None, description="Default, and -1: what the context has room for.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="Alternatives a token, with logprobs.")
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = Field(None, description="What the model may call.")
    tool_choice: ToolChoice | None = Field(
        None, description="none, auto (the default), required, or the function to call."
    )
    parallel_tool_calls: bool | None = Field(None, description="Whether several calls may be made; default.")
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Extension: variables of the chat template, such as enable_thinking."
    )
    reasoning_effort: ReasoningEffort | None = Field(
        None, description="none and minimal switch thinking off, the others on; low and medium limit it."
    )
    max_thinking_tokens: int | None = Field(
        None, ge=0, lt=2**31, description="Extension: thoughts end after so many tokens in all."
    )
    include_reasoning: bool | None = Field(None, description="Extension: whether thoughts are sent; default.")
    add_generation_prompt: bool | None = Field(None, description="Extension: begin the model's turn; default.")
    continue_final_message: bool | None = Field(
        None, description="Extension: go on with the last message, which is the assistant's; begins no turn."
    )
