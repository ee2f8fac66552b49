"""Conversations, tools, and what the output must be, as clients say it."""

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

#: texts of which the output must be one
Choices = Annotated[list[Annotated[str, StringConstraints(min_length=1)]], Field(min_length=1, max_length=1000)]


class TextFormat(Strict):
    type: Literal["text"]


class JsonObjectFormat(Strict):
    type: Literal["json_object"]
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="Extension: as of json_schema.")


class JsonSchema(Strict):
    name: Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class StructuredOutputs(Strict):
    """What the output must be, as vLLM's clients say it; one of these."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: Choices | None = None
    json_object: bool | None = None
