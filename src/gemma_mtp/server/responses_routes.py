"""Routes of `/v1/responses`."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from gemma_mtp.server.errors import ApiError
from gemma_mtp.server.one_turn import begun_turn
from gemma_mtp.server.openapi import BODY, or_events, responses
from gemma_mtp.server.response_store import ResponseStore
from gemma_mtp.server.responses_answers import ResponseAnswers
from gemma_mtp.server.responses_protocol import DeletedResponse, ModelResponse, ResponseEvent, ResponsesRequest
from gemma_mtp.server.responses_translate import NAMES, chat_fields, check_fields, items_of
from gemma_mtp.server.routing import JsonRoute, answered, check_model
from gemma_mtp.server.service import Service


def responses_routes(service: Service) -> APIRouter:
    api, settings = APIRouter(route_class=JsonRoute), service.settings
    store = ResponseStore(settings.max_stored_responses, settings.max_stored_characters)

    @api.post("/v1/responses", response_model=ModelResponse, responses=or_events(responses(*BODY), ResponseEvent))
    async def create(body: ResponsesRequest, request: Request) -> Response:
        """Answer, go on with an answer, and keep it."""
        check_model(body.model, settings)
        check_fields(body)
        given = items_of(body, store)
        fields = chat_fields(body, [*store.history(body.previous_response_id), *given])
        turn = await begun_turn(fields, NAMES, request, service)
        answers = ResponseAnswers(body, given, turn, service, store)
        request.state.cleanup.callback(answers.abandon)
        return await answered(answers, body.stream)

    @api.get("/v1/responses/{response_id}", responses=responses(404))
    async def retrieve(response_id: str) -> ModelResponse:
        """A stored response."""
        return store.get(response_id).response

    @api.delete("/v1/responses/{response_id}", responses=responses(404))
    async def delete(response_id: str) -> DeletedResponse:
        """Keep a response no longer; what is in work goes on."""
        store.delete(response_id)
        return DeletedResponse(id=response_id)

    @api.post("/v1/responses/{response_id}/cancel", responses=responses(*BODY))
    async def cancel(response_id: str) -> ModelResponse:
        """End a stored response that is in work."""
        stored = store.get(response_id)
        if stored.batch is None:
            raise ApiError(400, f"the response is {stored.response.status} already; only one in work can be cancelled.")
        stored.cancelled = True
        stored.response.status = "cancelled"
        stored.batch.cancel()
        return stored.response

    return api
