"""Conversations and tools as clients send them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from gemma_mtp.chat.calls import NAME

#: parts that a target of text can not take, and what they are
OTHER_PARTS = {
    "image_url": "images", "input_image": "images", "image": "images", "input_audio": "audio", "audio_url": "audio",
    "audio": "audio", "video_url": "video", "video": "video", "file": "files", "input_file": "files",
}  # fmt: skip


class Strict(BaseModel):
    """Base of what clients send."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class TextPart(Strict):
    type: Literal["text"]
    text: str


def refuse_other_parts(content: object) -> object:
    """Raise ValueError where a list of parts has one that is no text."""
    for part in content if isinstance(content, list) else ():
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind in OTHER_PARTS:
            raise ValueError(f"this model takes no {OTHER_PARTS[kind]}, only text; leave parts of type {kind} out")
    return content


Content = Annotated[
    str | Annotated[list[TextPart], Field(min_length=1, fail_fast=True)], BeforeValidator(refuse_other_parts)
]


class InputMessage(Strict):
    role: Literal["system", "developer", "user"]
    content: Content


class CalledFunction(Strict):
    name: str
    arguments: str = Field(description="The arguments as JSON text.")


class ToolCall(Strict):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class AssistantMessage(Strict):
    role: Literal["assistant"]
    content: Content | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    reasoning_content: str | None = Field(None, description="A thought, which the template renders or drops.")
    reasoning: str | None = Field(None, description="Another name of reasoning_content.")
    function_call: None = Field(None, description="Not offered; use tool_calls.")


class ToolMessage(Strict):
    role: Literal["tool"]
    tool_call_id: str
    content: Content
    name: str | None = None


Message = Annotated[InputMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]

ToolName = Annotated[str, StringConstraints(pattern=f"^{NAME.pattern}$")]


class Function(Strict):
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = Field(None, description="Hold the arguments to the schema, however the tool is chosen.")


class Tool(Strict):
    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    name: str


class NamedTool(Strict):
    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool
