"""The HTTP application: routes, what they answer, and the OpenAPI description of both."""

from __future__ import annotations

import email.message
import functools
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from importlib import resources
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute, APIRouter
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from gemma_mtp import __version__
from gemma_mtp.server.answers import Answers
from gemma_mtp.server.auth import Guard
from gemma_mtp.server.chat_answers import ChatAnswers
from gemma_mtp.server.completion_answers import CompletionAnswers
from gemma_mtp.server.errors import ApiError, from_validation, shutting_down
from gemma_mtp.server.limits import Intake, parse_json
from gemma_mtp.server.logs import RequestLog, note
from gemma_mtp.server.openapi import BODY, describe, or_events, responses
from gemma_mtp.server.protocol import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    Completion,
    CompletionChunk,
    CompletionRequest,
    DetokenizeRequest,
    DetokenizeResponse,
    Health,
    ModelAbilities,
    ModelCard,
    ModelList,
    TokenizeChatRequest,
    TokenizeRequest,
    TokenizeResponse,
    TokenizerInfo,
)
from gemma_mtp.server.service import Batch, Service
from gemma_mtp.server.settings import ServerSettings
from gemma_mtp.server.tidy import Tidy
from gemma_mtp.server.translate import (
    Prompt,
    chat_requests,
    completion_requests,
    decode,
    encode,
    tokenizer_facts,
)
from gemma_mtp.server.turns import render

#: of the page: its own files only
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",  # asked for again after an upgrade, all files together
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def create_app(service: Service) -> FastAPI:
    """The application over a service, whose engine is started."""
    settings = service.settings
    app = FastAPI(
        title="gemma-mtp",
        version=__version__,
        description="OpenAI's API over Gemma models that decode with a Multi-Token-Prediction drafter.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        exception_handlers={HTTPException: _answer_http_error, RequestValidationError: _answer_validation_error},
        middleware=_middleware(service, settings),
    )
    app.state.service = service
    app.include_router(_api(service, settings))
    app.include_router(_operations(service))
    page = Path(str(resources.files("gemma_mtp") / "server" / "page"))
    app.add_api_route("/", functools.partial(_index, page), include_in_schema=False)
    app.mount("/page", _PageFiles(directory=page))
    app.openapi = functools.cache(lambda: describe(app, service))  # type: ignore[method-assign]
    return app


def _middleware(service: Service, settings: ServerSettings) -> list[Middleware]:
    """From the outside in."""
    origins = [
        Middleware(
            CORSMiddleware, allow_origins=settings.allow_origins, allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],  # clients in pages send headers of their own, such as x-stainless-*
            expose_headers=["X-Request-Id"],
        )
    ]  # fmt: skip
    return [
        Middleware(RequestLog, metrics=service.metrics),
        Middleware(Tidy),
        *(origins if settings.allow_origins else []),
        Middleware(Guard, settings=settings),
        Middleware(Intake, service=service),
    ]


class EventStream(Response):
    """Server-sent events, sent as they come; the client's leaving is `Intake`'s affair."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with aclosing(self._events) as events:  # type: ignore[type-var]  # an async generator
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class _JsonRoute(APIRoute):
    """A route whose body is JSON by declaration and by our own stricter reading."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def checked(request: Request) -> Response:
            if self.body_field is not None and not _is_json(request.headers.get("content-type", "")):
                raise ApiError(415, "the body must be declared as JSON; send 'Content-Type: application/json'.")
            encoding = request.headers.get("content-encoding", "identity").strip().lower()
            if self.body_field is not None and encoding not in ("", "identity"):
                raise ApiError(415, "the body must not be compressed; send it without Content-Encoding.")
            return await handle(_JsonRequest(request.scope, request.receive))

        return checked


class _JsonRequest(Request):
    async def json(self) -> Any:
        return parse_json(await self.body(), self.app.state.service.settings.max_json_depth)


def _is_json(content_type: str) -> bool:
    message = email.message.Message()
    message["content-type"] = content_type
    return message.get_content_type() == "application/json"


