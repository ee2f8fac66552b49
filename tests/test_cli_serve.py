"""The command that serves: how it begins and ends, and why it does not begin."""

import json
import os
import re
import signal
import subprocess
import sys

import httpx
import pytest
from live_server import (
    COMPLETIONS,
    LONG,
    SECONDS,
    wait_for,
)

from gemma_mtp.cli import main
from gemma_mtp.server import run


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
    command = [
        sys.executable,
        "-m",
        "gemma_mtp",
        "serve",
        "--port",
        "0",
        "--host",
        "0.0.0.0",
        "--no-auth",
        "--no-drafter",
    ]
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
    process, url = start("--drain-seconds", "1000", "--request-seconds", "1000", "--no-drafter")
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
        (["--allow-origin", "example.com"], "--allow-origin is 'example.com'"),
        (["--allow-origin", "https://a.example/"], "--allow-origin"),
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
