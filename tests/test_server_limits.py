"""Keys, limits, clients that leave, the end of the server, and its log."""

import asyncio
import json
import logging
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import virtual_time
from live_server import LONG, SECONDS, Live, parse_events, serving, wait_for

from gemma_mtp.cli import main
from gemma_mtp.decoding.sampling import SamplingParams
from gemma_mtp.engine.engine import Engine
from gemma_mtp.engine.pair import Pair
from gemma_mtp.engine.request import Request
from gemma_mtp.engine.settings import EngineSettings
from gemma_mtp.engine.thread import EngineThread
from gemma_mtp.errors import ServerError
from gemma_mtp.server import run
from gemma_mtp.server.errors import ApiError
from gemma_mtp.server.service import Service
from gemma_mtp.server.settings import ServerSettings, read_keys

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
SHORT: dict[str, Any] = {"prompt": "import", "max_tokens": 3, "temperature": 0}
KEYS = ("first-key", "second-key-é")


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    body = json.loads(answer.read())
    assert answer.status_code == status, body
    assert set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    return error


@contextmanager
def long_stream(live: Live, **fields: Any) -> Iterator[Iterator[str]]:
    """A request that is decoding: the lines after its first event."""
    with live.client.stream("POST", COMPLETIONS, json={**LONG, "stream": True, **fields}) as answer:
        assert answer.status_code == 200
        lines = answer.iter_lines()
        next(lines)
        yield lines


def test_only_requests_with_a_key_are_let_in(pair: Pair) -> None:
    with serving(pair, api_keys=KEYS) as live:
        refused = ["", "Bearer", "Bearer wrong", "Basic first-key", "first-key", "Bearer first-key2",
                   "Bearer first-ke", "bearer second-key", "Bearer first-key,second-key-é"]  # fmt: skip
        for value in refused:
            for method, path in (("POST", COMPLETIONS), ("GET", "/v1/models"), ("GET", "/openapi.json"),
                                 ("GET", "/metrics"), ("GET", "/nothing"), ("POST", "/tokenize")):  # fmt: skip
                answer = live.client.request(method, path, headers=[(b"Authorization", value.encode())])
                error = error_of(answer, 401)
                assert error["code"] == "invalid_api_key" and answer.headers["www-authenticate"] == "Bearer"
                assert not any(key in answer.text for key in KEYS)
        assert live.client.get("/v1/models").status_code == 401
        twice = [("Authorization", "Bearer first-key"), ("Authorization", "Bearer wrong")]
        assert live.client.get("/v1/models", headers=twice).status_code == 401
        for key in KEYS:
            headers = {"Authorization": f"Bearer {key}".encode()}
            assert live.post(COMPLETIONS, SHORT, headers=headers).status_code == 200
        for path in ("/", "/health", "/health/live", "/health/ready", "/page/index.html"):
            assert live.client.get(path).status_code == 200
        described = live.client.get("/openapi.json", headers={"Authorization": "bearer first-key"}).json()
        assert described["paths"][COMPLETIONS]["post"]["security"] == [{"key": []}]
        assert "401" in described["paths"]["/metrics"]["get"]["responses"]
        assert "security" not in described["paths"]["/health"]["get"]
    with serving(pair, api_keys=KEYS, public_metrics=True) as live:
        assert live.client.get("/metrics").status_code == 200


def test_without_keys_only_this_machines_own_names_are_answered(pair: Pair) -> None:
    with serving(pair, loopback_names_only=True) as live:
        for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", ""):
            error_of(live.client.get("/v1/models", headers={"Host": host}), 403)
        for host in ("localhost", f"localhost:{live.port}", "127.0.0.1", "LOCALHOST:1", "[::1]:8000", "[::1]"):
            assert live.client.get("/v1/models", headers={"Host": host}).status_code == 200