def _api(service: Service, settings: ServerSettings) -> APIRouter:
    api = APIRouter(route_class=_JsonRoute)
    limited = responses(*BODY)

    @api.post("/v1/completions", response_model=Completion, responses=or_events(limited, CompletionChunk))
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Complete prompts."""
        _check_model(body.model, settings)
        prompts, requests = await completion_requests(body, service)
        batch = service.submit(requests, request.state.deadline)
        return await _answer(CompletionAnswers(body, service, batch, prompts), request, settings)

    @api.post("/v1/chat/completions", response_model=ChatCompletion, responses=or_events(limited, ChatCompletionChunk))
    async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
        """Answer a conversation."""
        _check_model(body.model, settings)
        prompt, requests, tools = await chat_requests(body, service)
        batch = service.submit(requests, request.state.deadline)
        return await _answer(ChatAnswers(body, service, batch, [prompt], tools), request, settings)

    @api.get("/v1/models", responses=responses())
    async def models() -> ModelList:
        """The served model."""
        return ModelList(data=[_card(service)])

    @api.get("/v1/models/{model_id:path}", responses=responses(404))
    async def model(model_id: str) -> ModelCard:
        """The served model, by its name."""
        _check_model(model_id, settings)
        return _card(service)

    @api.post("/tokenize", responses=responses(*BODY))
    async def tokenize(body: TokenizeRequest) -> TokenizeResponse:
        """Token ids of a text or a conversation."""
        _check_model(body.model, settings)
        if isinstance(body, TokenizeChatRequest):
            text = render(body.messages, service, body.add_generation_prompt is not False)
            tokens = await encode(text, service, special=False)
        else:
            tokens = await encode(body.prompt, service, body.add_special_tokens is not False)
        strings = (
            [service.tokenizer.raw.id_to_token(token) or "" for token in tokens] if body.return_token_strs else None
        )
        return TokenizeResponse(
            count=len(tokens), max_model_len=service.engine.max_tokens, tokens=tokens, token_strs=strings
        )

    @api.get("/tokenizer_info", responses=responses())
    async def tokenizer_info() -> TokenizerInfo:
        """What clients that encode here need to know of the tokenizer."""
        return tokenizer_facts(service)

    @api.post("/detokenize", responses=responses(*BODY))
    async def detokenize(body: DetokenizeRequest) -> DetokenizeResponse:
        """The text of token ids."""
        _check_model(body.model, settings)
        return DetokenizeResponse(prompt=decode(body.tokens, service))

    return api


def _operations(service: Service) -> APIRouter:
    """Routes for those who run the server."""
    api = APIRouter()

    @api.get("/health", responses=responses(503))
    @api.get("/health/live", responses=responses(503))
    async def live() -> Health:
        """The server answers and its engine runs."""
        if not (service.engine.alive or service.draining):
            raise ApiError(503, "the engine has stopped; start the server anew.")
        if service.engine.step_seconds > service.settings.request_seconds:
            raise ApiError(503, "the engine hangs: a step takes longer than a request may; start the server anew.")
        return Health()

    @api.get("/health/ready", responses=responses(503))
    async def ready() -> Health:
        """The server takes requests."""
        if service.draining:
            raise shutting_down()
        return Health()

    @api.get("/metrics", response_class=Response, responses={**responses(), 200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Prometheus metrics."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return api


async def _answer(answers: Answers, request: Request, settings: ServerSettings) -> Response:
    body, batch = answers.body, answers.batch
    request.state.cleanup.callback(_note_batch, request, batch, answers.prompts, settings)
    request.state.cleanup.callback(batch.close)
    if body.stream:
        return EventStream(answers.events())
    whole = await answers.whole()
    return Response(answers.to_json(whole), media_type="application/json")


def _note_batch(request: Request, batch: Batch, prompts: list[Prompt], settings: ServerSettings) -> None:
    """What the log says of the generations; their texts only where that was asked for."""
    results = [generation.result for generation in batch.generations]
    first = batch.first_token_seconds
    fields: dict[str, Any] = {
        "prompt_tokens": sum(len(prompt.token_ids) for prompt in prompts),
        "completion_tokens": sum(len(result.token_ids) for result in results),
        "draft_tokens": sum(result.drafted for result in results),
        "accepted_tokens": sum(result.accepted for result in results),
        "first_token_seconds": None if first is None else round(first, 6),
        "finish": batch.reasons,
    }
    if batch.failure is not None:
        fields["error"] = str(batch.failure)
    if settings.log_text:
        fields["prompt_text"] = [prompt.text for prompt in prompts]
        fields["output_text"] = [result.text for result in results]
    note(request.scope, **fields)


def _card(service: Service) -> ModelCard:
    return ModelCard(
        id=service.settings.model_name,
        created=service.created,
        max_model_len=service.engine.max_tokens,
        gemma_mtp=ModelAbilities(
            chat=service.tokenizer.chat_template is not None, drafter=service.engine.pair.drafter is not None
        ),
    )


def _check_model(name: str | None, settings: ServerSettings) -> None:
    if name is not None and name != settings.model_name:
        shown = name if len(name) <= 100 else name[:100] + "..."
        message = f"there is no model {shown!r}; this server has {settings.model_name!r}."
        raise ApiError(404, message, param="model", code="model_not_found")


async def _answer_http_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if isinstance(error, ApiError):
        return error.response()
    sentences = {404: "there is nothing at this path.", 405: "this path does not take this method."}
    message = sentences.get(error.status_code, str(error.detail))
    return ApiError(error.status_code, message, headers=error.headers).response()


async def _answer_validation_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return from_validation(error.errors()).response()


async def _index(page: Path) -> FileResponse:
    return FileResponse(page / "index.html", headers=PAGE_HEADERS)


class _PageFiles(StaticFiles):
    """The page's files, with its headers."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(PAGE_HEADERS)
        return response
