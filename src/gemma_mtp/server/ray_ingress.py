"""What stands before the engine replicas on Ray Serve: keys and limits, the way to a replica, words for its loss."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any, cast

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from starlette.routing import Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gemma_mtp.server.auth import Guard, for_pages
from gemma_mtp.server.errors import MESSAGES, ApiError, internal_error, retry_later
from gemma_mtp.server.limits import Intake, parse_json
from gemma_mtp.server.metrics import PREFIX
from gemma_mtp.server.ray_routing import conversation_of
from gemma_mtp.server.response_store import server_of
from gemma_mtp.server.service import InWork, Service
from gemma_mtp.server.settings import ServerSettings

#: replicas that a request is sent to before it fails, each after the loss of the one before
TRIES = 2
#: seconds that a request without a body, or a look at all replicas' metrics, waits for an answer
SHORT_SECONDS = 10.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Forwarded:
    """A request on its way from the ingress to a replica: what counts of its ASGI scope, its body, its conversation,
    and the replica that has the stored response which it is about, or ""."""

    method: str
    path: str
    query_string: bytes
    headers: list[tuple[bytes, bytes]]
    client: tuple[str, int] | None
    body: bytes
    conversation: str
    replica: str

    def scope(self) -> Scope:
        return {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "scheme": "http",
            "method": self.method, "path": self.path, "raw_path": self.path.encode(), "root_path": "",
            "query_string": self.query_string, "headers": self.headers, "client": self.client, "server": None,
            "state": {},
        }  # fmt: skip


class ReplicaLostError(Exception):
    """A replica that went, or had to go, while it answered."""


class Door(InWork):
    """The ingress as an ASGI application: keys and limits, then a replica, and words for what may befall it.

    It has what `Intake` asks of a service: settings, and a count of requests.
    """

    draining = False  # Serve sends nothing more to a process that is to end

    def __init__(self, settings: ServerSettings, replicas: DeploymentHandle[Any], name: str) -> None:
        self.settings, self.metrics = settings, IngressMetrics(settings.metrics_prefix)
        super().__init__(self.metrics.in_flight)
        self._name, self._all = name, replicas
        self._replicas = replicas.options(method_name="answer", stream=True)
        intake = Intake(self._pass_on, cast(Service, self))
        app = for_pages(Guard(intake, settings), settings)
        self.app = Router(default=_with_state(app))  # a router also answers `lifespan`

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send a request whose body is read to a replica, and its answer to the client."""
        if scope["type"] != "http":
            await send({"type": "websocket.close"})
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        sender = Sender(send, path)
        try:
            if path == "/metrics" and scope["method"] == "GET":
                await self._answer_metrics(sender)
                return
            body = (await receive())["body"] if scope["method"] == "POST" else b""
            headers = [(name.lower(), value) for name, value in scope["headers"]]
            value = _value(body, self.settings.max_json_depth) if body else None
            conversation = conversation_of(headers, value) if body else ""
            request = Forwarded(
                scope["method"], path, scope["query_string"], headers, scope.get("client"), body, conversation,
                server_of(path, value),
            )  # fmt: skip
            await self._try_replicas(request, sender, scope["state"].get("deadline"))
        except ApiError as error:
            await sender.fail(error)

    async def _try_replicas(self, request: Forwarded, sender: Sender, deadline: float | None) -> None:
        for left in reversed(range(TRIES)):
            try:
                async with aclosing(self._answer(request, deadline)) as messages:
                    async for message in messages:
                        await sender.send(message)
                return
            except ReplicaLostError:
                if sender.started:
                    self.metrics.broken.inc()
                    raise _unavailable("the replica that answered is gone; ask again.", code="replica_lost") from None
                if left:
                    self.metrics.retries.inc()
        raise _unavailable("each replica that the request was sent to is gone; try again later.", code="replica_lost")

    async def _answer(self, request: Forwarded, deadline: float | None) -> AsyncGenerator[Message]:
        """A replica's ASGI messages. Raises ApiError, and ReplicaLostError where it went."""
        timeout = deadline or asyncio.get_running_loop().time() + SHORT_SECONDS
        response, complete = cast(DeploymentResponseGenerator[Message], self._replicas.remote(request)), False
        try:
            while not complete:
                async with asyncio.timeout_at(timeout):
                    message = await anext(response)
                if message.get("status") == 503:  # it is to go, and its time for the requests it has is over
                    raise ReplicaLostError
                complete = message["type"] == "http.response.body" and not message.get("more_body", False)
                yield message
        except TimeoutError:
            if deadline is None:
                raise _unavailable("no replica answers; try again later.") from None
            raise ApiError(408, "the request took longer than this server allows; ask for fewer tokens.") from None
        except BackPressureError:
            raise retry_later("as many requests wait for a replica as may; try again later.") from None
        except RayTaskError:
            log.exception("a replica failed")
            raise internal_error() from None
        except (RayError, StopAsyncIteration) as error:
            log.warning("a replica is lost: %s", type(error).__name__)
            raise ReplicaLostError from None
        except RayServeException as error:
            log.warning("no replica takes the request: %s", error)
            raise _unavailable("no replica takes requests; try again later.") from None
        finally:
            if not complete:
                with suppress(RayError, RayServeException):  # of a request that failed, it raises why once more
                    response.cancel()

    async def _answer_metrics(self, sender: Sender) -> None:
        try:
            replies = await self._all.broadcast("metrics").results_async(
                timeout_s=SHORT_SECONDS, return_exceptions=True
            )
        except (RayServeException, TimeoutError):
            replies = []
        texts = [(self._name, self.metrics.text()), *(reply for reply in replies if isinstance(reply, tuple))]
        await sender.answer(200, b"text/plain; version=0.0.4; charset=utf-8", merge_metrics(texts))


