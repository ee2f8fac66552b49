"""The server on Ray Serve: engine replicas that scale, and an ingress that finds, retries and speaks for them.

    serve run gemma_mtp.server.ray_app:build target=DIR drafter=DIR max_replicas=4

A request comes to an ingress process, which reads its body, finds its conversation and asks a replica of that
(`ray_routing`). Each replica runs an engine and, in front of it, the very application that `gemma-mtp serve` runs; its
answer streams back through the ingress. Where a replica dies, the ingress asks another one if nothing was sent to the
client yet, and else ends the answer with an error.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp, Message

from gemma_mtp.backend.native import set_threads
from gemma_mtp.decoding.params import SamplingParams
from gemma_mtp.engine.pair import load_pair
from gemma_mtp.engine.request import Request
from gemma_mtp.engine.thread import EngineThread
from gemma_mtp.errors import QueueFullError
from gemma_mtp.server import logs
from gemma_mtp.server.app import create_app
from gemma_mtp.server.ray_ingress import Door, Forwarded
from gemma_mtp.server.ray_routing import ConversationRouter
from gemma_mtp.server.ray_settings import RaySettings
from gemma_mtp.server.service import Service
from gemma_mtp.server.settings import KEYS_VARIABLE, read_keys

#: says which replica answered
REPLICA_HEADER = b"x-gemma-mtp-replica"


def build(args: dict[str, Any]) -> Application:
    """The application, of `RaySettings`' arguments. Raises ServerError."""
    settings = RaySettings.parse(args)
    router = {
        "request_router_class": f"{ConversationRouter.__module__}.{ConversationRouter.__name__}",
        "request_router_kwargs": {"room": settings.max_running},
    }
    replica = serve.deployment(name="Replica", request_router_config=router, **settings.replica_options())(Replica)
    ingress = serve.deployment(name="Ingress", **settings.ingress_options())(serve.ingress()(Ingress))
    return ingress.bind(settings, replica.bind(settings))


class Replica:
    """A loaded pair, its engine and the server's application; one process. Raises what loading a pair raises."""

    engine: EngineThread | None = None

    def __init__(self, settings: RaySettings) -> None:
        logs.configure()
        set_threads(settings.threads or max(1, int(settings.num_cpus)))
        pair = load_pair(
            settings.target, settings.drafter, adapter=settings.adapter, dtype=settings.dtype, device=settings.device,
            use_drafter=not settings.no_drafter, quantize=settings.quantize, strict=settings.strict,
        )  # fmt: skip
        self.engine = EngineThread(pair, settings.engine())
        self.engine.start()
        self._pulse = Pulse(self.engine, settings.stall_seconds)
        self._name = serve.get_replica_context().replica_tag
        own = dataclasses.replace(settings.server(_keys(settings)), id_suffix=f"_{self._name}")
        self._service = Service(self.engine, own)
        self._app = create_app(self._service)

    async def answer(self, request: Forwarded) -> AsyncIterator[Message]:
        """The answer's ASGI messages; closed early, it cancels the request."""
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        task = asyncio.create_task(self._play(request, messages))
        try:
            while (message := await messages.get()) is not None:
                if message["type"] == "http.response.start":
                    message["headers"] = [*message["headers"], (REPLICA_HEADER, self._name.encode())]
                yield message
            await task
        finally:
            task.cancel()
            await asyncio.wait({task})

    async def _play(self, request: Forwarded, messages: asyncio.Queue[Message | None]) -> None:
        body: list[Message] = [{"type": "http.request", "body": request.body, "more_body": False}]

        async def receive() -> Message:
            if not body:
                await asyncio.Event().wait()  # a client that leaves is the ingress's affair, which then closes `answer`
            return body.pop()

        try:
            await self._app(request.scope(), receive, messages.put)
        finally:
            messages.put_nowait(None)

    async def metrics(self) -> tuple[str, bytes]:
        return self._name, self._service.metrics.text()

    async def check_health(self) -> None:
        """Serve's look at whether the replica works. Raises RuntimeError where it does not."""
        await self._pulse.check()

    def __del__(self) -> None:
        """Serve calls it when the replica's requests have ended, or their time has."""
        if self.engine is not None:
            self.engine.stop()


class Pulse:
    """Whether an engine plays steps. An idle one is given a token to decode; a busy one must have got on."""

    def __init__(self, engine: EngineThread, stall_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine, self._stall_seconds, self._clock = engine, stall_seconds, clock
        self._steps, self._since = -1, clock()

    async def check(self) -> None:
        """Raises RuntimeError where no step was played for `stall_seconds`, although there was work."""
        stats = self._engine.stats()
        steps, busy = stats.steps, stats.running + stats.waiting > 0
        if not busy:
            await self._try_a_token()
        elif steps == self._steps and self._clock() - self._since >= self._stall_seconds:
            raise RuntimeError(f"the engine has played no step for {self._stall_seconds:g} seconds.")
        if not busy or steps != self._steps:
            self._steps, self._since = steps, self._clock()

    async def _try_a_token(self) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=1)
        try:
            generation = self._engine.submit(Request([0], params, draft_tokens=0))
        except QueueFullError:
            return  # no longer idle
        try:
            async with asyncio.timeout(self._stall_seconds):
                async for _ in generation.updates():
                    pass
        except TimeoutError:
            raise RuntimeError(f"the engine has not decoded a token in {self._stall_seconds:g} seconds.") from None
        finally:
            generation.cancel()


class Ingress:
    """Takes requests from Serve's HTTP proxies; a process without a model."""

    def __init__(self, settings: RaySettings, replicas: DeploymentHandle[Any]) -> None:
        logs.configure()
        name = f"ingress-{serve.get_replica_context().replica_tag}"
        self._door = Door(settings.server(_keys(settings)), replicas, name)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._door.app


def _keys(settings: RaySettings) -> tuple[str, ...]:
    return read_keys(settings.api_key_file, os.environ.get(KEYS_VARIABLE, ""))
