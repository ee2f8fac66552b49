"""Limits of requests, and clients that leave."""

import asyncio
import math
import socket
import threading
import time

import pytest
import virtual_time
from live_server import (
    COMPLETIONS,
    LONG,
    SECONDS,
    SHORT,
    error_of,
    long_stream,
    parse_events,
    request_bytes,
    serving,
    wait_for,
)

from gemma_mtp.engine.pair import Pair
from gemma_mtp.engine.request import Request
from gemma_mtp.engine.settings import EngineSettings
from gemma_mtp.engine.thread import EngineThread
from gemma_mtp.server.errors import ApiError
from gemma_mtp.server.service import Service
from gemma_mtp.server.settings import ServerSettings


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