def test_other_sites_pages_are_let_in_only_where_asked_for(pair: Pair) -> None:
    ask = {"Origin": "https://ours.example", "Access-Control-Request-Method": "POST"}
    with serving(pair) as live:
        answer = live.client.options(COMPLETIONS, headers=ask)
        assert answer.status_code == 405 and "access-control-allow-origin" not in answer.headers
    with serving(pair, allow_origins=("https://ours.example",), api_keys=KEYS) as live:
        answer = live.client.options(COMPLETIONS, headers=ask)
        assert answer.headers["access-control-allow-origin"] == "https://ours.example"
        other = live.client.options(COMPLETIONS, headers={**ask, "Origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers


def test_concurrent_requests_are_limited(pair: Pair) -> None:
    with serving(pair, max_concurrent=1) as live:
        with long_stream(live):
            answer = live.post(COMPLETIONS, SHORT)
            assert error_of(answer, 429)["type"] == "rate_limit_error"
            assert int(answer.headers["retry-after"]) >= 1
            assert live.client.get("/health/ready").status_code == 200
        wait_for(live.idle)
        assert live.post(COMPLETIONS, SHORT).status_code == 200


def test_a_full_queue_is_429_and_leaves_nothing_behind(pair: Pair) -> None:
    with serving(pair, EngineSettings(max_running=1, max_waiting=4)) as live:
        stats = live.service.engine.stats
        with long_stream(live, n=4):  # one decodes, three wait
            answer = live.post(COMPLETIONS, {**SHORT, "n": 4})
            error_of(answer, 429)
            assert int(answer.headers["retry-after"]) >= 1
            wait_for(lambda: stats().finished["cancelled"] >= 1)
            assert stats().waiting <= 3
        wait_for(live.idle)
        assert live.post(COMPLETIONS, {**SHORT, "n": 4}).status_code == 200


def request_bytes(body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_ends_in_its_time(pair: Pair, stream: bool) -> None:
    with serving(pair, request_seconds=0.1) as live:
        answer = live.post(COMPLETIONS, {**LONG, "stream": stream})
        if stream:
            assert answer.status_code == 200
            error = parse_events(answer.text)[-1]["error"]
            assert set(error) == {"message", "type", "param", "code"}
        else:
            error = error_of(answer, 408)
        assert error["type"] == "timeout_error"
        wait_for(live.idle)


class CoarseLoop(virtual_time.VirtualTimeLoop):
    """Whose clock shows whole milliseconds, and whose timers, as uvloop's, may be that much early by it."""

    def __init__(self) -> None:
        super().__init__()
        self._clock_resolution = 0.001

    def time(self) -> float:
        return math.floor(1000 * super().time()) / 1000


@pytest.mark.parametrize("at_end", [False, True])
def test_a_timer_that_is_early_ends_a_request_all_the_same(pair: Pair, at_end: bool) -> None:
    service = Service(EngineThread(pair), ServerSettings())  # whose thread never runs

    async def ask() -> None:
        batch = service.submit([Request([5])], asyncio.get_running_loop().time() + 0.0505)
        async for _ in batch.updates(at_end):
            pass

    with asyncio.Runner(loop_factory=CoarseLoop) as runner, pytest.raises(ApiError) as error:
        runner.run(ask())
    assert error.value.status_code == 408


def test_a_body_must_come_in_its_time(pair: Pair) -> None:
    with (
        serving(pair, body_seconds=0.2) as live,
        socket.create_connection(("127.0.0.1", live.port), timeout=SECONDS) as connection,
    ):
        connection.sendall(request_bytes(SHORT)[:-1])
        assert connection.recv(65536).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_the_engine(pair: Pair, stream: bool) -> None:
    with serving(pair) as live:
        with socket.create_connection(("127.0.0.1", live.port)) as connection:
            connection.sendall(request_bytes({**LONG, "stream": stream}))
            wait_for(lambda: live.service.engine.stats().running == LONG["n"])
        wait_for(live.idle)
        stats = live.service.engine.stats()
        assert stats.finished["cancelled"] == LONG["n"] and stats.output_tokens < LONG["n"] * LONG["max_tokens"] / 2
        assert live.post(COMPLETIONS, SHORT).status_code == 200


def test_a_client_that_does_not_read_does_not_hold_the_engine(pair: Pair) -> None:
    with serving(pair) as live, socket.socket() as connection:
        for listener in live.server.servers[0].sockets:  # small buffers, so that little is on its way
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", live.port))
        options = {"include_rounds": True}
        body = {"prompt": "import", "max_tokens": 60, "n": 2, "ignore_eos": True, "logprobs": 20, "stream": True}
        connection.sendall(request_bytes({**body, "stream_options": options}))
        wait_for(lambda: live.service.engine.stats().finished["length"] == 2)
        assert live.service.in_flight == 1, "its answer is too large to be on its way already"
        assert live.post(COMPLETIONS, SHORT).status_code == 200


def test_failures_inside_stay_inside(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(pair) as live:

        def fail(*_: Any) -> Any:
            raise RuntimeError("secret detail")

        with monkeypatch.context() as patch:
            patch.setattr("gemma_mtp.engine.output.OutputBuilder.push", fail)
            answer = live.post(COMPLETIONS, SHORT)
            assert error_of(answer, 500)["type"] == "server_error" and "secret" not in answer.text
            events = parse_events(live.post(COMPLETIONS, {**SHORT, "stream": True}).text)
            assert events[-1]["error"]["type"] == "server_error" and "secret" not in json.dumps(events)
        with monkeypatch.context() as patch:
            patch.setattr("gemma_mtp.server.app.completion_requests", fail)
            answer = live.post(COMPLETIONS, SHORT)
            assert error_of(answer, 500)["code"] == "internal_error" and "secret" not in answer.text
        assert live.post(COMPLETIONS, SHORT).status_code == 200


def test_draining_ends_what_runs_and_refuses_what_comes(pair: Pair) -> None:
    with serving(pair, drain_seconds=SECONDS) as live:
        with long_stream(live) as coming:
            with httpx.Client(base_url=live.url, timeout=SECONDS) as other:
                assert other.get("/health/ready").status_code == 200
                live.stop()
                wait_for(lambda: live.service.draining)
                assert error_of(other.get("/health/ready"), 503)["code"] == "shutting_down"
                error_of(other.post(COMPLETIONS, json=SHORT), 503)
                assert other.get("/health/live").status_code == 200
            assert not live.server.should_exit
            next(coming)  # the answer goes on
        wait_for(lambda: live.server.should_exit)  # with the last request, long before its time


def test_what_outlasts_the_draining_is_told(pair: Pair) -> None:
    with serving(pair, drain_seconds=0.1) as live:
        with long_stream(live) as coming:
            live.stop()
            lines = [line for line in coming if line]
            assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "shutting_down"
        wait_for(lambda: live.server.should_exit)


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


def start(*options: str) -> tuple[subprocess.Popen[str], str]:
    """`gemma-mtp serve` on a free port, and its URL. It measures what rounds cost for as few sequences as can be."""
    command = [sys.executable, "-m", "gemma_mtp", "serve", "--port", "0", "--max-running", "1", *options]
    environment = {name: value for name, value in os.environ.items() if name != "GEMMA_MTP_API_KEYS"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**environment, "PYTHONUNBUFFERED": "1"}
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r"http://127\.0\.0\.1:\d+", line)
    assert found, line
    return process, found.group()


def test_the_command_drains_and_ends_with_zero() -> None:
    process, url = start("--drain-seconds", "600", "--model-name", "small")
    with httpx.Client(base_url=url, timeout=SECONDS) as client:
        assert client.get("/v1/models").json()["data"][0]["id"] == "small"
        body = {**LONG, "n": 1, "max_tokens": 200, "stream": True}
        with client.stream("POST", COMPLETIONS, json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            *_, last, done = [line for line in lines if line]
    assert done == "data: [DONE]" and json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    _, log = process.communicate(timeout=SECONDS)
    assert process.returncode == 0
    assert [json.loads(line)["path"] for line in log.splitlines()] == ["/v1/models", COMPLETIONS]


def test_a_terminal_is_told_where_to_look_and_gets_lines_to_read() -> None:
    main, other = os.openpty()
    command = [sys.executable, "-m", "gemma_mtp", "serve", "--port", "0", "--host", "0.0.0.0", "--no-auth"]
    process = subprocess.Popen([*command, "--max-running", "1"], stdout=other, stderr=other)
    os.close(other)
    said = ""

    def read_until(pattern: str) -> re.Match[str]:
        nonlocal said
        while (found := re.search(pattern, said)) is None:
            said += os.read(main, 4096).decode()
        return found

    try:
        url = read_until(r"Open (http://localhost:\d+) , Ctrl-C stops\.").group(1)
        assert httpx.get(f"{url}/v1/models", timeout=SECONDS).status_code == 200
        read_until(r"\d\d:\d\d:\d\d GET /v1/models 200 0\.\d{3} s\r\n")
        process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS) == 0
    finally:
        process.kill()
        os.close(main)


def test_the_second_signal_ends_at_once() -> None:
    """And the other one drains, too."""
    process, url = start("--drain-seconds", "1000", "--request-seconds", "1000")
    body = {**LONG, "n": 16, "stream": True}
    with httpx.stream("POST", url + COMPLETIONS, json=body, timeout=SECONDS) as answer:
        lines = answer.iter_lines()  # kept: httpx hangs up when they are forgotten
        next(lines)
        process.send_signal(signal.SIGINT)
        wait_for(lambda: httpx.get(f"{url}/health/ready").status_code == 503)
        next(lines)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=SECONDS)
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "0.0.0.0"], "--no-auth"),
        (["--host", "example.com"], "--no-auth"),
        (["--api-key-file", "/nowhere/keys"], "can not be read"),
        (["--port", "70000"], "port 70000"),
        (["--port", "-1"], "port -1"),
        (["--host", "192.0.2.1", "--no-auth"], "can not listen"),
        (["--max-running", "0"], "--max-running is 0"),
        (["--request-seconds", "nan"], "--request-seconds"),
        (["--drain-seconds", "-1"], "--drain-seconds"),
        (["--draft-tokens", "many"], "--draft-tokens"),
        (["--draft-tokens", "256", "--port", "0"], "draft_tokens is 256"),
        (["--no-drafter", "--drafter", "x"], "exclude"),
        (["--target", "/nowhere", "--port", "0"], "/nowhere"),
        (["--threads", "0"], "--threads"),
    ],
)
def test_a_server_that_can_not_start_says_why(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GEMMA_MTP_API_KEYS", raising=False)
    assert main(["serve", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and "Traceback" not in error


def test_without_the_extra_the_command_says_what_to_install() -> None:
    code = "import sys; sys.modules['uvicorn'] = None; from gemma_mtp.cli import main; sys.exit(main(['serve']))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 2 and "pip install 'gemma-mtp[serve]'" in ran.stderr


def test_a_port_in_use_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with run.listen("127.0.0.1", 0) as listener:
        assert main(["serve", "--port", str(listener.getsockname()[1])]) == 2
    assert "in use" in capsys.readouterr().err


def test_keys_are_read_from_file_and_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nalpha\n\n  beta  \nalpha\n", encoding="utf-8")
    assert read_keys(file, "gamma,delta epsilon\n") == ("gamma", "delta", "epsilon", "alpha", "beta")
    assert read_keys(None, "") == ()
    file.write_text("# none yet\n\n", encoding="utf-8")
    with pytest.raises(ServerError, match="has no keys"):
        read_keys(file, "gamma")


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("192.168.1.5", False), ("example.com", False), ("", False)],
)  # fmt: skip
def test_which_hosts_are_loopback(host: str, loopback: bool) -> None:
    assert run.is_loopback(host) == loopback


def test_many_clients_at_once_get_their_own_answers(pair: Pair) -> None:
    with serving(pair, EngineSettings(max_running=4)) as live:
        expected = live.post(COMPLETIONS, {**SHORT, "prompt": [f"x{i} = " for i in range(8)]}).json()["choices"]
        answers: dict[int, str] = {}

        def ask(i: int) -> None:
            answers[i] = live.post(COMPLETIONS, {**SHORT, "prompt": f"x{i} = "}).json()["choices"][0]["text"]

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [answers[i] for i in range(8)] == [choice["text"] for choice in expected]
        assert time.time() > live.service.created > 0


def test_a_server_whose_engine_ended_says_so(pair: Pair) -> None:
    with serving(pair) as live:
        assert live.client.get("/health/live").status_code == 200
        live.service.engine.stop()
        assert "engine has stopped" in error_of(live.client.get("/health/live"), 503)["message"]


def test_a_server_whose_engine_hangs_says_so(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, step = threading.Event(), Engine.step
    monkeypatch.setattr(Engine, "step", lambda self: (go_on.wait(SECONDS), step(self)))
    with serving(pair, request_seconds=0.2) as live:
        assert live.client.get("/health/live").status_code == 200
        try:
            generation = live.service.engine.submit(Request([5], SamplingParams(max_tokens=2)))
            wait_for(lambda: live.service.engine.step_seconds > 0.2)
            assert "engine hangs" in error_of(live.client.get("/health/live"), 503)["message"]
        finally:
            go_on.set()
        generation.wait()
        wait_for(lambda: live.service.engine.step_seconds == 0)
        assert live.client.get("/health/live").status_code == 200
