"""The HTTP application: routes, what they answer, and the OpenAPI description of both."""

from __future__ import annotations

import functools
from importlib import resources
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRouter
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.staticfiles import StaticFiles

from gemma_mtp import __version__
from gemma_mtp.chat.prompt import thinking_variable
from gemma_mtp.server import protocol_others as wire
from gemma_mtp.server.auth import Guard, for_pages
from gemma_mtp.server.chat_answers import ChatAnswers
from gemma_mtp.server.completion_answers import CompletionAnswers
from gemma_mtp.server.errors import ApiError, from_validation, shutting_down
from gemma_mtp.server.limits import Intake
from gemma_mtp.server.logs import RequestLog
from gemma_mtp.server.messages_routes import messages_routes
from gemma_mtp.server.openapi import BODY, describe, or_events, responses
from gemma_mtp.server.protocol import ChatCompletionRequest, CompletionRequest
from gemma_mtp.server.protocol_answers import ChatCompletion, ChatCompletionChunk, Completion, CompletionChunk
from gemma_mtp.server.responses_routes import responses_routes
from gemma_mtp.server.routing import JsonRoute, answered, begun, check_model
from gemma_mtp.server.service import Service
from gemma_mtp.server.settings import ServerSettings
from gemma_mtp.server.tidy import Tidy
from gemma_mtp.server.translate import (
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
    app.include_router(_generation(service, settings))
    app.include_router(_tokens(service, settings))
    app.include_router(responses_routes(service))
    app.include_router(messages_routes(service))
    app.include_router(_operations(service))
    page = Path(str(resources.files("gemma_mtp") / "server" / "page"))
    app.add_api_route("/", functools.partial(_index, page), include_in_schema=False)
    app.mount("/page", _PageFiles(directory=page))
    app.openapi = functools.cache(lambda: describe(app, service))  # type: ignore[method-assign]
    return app


def _middleware(service: Service, settings: ServerSettings) -> list[Middleware]:
    """From the outside in."""
    return [
        Middleware(RequestLog, metrics=service.metrics),
        Middleware(Tidy),
        Middleware(for_pages, settings=settings),
        Middleware(Guard, settings=settings),
        Middleware(Intake, service=service),
    ]


def _generation(service: Service, settings: ServerSettings) -> APIRouter:
    """Routes that generate as OpenAI's first two do, and the served model."""
    api = APIRouter(route_class=JsonRoute)
    limited = responses(*BODY)

    @api.post("/v1/completions", response_model=Completion, responses=or_events(limited, CompletionChunk))
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Complete prompts."""
        check_model(body.model, settings)
        prompts, requests = await completion_requests(body, service)
        batch = begun(requests, prompts, request, service)
        return await answered(CompletionAnswers(body, service, batch, prompts), body.stream)

    @api.post("/v1/chat/completions", response_model=ChatCompletion, responses=or_events(limited, ChatCompletionChunk))
    async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
        """Answer a conversation."""
        check_model(body.model, settings)
        prompt, requests, tools = await chat_requests(body, service)
        batch = begun(requests, [prompt], request, service)
        return await answered(ChatAnswers(body, service, batch, [prompt], tools), body.stream)

    @api.get("/v1/models", responses=responses())
    async def models() -> wire.ModelList:
        """The served model."""
        return wire.ModelList(data=[_card(service)])

    @api.get("/v1/models/{model_id:path}", responses=responses(404))
    async def model(model_id: str) -> wire.ModelCard:
        """The served model, by its name."""
        check_model(model_id, settings)
        return _card(service)

    return api


def _tokens(service: Service, settings: ServerSettings) -> APIRouter:
    """Routes between text and token ids."""
    api = APIRouter(route_class=JsonRoute)

    @api.post("/tokenize", responses=responses(*BODY))
    async def tokenize(body: wire.TokenizeRequest) -> wire.TokenizeResponse:
        """Token ids of a text or a conversation."""
        check_model(body.model, settings)
        if isinstance(body, wire.TokenizeChatRequest):
            text = render(body.messages, service, body.add_generation_prompt is not False)
            tokens = await encode(text, service, special=False)
        else:
            tokens = await encode(body.prompt, service, body.add_special_tokens is not False)
        named = service.tokenizer.raw.id_to_token
        strings = [named(token) or "" for token in tokens] if body.return_token_strs else None
        return wire.TokenizeResponse(
            count=len(tokens), max_model_len=service.engine.max_tokens, tokens=tokens, token_strs=strings
        )

    @api.get("/tokenizer_info", responses=responses())
    async def tokenizer_info() -> wire.TokenizerInfo:
        """What clients that encode here need to know of the tokenizer."""
        return tokenizer_facts(service)

    @api.post("/detokenize", responses=responses(*BODY))
    async def detokenize(body: wire.DetokenizeRequest) -> wire.DetokenizeResponse:
        """The text of token ids."""
        check_model(body.model, settings)
        return wire.DetokenizeResponse(prompt=decode(body.tokens, service))

    return api


def _operations(service: Service) -> APIRouter:
    """Routes for those who run the server."""
    api = APIRouter()

    @api.get("/health", responses=responses(503))
    @api.get("/health/live", responses=responses(503))
    async def live() -> wire.Health:
        """The server answers and its engine runs."""
        if not (service.engine.alive or service.draining):
            raise ApiError(503, "the engine has stopped; start the server anew.")
        if service.engine.step_seconds > service.settings.request_seconds:
            raise ApiError(503, "the engine hangs: a step takes longer than a request may; start the server anew.")
        return wire.Health()

    @api.get("/health/ready", responses=responses(503))
    async def ready() -> wire.Health:
        """The server takes requests."""
        if service.draining:
            raise shutting_down()
        return wire.Health()

    @api.get("/metrics", response_class=Response, responses={**responses(), 200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Prometheus metrics."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return api


def _card(service: Service) -> wire.ModelCard:
    return wire.ModelCard(
        id=service.settings.model_name,
        created=service.created,
        max_model_len=service.engine.max_tokens,
        gemma_mtp=wire.ModelAbilities(
            chat=service.tokenizer.chat_template is not None,
            drafter=service.engine.pair.drafter is not None,
            thinking=thinking_variable(service.tokenizer) is not None,
        ),
    )


async def _answer_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if not isinstance(error, ApiError):
        sentences = {404: "there is nothing at this path.", 405: "this path does not take this method."}
        message = sentences.get(error.status_code, str(error.detail))
        error = ApiError(error.status_code, message, headers=error.headers)
    return error.response(request.url.path)


async def _answer_validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return from_validation(error.errors()).response(request.url.path)


async def _index(page: Path) -> FileResponse:
    return FileResponse(page / "index.html", headers=PAGE_HEADERS)


class _PageFiles(StaticFiles):
    """The page's files, with its headers."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(PAGE_HEADERS)
        return response
