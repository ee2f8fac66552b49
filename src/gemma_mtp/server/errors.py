"""Errors in the shape that OpenAI's clients read: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import HTTPException
from starlette.responses import JSONResponse

from gemma_mtp.errors import EngineError, GemmaMtpError, QueueFullError

#: status -> the error's type and its code where nothing more exact is said
KINDS: dict[int, tuple[str, str]] = {
    400: ("invalid_request_error", "invalid_value"),
    401: ("authentication_error", "invalid_api_key"),
    403: ("permission_error", "host_not_allowed"),
    404: ("invalid_request_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    408: ("timeout_error", "request_timeout"),
    413: ("invalid_request_error", "request_too_large"),
    415: ("invalid_request_error", "unsupported_media_type"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
    431: ("invalid_request_error", "headers_too_large"),
    500: ("server_error", "internal_error"),
    503: ("server_error", "service_unavailable"),
}
#: field errors that one message names, where a value fits none of several forms
MAX_DETAILS = 3
#: where Anthropic's clients ask
MESSAGES = "/v1/messages"


class ApiError(HTTPException):
    """An error to answer a request with: `message` is one sentence for the client, `param` the field it is about."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.param, self.code = param, code

    @property
    def body(self) -> dict[str, Any]:
        kind, code = KINDS.get(self.status_code, KINDS[400] if self.status_code < 500 else KINDS[500])
        return {
            "error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code or code},
        }

    def body_at(self, path: str) -> dict[str, Any]:
        """The body in the form of a route's clients."""
        return as_messages_error(self) if path.startswith(MESSAGES) else self.body

    def response(self, path: str = "") -> JSONResponse:
        return JSONResponse(self.body_at(path), self.status_code, self.headers)


def as_messages_error(error: ApiError) -> dict[str, Any]:
    """An error's body as Anthropic's clients read it, with what OpenAI's has."""
    kinds = {404: "not_found_error", 413: "request_too_large", 503: "overloaded_error", 500: "api_error"}
    body = error.body["error"]
    return {"type": "error", "error": {**body, "type": kinds.get(error.status_code, body["type"])}}


def wrong_field(param: str, message: str) -> ApiError:
    """A field that asks for what can not be done; `message` has no full stop."""
    return ApiError(400, f"{param}: {message}.", param=param)


def internal_error() -> ApiError:
    """What a client learns of a failure inside: nothing of what failed."""
    return ApiError(500, "the server failed on this request; its log says why, under the request's X-Request-Id.")


def too_long(tokens: int, most: int, context: int) -> ApiError:
    """A prompt that does not fit. Clients tell it by these very words: litellm by the first ones, LangChain by the last
    ones, OpenAI's own by the code."""
    message = (
        f"This model's maximum context length is {context} tokens. However, the prompt has {tokens} tokens, of at most"
        f" {most}. Input tokens exceed the configured limit."
    )
    return ApiError(400, message, param="prompt", code="context_length_exceeded")


def retry_later(message: str, seconds: float = 1.0) -> ApiError:
    return ApiError(429, message, headers={"Retry-After": str(max(1, math.ceil(seconds)))})


def shutting_down() -> ApiError:
    return ApiError(503, "the server is shutting down; send the request to another one.", code="shutting_down")


def from_engine(error: GemmaMtpError) -> ApiError:
    """The answer to a request that the engine does not take."""
    if isinstance(error, QueueFullError):
        return retry_later(str(error), error.retry_after)
    if isinstance(error, EngineError):
        return shutting_down()
    return ApiError(400, str(error))


#: what pydantic calls an error -> what it means, with the names that its context gives
WORDS: dict[str, str] = {
    "missing": "it is missing",
    "string_type": "must be text", "string_too_short": "must not be empty",
    "string_pattern_mismatch": "has another form",
    "string_too_long": "has more than {max_length} characters",
    "int_type": "must be a whole number", "int_from_float": "must be a whole number",
    "int_parsing_size": "is too large a number", "float_type": "must be a number",
    "finite_number": "must be a finite number", "bool_type": "must be true or false",
    "list_type": "must be a list", "dict_type": "must be an object", "model_type": "must be an object",
    "model_attributes_type": "must be an object", "none_required": "must be left out",
    "too_short": "must have {min_length} or more", "too_long": "must have {max_length} or fewer",
    "greater_than": "must be above {gt}", "greater_than_equal": "must be {ge} or more",
    "less_than": "must be below {lt}", "less_than_equal": "must be {le} or less",
    "literal_error": "must be {expected}",
    "union_tag_invalid": "its {discriminator} must be one of {expected_tags}",
    "union_tag_not_found": "its {discriminator} is missing",
    "value_error": "{error}", "json_invalid": "is not valid JSON",
}  # fmt: skip


def _said(error: Mapping[str, Any]) -> str:
    """An error in words of ours."""
    context = {name: f"{value}".replace("'", "") for name, value in error.get("ctx", {}).items()}
    return WORDS.get(error["type"], "is not as it must be").format(**context)


def from_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The answer to a body whose fields are not as they must be: what is wrong with the first such field.

    A value that fits none of several forms has an error for each; their places begin alike. The input is not repeated.
    """
    field = errors[0]["loc"][:2]
    alike = [error for error in errors if error["loc"][:2] == field]
    ours = [error for error in alike if error["type"] == "value_error"] or alike
    details = dict.fromkeys(map(_said, ours))
    path = alike[0]["loc"] if len(alike) == 1 else field
    param = _path(path[1:])
    message = "; or ".join(list(details)[:MAX_DETAILS])
    return ApiError(400, f"{param or 'the body'}: {message}.", param=param or None)


def _path(parts: Sequence[str | int]) -> str:
    """Such as messages[0].content."""
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return path.removeprefix(".")
