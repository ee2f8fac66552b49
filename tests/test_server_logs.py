"""The server's log."""

import json
import logging
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from live_server import COMPLETIONS, LONG, SHORT, request_bytes, serving, wait_for

from gemma_mtp.engine.pair import Pair

KEYS = ("first-key", "second-key-é")


class Lines(logging.Handler):
    """Keeps the server's log as it would be written."""

    def __init__(self) -> None:
        super().__init__()
        from gemma_mtp.server.logs import JsonFormatter

        self.setFormatter(JsonFormatter())
        self.lines: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(json.loads(self.format(record)))


class Full(logging.Handler):
    """The disk is full."""

    def emit(self, record: logging.LogRecord) -> None:
        raise OSError(28, "No space left on device")


@contextmanager
def logged(handler: logging.Handler) -> Iterator[None]:
    log = logging.getLogger("gemma_mtp.server")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(logging.NOTSET)


def test_each_request_is_a_line_without_its_text(pair: Pair) -> None:
    handler = Lines()
    with logged(handler), serving(pair, api_keys=KEYS) as live:
        headers = {"Authorization": b"Bearer first-key", "X-Request-Id": b"mine-1"}
        body = {"prompt": "zebra = ", "max_tokens": 5, "temperature": 0, "stop": "quagga", "user": "okapi"}
        answer = live.post(COMPLETIONS, body, headers=headers)
        assert answer.headers["x-request-id"] == "mine-1"
        usage, output = answer.json()["usage"], answer.json()["choices"][0]["text"]
        wait_for(lambda: len(handler.lines) == 1)  # a line is written when its answer has been sent
        live.post(COMPLETIONS, {**body, "stream": True}, headers=headers)
        wait_for(lambda: len(handler.lines) == 2)
        live.post(COMPLETIONS, {"prompt": ["zebra", 1]}, headers=headers)
        wait_for(lambda: len(handler.lines) == 3)
        live.client.get("/nothing?zebra", headers={"X-Request-Id": 'bad"\\id' + "x" * 200})
    first, streamed, refused, unknown = handler.lines
    for line in (first, streamed):
        assert (line["request_id"], line["method"], line["path"], line["status"]) == (
            "mine-1",
            "POST",
            COMPLETIONS,
            200,
        )
        assert line["prompt_tokens"] == usage["prompt_tokens"] and line["completion_tokens"] == 5
        assert line["finish"] == ["length"] and 0 < line["first_token_seconds"] <= line["seconds"]
    assert (refused["status"], unknown["status"], unknown["path"]) == (400, 401, "/nothing")
    assert re.fullmatch("[0-9a-f]{32}", unknown["request_id"])
    written = json.dumps(handler.lines)
    assert len(output) > 3 and json.dumps(output)[1:-1] not in written
    assert not any(word in written for word in ("zebra", "quagga", "okapi", *KEYS))


def test_lines_for_people_say_what_came_of_a_request_and_nothing_that_a_terminal_obeys() -> None:
    from gemma_mtp.server.logs import LineFormatter

    def line(message: str, level: int = logging.INFO, **fields: Any) -> str:
        record = logging.LogRecord("gemma_mtp.server", level, "", 0, message, (), None)
        record.fields = fields
        return re.sub(r"^\d\d:\d\d:\d\d ", "", LineFormatter().format(record))

    request: dict[str, Any] = {
        "request_id": "a" * 32,
        "method": "POST",
        "path": "/v1/\x1b[2J\n",
        "status": 200,
        "seconds": 0.41234,
    }
    assert line("request", **request, draft_tokens=7, finish=["stop", "length"], first_token_seconds=None) == (
        "POST /v1/\\x1b[2J\\n 200 0.412 s draft_tokens=7 finish=stop,length first_token_seconds=None"
    )
    assert line("a request failed", logging.ERROR, request_id="b") == "error a request failed request_id=b"


def test_text_is_logged_where_asked_for(pair: Pair) -> None:
    handler = Lines()
    with logged(handler), serving(pair, log_text=True) as live:
        answer = live.post(COMPLETIONS, {"prompt": "zebra = ", "max_tokens": 5, "temperature": 0}).json()
    (line,) = handler.lines
    assert line["prompt_text"] == ["zebra = "] and line["output_text"] == [answer["choices"][0]["text"]]


def test_a_log_that_can_not_be_written_fails_no_request(pair: Pair) -> None:
    with logged(Full()), serving(pair) as live:
        assert live.post(COMPLETIONS, SHORT).status_code == 200
        assert len(live.events(COMPLETIONS, SHORT)) >= 1
        # a line is written when its answer has been read already, and that of /metrics fails, too
        wait_for(lambda: live.service.metrics.log_failures._value.get() == 2)
        assert re.search(r"^gemma_mtp:log_write_failures_total\{.*\} 2.0$", live.client.get("/metrics").text, re.M)


def test_what_leaves_and_what_fails_is_logged(pair: Pair) -> None:
    handler = Lines()
    with logged(handler), serving(pair) as live:
        with socket.create_connection(("127.0.0.1", live.port)) as connection:
            connection.sendall(request_bytes(LONG))
            wait_for(lambda: live.service.engine.stats().running == LONG["n"])
        wait_for(lambda: handler.lines)
    with logged(handler), serving(pair, request_seconds=0.1) as live:
        live.post(COMPLETIONS, LONG)
    left, late = handler.lines
    assert left["status"] == 499 and left["finish"] == ["cancelled"] * LONG["n"]
    assert late["status"] == 408 and late["finish"] == ["cancelled"] * LONG["n"]
