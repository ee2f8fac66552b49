"""Structured logs, one JSON object a line, or lines for people on a terminal; and what every request passes first: its
id, its line, its 500.

A line that can not be written never fails a request.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import sys
import time
from collections.abc import MutableMapping
from datetime import UTC, datetime
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gemma_mtp.server.errors import internal_error
from gemma_mtp.server.metrics import Metrics

log = logging.getLogger("gemma_mtp.server")
#: an id that a client may choose
SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
#: of a client that left before its answer was whole: nginx's number
LEFT = 499
#: characters of a path that are logged
LONGEST_PATH = 200


class JsonFormatter(logging.Formatter):
    """A record as one JSON object; the dictionary in its `fields` is part of it."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True, default=str)


class LineFormatter(logging.Formatter):
    """A record as a line that people read: the time, what was asked for and what came of it, then the other fields."""

    def format(self, record: logging.LogRecord) -> str:
        fields = dict(getattr(record, "fields", {}))
        said = [datetime.fromtimestamp(record.created).strftime("%H:%M:%S")]
        if record.levelno > logging.INFO:
            said.append(record.levelname.lower())
        if "path" in fields:
            names = ("method", "path", "status")
            said += [_printable(fields.pop(name)) for name in names]
            said.append(f"{fields.pop('seconds'):.3f} s")
            fields.pop("request_id")  # the client has it, and the JSON lines
        else:
            said.append(_printable(record.getMessage()))
        said += [f"{name}={_printable(value)}" for name, value in fields.items()]
        trace = f"\n{self.formatException(record.exc_info)}" if record.exc_info else ""
        return " ".join(said) + trace


def _printable(value: Any) -> str:
    """In one line, without what a terminal would obey: paths and texts are the clients'."""
    if isinstance(value, float):
        return f"{value:.3f}"
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def configure() -> None:
    """Send all logs to standard error: as lines for people where that is a terminal, else as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter() if sys.stderr.isatty() else JsonFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    log.setLevel(logging.INFO)


def note(scope: MutableMapping[str, Any], **fields: Any) -> None:
    """Add fields to the request's log line."""
    scope["state"]["log"].update(fields)


class RequestLog:
    """ASGI middleware: gives each request an id, counts and logs it, and answers 500 for what nobody caught."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        given = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"x-request-id"), "")
        request_id = given if SANE_ID.fullmatch(given) else secrets.token_hex(16)
        fields: dict[str, Any] = {}
        scope.setdefault("state", {}).update(request_id=request_id, log=fields)
        status = LEFT

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception:
            self._write(logging.ERROR, "a request failed", {"request_id": request_id}, exc_info=True)
            if status == LEFT:
                await internal_error().response(scope["path"])(scope, receive, send_with_id)
        finally:
            self._finish(scope, request_id, fields.pop("left", False), status, time.perf_counter() - started, fields)

    def _finish(
        self, scope: Scope, request_id: str, left: bool, status: int, seconds: float, fields: dict[str, Any]
    ) -> None:
        status = LEFT if left else status
        route = getattr(scope.get("route"), "path", "unknown")  # as declared: paths that clients make up are no labels
        self.metrics.http_requests.labels(route, status).inc()
        line = {
            "request_id": request_id,
            "method": scope["method"],
            "path": scope["path"][:LONGEST_PATH],
            "status": status,
        }
        self._write(logging.INFO, "request", {**line, "seconds": round(seconds, 6), **fields})

    def _write(self, level: int, message: str, fields: dict[str, Any], exc_info: bool = False) -> None:
        try:
            log.log(level, message, extra={"fields": fields}, exc_info=exc_info)
        except Exception:  # whatever a handler raises
            self.metrics.log_failures.inc()