class Sender:
    """Sends an answer, but holds its beginning back until it says something, so that another replica may begin anew."""

    def __init__(self, send: Send, path: str) -> None:
        self._send, self._path, self._held, self._events = send, path, list[Message](), False
        self.started = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            # the proxy in front of the ingress says the request's id itself
            message["headers"] = [header for header in message["headers"] if header[0].lower() != b"x-request-id"]
            self._events = any(value.startswith(b"text/event-stream") for _, value in message["headers"])
            self._held = [message]  # what an earlier replica began is forgotten
        elif not self.started and message.get("more_body") and self._events and is_opening(message["body"]):
            self._held.append(message)
        else:
            self.started = True
            for held in [*self._held, message]:
                await self._send(held)
            self._held = []

    async def answer(self, status: int, kind: bytes, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        """A whole answer."""
        extra = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
        length = str(len(body)).encode()
        self.started = True
        await self._send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [(b"content-type", kind), (b"content-length", length), *extra],
            }
        )
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def fail(self, error: ApiError) -> None:
        """Say an error: as the answer, or as the last event of a stream that has begun, without the usual [DONE].

        Raises the error where neither can be, and the server then cuts the connection.
        """
        body = json.dumps(error.body_at(self._path)).encode()
        if not self.started:
            await self.answer(error.status_code, b"application/json", body, error.headers)
        elif self._events:
            name = b"event: error\n" if self._path.startswith(MESSAGES) else b""
            event = name + b"data: " + body + b"\n\n"
            await self._send({"type": "http.response.body", "body": event, "more_body": False})
        else:
            raise error


def is_opening(event: bytes) -> bool:
    """Whether a stream's event only says whose turn it is, as chat streams begin."""
    try:
        (choice,) = json.loads(event.removeprefix(b"data: "))["choices"]
        return bool(choice["delta"]["role"]) and not choice["delta"]["content"] and choice["finish_reason"] is None
    except (ValueError, KeyError, TypeError):
        return False


class IngressMetrics:
    """Of one ingress process; `prefix` begins their names."""

    def __init__(self, prefix: str = PREFIX) -> None:
        self.registry = CollectorRegistry()
        self.in_flight = Gauge(
            f"{prefix}ingress_requests_in_flight", "Requests at the ingress.", registry=self.registry
        )
        self.retries = Counter(
            f"{prefix}ingress_retries", "Requests sent to another replica: the first was lost.", registry=self.registry
        )
        self.broken = Counter(
            f"{prefix}ingress_broken_answers", "Answers that ended with their replica.", registry=self.registry
        )

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _Families(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def merge_metrics(texts: Iterable[tuple[str, bytes]]) -> bytes:
    """Metrics of several processes as those of one, each sample with the label `replica`; texts by process name."""
    families: dict[str, Metric] = {}
    for name, text in texts:
        for family in text_string_to_metric_families(text.decode()):
            merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                merged.add_sample(sample.name, {**sample.labels, "replica": name}, sample.value)
    registry = CollectorRegistry()
    registry.register(_Families(families.values()))
    return generate_latest(registry)


def _with_state(app: ASGIApp) -> ASGIApp:
    async def with_state(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "state": {"log": {}}}, receive, send)  # `Intake` notes there what nobody reads here

    return with_state


def _unavailable(message: str, code: str | None = None) -> ApiError:
    return ApiError(503, message, code=code, headers={"Retry-After": "1"})


def _value(body: bytes, max_depth: int) -> Any:
    """The JSON value of a body; None where it is none, which the replica will say."""
    try:
        return parse_json(body, max_depth)
    except ApiError:
        return None
