"""What differs between clients and does not matter: HEAD for GET, and a slash at a path's end."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: paths below this one are files
FILES = "/page/"


class Tidy:
    """ASGI middleware: a HEAD is answered as a GET is, without its body; a path's last slash is left out."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path, head = scope["path"], scope["method"] == "HEAD"
        slash = len(path) > 1 and path.endswith("/") and not path.endswith("//") and not path.startswith(FILES)
        if not (head or slash):
            await self.app(scope, receive, send)
            return
        inner = dict(scope)  # the server looks into its own
        if slash:
            inner |= {"path": path[:-1], "raw_path": scope.get("raw_path", path.encode())[:-1]}
        if head:
            inner["method"] = "GET"

        async def without_body(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        try:
            await self.app(inner, receive, without_body if head else send)
        finally:
            scope.update({name: inner[name] for name in ("route", "state") if name in inner})  # for the log
