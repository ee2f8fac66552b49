"""Requests and answers of the routes beside those that generate: tokens, models, health, errors."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from gemma_mtp.server.conversation import Message, Strict
from gemma_mtp.server.protocol import TokenId


class TokenizeTextRequest(Strict):
    model: str | None = None
    prompt: str
    add_special_tokens: bool | None = Field(
        None, description="Begin with the BOS token where the files say so; default."
    )
    return_token_strs: bool | None = None


class TokenizeChatRequest(Strict):
    """A conversation, rendered by the chat template first."""

    model: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    add_generation_prompt: bool | None = Field(None, description="Begin the model's turn; default.")
    return_token_strs: bool | None = None


TokenizeRequest = TokenizeTextRequest | TokenizeChatRequest


class DetokenizeRequest(Strict):
    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


class TokenizeResponse(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeResponse(BaseModel):
    prompt: str


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    error: ErrorBody


class TokenizerInfo(BaseModel):
    """Extension: what a client needs to know of the tokenizer, beside /tokenize and /detokenize."""

    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    unk_token_id: int | None
    vocab_size: int
    model_max_length: int
    chat_template: str | None


class ModelAbilities(BaseModel):
    """Extension: whether the model can answer conversations, whether there is a drafter for it, and whether its chat
    template has a switch for thinking."""

    chat: bool
    drafter: bool
    thinking: bool


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "gemma-mtp"
    max_model_len: int
    gemma_mtp: ModelAbilities


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    status: Literal["ok"] = "ok"
