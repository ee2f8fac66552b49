"""Pages of other sites in a real browser: an allowed one calls the server with any header, another one can not."""

import http.server
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from live_server import SECONDS, serving
from table_models import table_pair

sync_api = pytest.importorskip("playwright.sync_api", reason="played with playwright; it is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here; apt-get install chromium"),
]
#: what openai-npm, the AI SDK and Anthropic's client send from a page, and one that nobody knows
HEADERS = {"Content-Type": "application/json", "Authorization": "Bearer page-key", "x-stainless-lang": "js",
           "x-stainless-retry-count": "0", "anthropic-dangerous-direct-browser-access": "true",
           "x-anything": "1"}  # fmt: skip
CALL = """async ([url, method, headers, body]) => {
    try {
        const answer = await fetch(url, {method, headers, body: body && JSON.stringify(body)});
        return [answer.status, await answer.text(), answer.headers.get("x-request-id")];
    } catch (error) { return String(error); }
}"""


class _Empty(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>another site</title>")

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def site() -> Iterator[str]:
    """Another site, with an empty page."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Empty) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join(SECONDS)


def test_pages_of_allowed_origins_may_send_any_header() -> None:
    responses = {"input": "TEXT", "temperature": 0}
    message = {"messages": [{"role": "user", "content": "TEXT"}], "max_tokens": 20, "temperature": 0}
    with (
        site() as ours,
        site() as other,
        serving(table_pair(), allow_origins=(ours,), api_keys=("page-key",)) as live,
        sync_api.sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]) as browser,
    ):
        page = browser.new_page()
        page.goto(ours)

        def call(path: str, method: str = "POST", body: Any = None) -> Any:
            return page.evaluate(CALL, [live.url + path, method, HEADERS, body])

        for path, body in (("/v1/chat/completions", message), ("/v1/responses", responses),
                           ("/v1/messages", message),
                           ("/v1/chat/completions", {**message, "stream": True})):  # fmt: skip
            status, text, request_id = call(path, body=body)
            assert status == 200 and "world" in text and request_id
        asked = live.post("/v1/responses", {"input": "TEXT"}, headers={"x-api-key": "page-key"})
        made = asked.json()["id"]
        assert call(f"/v1/responses/{made}", "GET")[0] == 200
        assert call(f"/v1/responses/{made}", "DELETE")[0] == 200
        assert call("/v1/chat/completions", body={})[0] == 400, "a page can read errors too"
        page.goto(other)
        assert "Failed to fetch" in call("/v1/chat/completions", body=message)
