"""The end of the server, of its engine, and failures inside."""

import json
import threading
from typing import Any

import httpx
import pytest
from live_server import COMPLETIONS, SECONDS, SHORT, error_of, long_stream, parse_events, serving, wait_for

from gemma_mtp.decoding.params import SamplingParams
from gemma_mtp.engine.engine import Engine
from gemma_mtp.engine.pair import Pair
from gemma_mtp.engine.request import Request


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


def test_a_server_whose_engine_ended_says_so(pair: Pair) -> None:
    with serving(pair) as live:
        assert live.client.get("/health/live").status_code == 200
        live.service.engine.stop()
        assert "engine has stopped" in error_of(live.client.get("/health/live"), 503)["message"]


def test_a_server_whose_engine_hangs_says_so(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, step = threading.Event(), Engine.play
    monkeypatch.setattr(Engine, "play", lambda self: (go_on.wait(SECONDS), step(self)))
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
