"""The process: a socket, uvicorn on it, and signals that end it gracefully."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from gemma_mtp.errors import ServerError
from gemma_mtp.server.app import create_app
from gemma_mtp.server.errors import ApiError
from gemma_mtp.server.service import Service

#: seconds that connections get to close after their answers were cancelled
CLOSING_SECONDS = 2


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens there."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises ServerError where it can not."""
    if not 0 <= port < 2**16:
        raise ServerError(f"port {port} is none; choose one from 1 to 65535, or 0 for a free one.")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ServerError(f"can not listen on {host}, port {port} ({reason}); choose others.") from None


def url(listener: socket.socket) -> str:
    """Where a listening socket is reached."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def page_url(listener: socket.socket) -> str:
    """Where a browser on this machine finds the page; a socket that listens everywhere is reached as localhost."""
    host, port = listener.getsockname()[:2]
    return f"http://localhost:{port}" if host in ("0.0.0.0", "::") else url(listener)


#: how long one thread may keep the interpreter from another: the engine's asks for it after every native call. Where
#: one request is in work, the engine waits for the event loop with nothing else to do; where there are many, a switch
#: costs more than it brings
LONE_SWITCH_SECONDS, SWITCH_SECONDS = 0.00005, 0.0002


def run(service: Service, listener: socket.socket, ready: Callable[[], None]) -> None:
    """Serve until a signal; the first one drains, the second ends at once. `ready` is called when it serves."""
    service.on_load = _set_switching
    _set_switching(0)
    server_for(service, ready).run(sockets=[listener])


def _set_switching(in_flight: int) -> None:
    sys.setswitchinterval(LONE_SWITCH_SECONDS if in_flight <= 1 else SWITCH_SECONDS)


def server_for(service: Service, ready: Callable[[], None]) -> Server:
    """The server, not yet started."""
    config = uvicorn.Config(
        create_app(service), http=_Protocol, ws="none", lifespan="off", log_config=None, access_log=False,
        server_header=False, proxy_headers=False, h11_max_incomplete_event_size=service.settings.max_header_bytes,
        timeout_graceful_shutdown=CLOSING_SECONDS,
    )  # fmt: skip
    return Server(config, service, ready)


class Server(uvicorn.Server):
    """uvicorn's server, which goes on answering while it drains: running requests to their end, new ones with 503."""

    def __init__(self, config: uvicorn.Config, service: Service, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._service, self._ready = service, ready
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # whoever started us calls `stop`
            return
        loop, handled = asyncio.get_running_loop(), (signal.SIGTERM, signal.SIGINT)
        for number in handled:
            loop.add_signal_handler(number, self.stop)
        try:
            yield
        finally:
            for number in handled:
                loop.remove_signal_handler(number)

    def stop(self) -> None:
        """Drain, then exit; called again, exit at once."""
        if self._draining is not None:
            self.should_exit = self.force_exit = True
        else:
            self._draining = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        await self._service.drain(self._service.settings.drain_seconds)
        self.should_exit = True


class _Protocol(H11Protocol):
    """uvicorn's, with errors of HTTP itself in the shape of all others."""

    def send_400_response(self, msg: str) -> None:
        error = ApiError(400, "the request is not valid HTTP, or its headers are too long.", code="invalid_http")
        body = json.dumps(error.body).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        for event in (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
