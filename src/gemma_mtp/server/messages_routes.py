"""Routes of `/v1/messages`."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from gemma_mtp.server import messages_protocol as wire
from gemma_mtp.server.messages_answers import MessageAnswers
from gemma_mtp.server.messages_translate import NAMES, chat_fields, check_fields
from gemma_mtp.server.one_turn import begun_turn, planned
from gemma_mtp.server.openapi import BODY, or_events, responses
from gemma_mtp.server.routing import JsonRoute, answered, check_model
from gemma_mtp.server.service import Service


def messages_routes(service: Service) -> APIRouter:
    api, settings = APIRouter(route_class=JsonRoute), service.settings

    @api.post("/v1/messages", response_model=wire.MadeMessage, responses=or_events(responses(*BODY), wire.MessageEvent))
    async def create(body: wire.MessagesRequest, request: Request) -> Response:
        """Answer a conversation in Anthropic's form."""
        check_model(body.model, settings)
        check_fields(body)
        turn = await begun_turn(chat_fields(body), NAMES, request, service)
        thoughts = body.thinking is None or body.thinking.type != "disabled"
        return await answered(MessageAnswers(turn, service, thoughts), body.stream)

    @api.post("/v1/messages/count_tokens", responses=responses(*BODY))
    async def count(body: wire.CountRequest) -> wire.TokenCount:
        """The tokens of a conversation in Anthropic's form."""
        check_model(body.model, settings)
        check_fields(body)
        plan = await planned(chat_fields(body), service, NAMES)
        return wire.TokenCount(input_tokens=len(plan.prompt.token_ids))

    return api
