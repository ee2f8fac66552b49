"""Who is let in: API keys, names of this machine where there are none, and pages of other sites. Answers before a body
is read."""

from __future__ import annotations

import secrets
from collections.abc import Iterable

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from gemma_mtp.server.errors import ApiError
from gemma_mtp.server.settings import ServerSettings

#: paths that need no key: they say nothing but whether the server lives, or are the page that asks for one
PUBLIC = ("/", "/health", "/health/live", "/health/ready")
PAGE = "/page/"
#: a page on another site can point its own name at 127.0.0.1; its Host is then none of these
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


def is_public(path: str, settings: ServerSettings) -> bool:
    return path in PUBLIC or path.startswith(PAGE) or (settings.public_metrics and path == "/metrics")


class Guard:
    """ASGI middleware: 431 for too many headers, 403 for a name that is not ours, 401 without a key."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self.app, self.settings = app, settings
        self._keys = [key.encode() for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        await (self.app if refusal is None else refusal.response(scope["path"]))(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = scope["headers"]
        size = len(scope["path"]) + len(scope["query_string"])
        size += sum(len(name) + len(value) for name, value in headers)
        if len(headers) > self.settings.max_headers or size > self.settings.max_header_bytes:
            most = f"{self.settings.max_headers} headers, and {self.settings.max_header_bytes} bytes with the path"
            return ApiError(431, f"the request's headers are too many or too long; at most {most}, are taken.")
        if self.settings.loopback_names_only and not _is_loopback(_values(headers, b"host")):
            return ApiError(403, "this server has no API keys and so answers only as localhost; start it with keys.")
        if self._keys and not is_public(scope["path"], self.settings) and not self._has_key(headers):
            message = "a valid API key is needed; send it as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'."
            return ApiError(401, message, headers={"WWW-Authenticate": "Bearer"})
        return None

    def _has_key(self, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        headers = list(headers)
        given = _values(headers, b"authorization")
        scheme, _, key = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        named = _values(headers, b"x-api-key")
        if not given and len(named) == 1:
            scheme, key = b"bearer", named[0]
        # all of them are compared, in full, so that the time taken tells nothing
        matches = [secrets.compare_digest(key.strip(), known) for known in self._keys]
        return scheme.lower() == b"bearer" and any(matches)


def for_pages(app: ASGIApp, settings: ServerSettings) -> ASGIApp:
    """The application for pages of the origins that are allowed, too, whose browsers ask before they send a request."""
    if not settings.allow_origins:
        return app
    return CORSMiddleware(
        app, allow_origins=settings.allow_origins, allow_methods=["GET", "HEAD", "POST", "DELETE"],
        allow_headers=["*"],  # clients in pages send headers of their own, such as x-stainless-*
        expose_headers=["X-Request-Id"],
    )  # fmt: skip


def _values(headers: Iterable[tuple[bytes, bytes]], wanted: bytes) -> list[bytes]:
    return [value for name, value in headers if name == wanted]


def _is_loopback(hosts: list[bytes]) -> bool:
    if len(hosts) != 1:
        return False
    host = hosts[0].decode("latin-1").lower()
    name = host if host.endswith("]") else host.rpartition(":")[0] or host
    return name in LOOPBACK_NAMES
