"""The OpenAPI description: what FastAPI makes of the models, with this server's own answers, limits and keys."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from gemma_mtp.server.auth import is_public
from gemma_mtp.server.protocol_others import ErrorResponse
from gemma_mtp.server.service import Service

MEANINGS = {
    400: "The request is not as it must be.",
    401: "No valid API key.",
    403: "The Host is not this machine's own name, and there are no keys.",
    404: "There is no such model.",
    408: "The body did not arrive, or the answer was not ready, in time.",
    413: "The body is too large.",
    415: "The body is not declared as JSON.",
    429: "Too many requests are in work or waiting; Retry-After says when to try again.",
    431: "The headers are too many or too long.",
    500: "The server failed.",
    503: "The server is shutting down.",
}
#: what every route may answer, and every route with a body
ALWAYS = (400, 431, 500)
BODY = (404, 408, 413, 415, 429, 503)

Responses = dict[int | str, dict[str, Any]]
Schema = dict[str, Any]


def responses(*statuses: int) -> Responses:
    """A route's errors."""
    return {
        status: {"model": ErrorResponse, "description": MEANINGS[status]} for status in sorted((*statuses, *ALWAYS))
    }


def or_events(errors: Responses, chunk: type[BaseModel]) -> Responses:
    """The errors, and that the answer may be a stream of chunks."""
    description = f"The answer; with `stream`, events whose data is a {chunk.__name__}, an error, or [DONE]."
    events = {"text/event-stream": {"schema": {"type": "string", "description": f"data: {chunk.__name__}"}}}
    return {**errors, 200: {"description": description, "content": events}}


def describe(app: FastAPI, service: Service) -> Schema:
    """The description of a server with these settings and this model."""
    described = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    settings = service.settings
    for path, operations in described["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)  # such errors are answered by 400
            if settings.loopback_names_only:
                operation["responses"]["403"] = _error(403)
            if settings.api_keys and not is_public(path, settings):
                operation["security"] = [{"key": []}]
                operation["responses"]["401"] = _error(401)
    schemas = described["components"]["schemas"]
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    _tighten(schemas, service)
    if settings.api_keys:
        described["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return described


def _error(status: int) -> Schema:
    schema = {"$ref": "#/components/schemas/ErrorResponse"}
    return {"description": MEANINGS[status], "content": {"application/json": {"schema": schema}}}


def _tighten(schemas: Schema, service: Service) -> None:
    """Put the server's limits into the requests' schemas."""
    settings, engine = service.settings, service.engine
    last = engine.pair.target.config.vocab_size - 1
    schemas["CompletionRequest"]["not"] = {"properties": {"max_tokens": {"const": 0}}, "required": ["max_tokens"]}
    for name, schema in schemas.items():
        fields = schema.get("properties", {})
        if not name.endswith("Request"):
            continue
        _limit(fields, "model", "string", enum=[settings.model_name])
        _limit(fields, "n", "integer", maximum=min(settings.max_choices, engine.settings.max_waiting))
        _limit(fields, "logit_bias", "object", maxProperties=settings.max_logit_bias, additionalProperties=False)
        _limit(fields, "stop", "string", maxLength=settings.max_stop_characters)
        _limit(fields, "stop", "array", maxItems=settings.max_stop)
        _limit(fields, "tools", "array", maxItems=settings.max_tools)
        _limit(fields, "stop_token_ids", "array", maxItems=settings.max_logit_bias)
        if settings.max_output_tokens is not None:
            _limit(fields, "max_tokens", "integer", maximum=settings.max_output_tokens)
            _limit(fields, "max_completion_tokens", "integer", maximum=settings.max_output_tokens)
        for field in ("prompt", "tokens", "stop_token_ids"):
            for part in _parts(fields.get(field, {})):
                if part.get("type") == "integer":
                    part.pop("exclusiveMaximum", None)
                    part["maximum"] = last
                elif field == "prompt" and part.get("type") == "array":
                    tokens = part["items"].get("type") == "integer"
                    part["maxItems"] = service.longest_prompt if tokens else settings.max_prompts


def _limit(fields: Schema, name: str, kind: str, **limits: Any) -> None:
    for schema in _parts(fields.get(name, {})):
        if schema.get("type") == kind:
            schema.update(limits)


def _parts(schema: Schema) -> list[Schema]:
    """A field's schema, those of its forms, and those of its elements."""
    parts = [schema]
    for inner in (*schema.get("anyOf", ()), *([schema["items"]] if "items" in schema else ())):
        parts += _parts(inner)
    return parts
