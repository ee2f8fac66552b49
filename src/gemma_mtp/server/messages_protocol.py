"""`/v1/messages`, as Anthropic's clients send and read it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from gemma_mtp.server.conversation import Strict, TextPart, ToolName, refuse_other_parts
from gemma_mtp.server.protocol import AnyRequest, StopText

TextContent = Annotated[str | Annotated[list[TextPart], Field(fail_fast=True)], BeforeValidator(refuse_other_parts)]


class ThoughtBlock(Strict):
    type: Literal["thinking"]
    thinking: str


class HiddenThoughtBlock(Strict):
    """Of another server; it is left out."""

    type: Literal["redacted_thinking"]


class CallBlock(Strict):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class AnswerBlock(Strict):
    type: Literal["tool_result"]
    tool_use_id: str
    content: TextContent | None = None
    is_error: bool | None = None


Block = Annotated[TextPart | ThoughtBlock | HiddenThoughtBlock | CallBlock | AnswerBlock, Field(discriminator="type")]
Blocks = Annotated[
    str | Annotated[list[Block], Field(min_length=1, fail_fast=True)], BeforeValidator(refuse_other_parts)
]


class GivenMessage(Strict):
    role: Literal["user", "assistant"]
    content: Blocks


class MessagesTool(Strict):
    type: Literal["custom"] | None = None
    name: ToolName
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None


class AnyChoice(Strict):
    type: Literal["auto", "any", "none"]
    disable_parallel_tool_use: bool | None = None


class NamedChoice(Strict):
    type: Literal["tool"]
    name: str
    disable_parallel_tool_use: bool | None = None


class ThinkingOn(Strict):
    type: Literal["enabled"]
    budget_tokens: int = Field(ge=0, lt=2**31, description="Thoughts end after so many tokens.")


class ThinkingOther(Strict):
    type: Literal["disabled", "adaptive"]


class CountRequest(Strict):
    """A conversation. Fields that would change the output and are not here are refused by name."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    messages: Annotated[list[GivenMessage], Field(min_length=1, fail_fast=True)]
    system: TextContent | None = None
    tools: Annotated[list[MessagesTool], Field(fail_fast=True)] | None = None
    tool_choice: Annotated[AnyChoice | NamedChoice, Field(discriminator="type")] | None = None
    thinking: Annotated[ThinkingOn | ThinkingOther, Field(discriminator="type")] | None = None


class MessagesRequest(CountRequest, AnyRequest):
    max_tokens: int = Field(ge=1, lt=2**31)
    stop_sequences: Annotated[list[StopText], Field(fail_fast=True)] | None = None
    top_k: int | None = Field(None, ge=-1, lt=2**31)


class MadeText(BaseModel):
    type: Literal["text"] = "text"
    text: str = ""


class MadeThought(BaseModel):
    type: Literal["thinking"] = "thinking"
    thinking: str = ""
    signature: str = ""


class MadeUse(BaseModel):
    type: Literal["tool_use"] = "tool_use"
    id: str
    name: str
    input: dict[str, Any] = {}


MadeBlock = MadeThought | MadeText | MadeUse
StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class MessageUsage(BaseModel):
    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int = 0


class MadeMessage(BaseModel):
    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[MadeBlock] = []
    stop_reason: StopReason | None = None
    stop_sequence: str | None = None
    usage: MessageUsage


class MessageEvent(BaseModel):
    """An event of a stream; the fields beside this one depend on it."""

    model_config = ConfigDict(extra="allow")

    type: str


class TokenCount(BaseModel):
    input_tokens: int
