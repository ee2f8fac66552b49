"""`/v1/responses`: what clients send and what they get."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from gemma_mtp.server.conversation import JsonObjectFormat, JsonSchema, Strict, TextFormat, ToolName, refuse_other_parts
from gemma_mtp.server.protocol import AnyRequest, ReasoningEffort


class InputText(Strict):
    type: Literal["input_text", "output_text", "text"]
    text: str


class Refusal(Strict):
    type: Literal["refusal"]
    refusal: str


InputContent = Annotated[
    str | Annotated[list[InputText | Refusal], Field(fail_fast=True)], BeforeValidator(refuse_other_parts)
]


class MessageItem(Strict):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: InputContent


class FunctionCallItem(Strict):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class FunctionCallOutputItem(Strict):
    type: Literal["function_call_output"]
    call_id: str
    output: InputContent


class ReasoningText(Strict):
    type: Literal["reasoning_text"]
    text: str


class ReasoningSummary(Strict):
    type: Literal["summary_text"]
    text: str


class ReasoningItem(Strict):
    """A thought; its summary counts where there is nothing else of it."""

    type: Literal["reasoning"]
    content: Annotated[list[ReasoningText], Field(fail_fast=True)] | None = None
    summary: Annotated[list[ReasoningSummary], Field(fail_fast=True)] | None = None


class ItemReference(Strict):
    """An item of a stored response."""

    type: Literal["item_reference"]
    id: str


def _with_type(item: object) -> object:
    return {**item, "type": "message"} if isinstance(item, dict) and "type" not in item and "role" in item else item


Item = Annotated[
    Annotated[
        MessageItem | FunctionCallItem | FunctionCallOutputItem | ReasoningItem | ItemReference,
        Field(discriminator="type"),
    ],
    BeforeValidator(_with_type),
]


class ResponseTool(Strict):
    type: Literal["function"]
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedResponseTool(Strict):
    type: Literal["function"]
    name: str


class ResponseSchemaFormat(JsonSchema):
    type: Literal["json_schema"]


class TextOptions(Strict):
    format: Annotated[TextFormat | JsonObjectFormat | ResponseSchemaFormat, Field(discriminator="type")] | None = None
    verbosity: Literal["medium"] | None = Field(None, description="Not offered; say in the input how long it is to be.")


class ReasoningOptions(Strict):
    effort: ReasoningEffort | None = None
    summary: Literal["auto", "detailed"] | None = Field(
        None, description="The whole thought comes as the summary, not as content; a concise one is not offered."
    )


class ResponsesRequest(AnyRequest):
    """As OpenAI's. Fields of chat that are not here, and others that would change the output, are refused by name."""

    model: str | None = None
    input: str | Annotated[list[Item], Field(min_length=1, fail_fast=True)]
    instructions: str | None = Field(None, description="A system message before all others, not kept for later.")
    store: bool | None = Field(None, description="Keep it in memory, to be retrieved and gone on with; default.")
    previous_response_id: str | None = None
    tools: Annotated[list[ResponseTool], Field(fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedResponseTool | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    max_output_tokens: int | None = Field(None, ge=1, lt=2**31)
    truncation: Literal["disabled"] | None = Field(None, description="auto is not offered; shorten the input yourself.")
    background: Literal[False] | None = Field(None, description="Not offered.")
    metadata: dict[str, str] | None = None
    user: str | None = None


Status = Literal["in_progress", "completed", "incomplete", "failed", "cancelled"]


class OutputText(BaseModel):
    type: Literal["output_text"] = "output_text"
    text: str = ""
    annotations: list[str] = []
    logprobs: list[str] = []


class OutputMessage(BaseModel):
    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    status: Status = "in_progress"
    content: list[OutputText] = []


class OutputThought(BaseModel):
    type: Literal["reasoning_text"] = "reasoning_text"
    text: str = ""


class OutputSummary(BaseModel):
    type: Literal["summary_text"] = "summary_text"
    text: str = ""


class OutputReasoning(BaseModel):
    id: str
    type: Literal["reasoning"] = "reasoning"
    status: Status = "in_progress"
    summary: list[OutputSummary] = []
    content: list[OutputThought] = []


class OutputCall(BaseModel):
    id: str
    type: Literal["function_call"] = "function_call"
    status: Status = "in_progress"
    call_id: str
    name: str
    arguments: str = ""


OutputItem = OutputReasoning | OutputMessage | OutputCall


class InputDetails(BaseModel):
    cached_tokens: int
    cache_write_tokens: int = 0


class OutputDetails(BaseModel):
    reasoning_tokens: int


class ResponseUsage(BaseModel):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class Incomplete(BaseModel):
    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ResponseFailure(BaseModel):
    code: str
    message: str


class ModelResponse(BaseModel):
    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Status = "in_progress"
    background: Literal[False] = False
    error: ResponseFailure | None = None
    incomplete_details: Incomplete | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputItem] = []
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: dict[str, Any]
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: Any
    tools: list[dict[str, Any]]
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None
    user: str | None


class ResponseEvent(BaseModel):
    """An event of a stream; the fields beside these depend on its type."""

    model_config = ConfigDict(extra="allow")

    type: str
    sequence_number: int


class DeletedResponse(BaseModel):
    id: str
    object: Literal["response"] = "response"
    deleted: bool = True
