"""Bad requests, picked by hand: each gets its 4xx in OpenAI's error shape, and the server goes on."""

import json
import re
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from live_server import SECONDS, Live, serving

from gemma_mtp.engine.pair import load_pair
from gemma_mtp.engine.settings import EngineSettings

COMPLETIONS, CHAT, TOKENIZE, DETOKENIZE = "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"
USER = {"role": "user", "content": "hello"}
MOST_BYTES = 100_000
NAN, INFINITY = float("nan"), float("inf")


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with serving(
        load_pair(), EngineSettings(max_waiting=40), max_body_bytes=MOST_BYTES, max_output_tokens=500, max_prompts=8
    ) as live:
        yield live
        assert live.service.engine.stats().rounds == 0, "none of these may reach the models"
        answer = live.post(COMPLETIONS, {"prompt": "import", "max_tokens": 2})
        assert answer.status_code == 200, "the server goes on"


def check(status: int, body: Any, wanted: int) -> dict[str, Any]:
    assert status == wanted, body
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    assert isinstance(error["message"], str) and isinstance(error["type"], str) and isinstance(error["code"], str)
    assert error["message"].endswith(".") and "Traceback" not in error["message"] and len(error["message"]) < 600
    return error


#: field -> values that no generation takes, beside a good prompt
FIELDS: dict[str, list[Any]] = {
    "model": [5, True, [], {}, "", "gpt-4", "gemma-mtp-bundled ", "../gemma-mtp-bundled", "x" * 5000, "\x00"],
    "stream": ["true", 1, [], "yes"],
    "stream_options": [True, [], "usage", {"include_usage": "yes"}, {"include_rounds": 1}],
    "n": [0, -1, 17, 10**30, 10**4200, 2**31 - 1, "1", 1.5, True, [1], {}],
    "stop": [[""], [None], 5, [5], {"a": 1}, ["x"] * 17, "x" * 1001, ["ok", "y" * 1001], [["a"]], True],
    "seed": ["1", 1.5, 2**63, -(2**63) - 1, True, [], 10**400],
    "temperature": [-0.1, "0.5", True, [], {}, NAN, INFINITY, -INFINITY, 10**400],
    "top_p": [-0.5, 1.1, "1", True, NAN, INFINITY],
    "presence_penalty": [-2.1, 2.1, "0", NAN, [], True],
    "frequency_penalty": [-2.1, 2.1, "0", -INFINITY, {}, False],
    "logit_bias": [[], "5", 5, {"a": 1}, {"-1": 1}, {"1.5": 1}, {"": 1}, {"5": "1"}, {"5": 101}, {"5": -101},
                   {"5": NAN}, {"5": None}, {"4096": 1}, {"99999999999": 1}, {"05": 1}, {" 5": 1}, {"5": True},
                   {str(i): 1 for i in range(1025)}, {f"x{i}": 1 for i in range(5000)}],
    "response_format": ["text", [], {}, {"type": "xml"}, {"type": None}, {"type": "json_schema"},
                        {"type": "json_schema", "json_schema": {}},
                        {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}},
                        {"type": "json_schema", "json_schema": {"name": "a", "schema": []}}],
    "prediction": ["text", [], {}, {"type": "content"}, {"type": "other", "content": "x"},
                   {"type": "content", "content": 5}, {"type": "content", "content": []}],
    "top_k": [-2, 1.5, "5", True, 2**31, []],
    "min_p": [-0.1, 1.1, "0", NAN, []],
    "repetition_penalty": [0, -1, 0.009, 5e-324, "1", NAN, INFINITY, 101, {}],
    "ignore_eos": ["no", 0, [], {}],
    "stop_token_ids": [5, "5", ["5"], [-1], [1.5], [4096], [2**31], [None], [True], [[1]], {"a": 1}, [1] * 1025],
    "draft_tokens": [-1, 256, 1.5, "4", "AUTO", "", True, [], {}, 10**30],
    "verification": ["exactly", "", 1, [], {}, True],
    "priority": [1.5, "1", 2**31, -(2**31) - 1, True, []],
}  # fmt: skip
COMPLETION_FIELDS: dict[str, list[Any]] = {
    "prompt": [None, 5, True, {}, [], [[]], [None], [[1], "a"], ["a", 1], [1, "a"], [1.5], [-1], [4096], [2**31],
               [10**30], [[1], [4096]], [[[1]]], [True], ["a"] * 9, [1] * 2048, [[1], []], [{"text": "a"}]],
    "max_tokens": [0, -2, "5", 1.5, True, [], {}, 501, 10**30],
    "echo": ["yes", 1, []],
    "logprobs": [-1, 21, "1", True, 1.5, []],
    "prompt_logprobs": [-1, 21, "1", True, 1.5, []],
    "best_of": [0, 2, -1, "1", 1.5, [], 10**30],
    "suffix": ["", "x", 5, []],
}  # fmt: skip
CHAT_FIELDS: dict[str, list[Any]] = {
    "messages": [None, "hello", 5, {}, [], [None], ["hello"], [{}], [{"role": "user"}], [{"content": "x"}],
                 [{"role": "user", "content": None}], [{"role": "user", "content": 5}],
                 [{"role": "user", "content": []}], [{"role": "robot", "content": "x"}],
                 [{"role": "tool", "content": "x", "tool_call_id": "1"}], [{"role": 5, "content": "x"}],
                 [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}],
                 [{"role": "user", "content": [{"type": "text"}]}], [{"role": "user", "content": ["x"]}],
                 [{"role": "user", "content": [{"type": "text", "text": 5}]}], [USER, 5], [[USER]]],
    "max_tokens": [0, -2, "5", 1.5, 501], "max_completion_tokens": [0, -2, "5", 1.5, 501],
    "logprobs": ["true", 1, []], "top_logprobs": [-1, 21, "1", True],
    "tools": [[{"type": "function"}], "x", {}, [1]],
}  # fmt: skip
OTHER: list[tuple[str, Any]] = [
    (TOKENIZE, {}), (TOKENIZE, {"prompt": 5}), (TOKENIZE, {"prompt": ["a"]}), (TOKENIZE, {"prompt": None}),
    (TOKENIZE, {"messages": []}), (TOKENIZE, {"messages": "x"}), (TOKENIZE, {"prompt": "a", "add_special_tokens": 1}),
    (TOKENIZE, {"prompt": "a", "return_token_strs": "no"}), (TOKENIZE, []), (TOKENIZE, {"messages": [{"role": "x"}]}),
    (DETOKENIZE, {}), (DETOKENIZE, {"tokens": "1"}), (DETOKENIZE, {"tokens": [-1]}), (DETOKENIZE, {"tokens": [4096]}),
    (DETOKENIZE, {"tokens": [2**40]}), (DETOKENIZE, {"tokens": [1.5]}), (DETOKENIZE, {"tokens": ["1"]}),
    (DETOKENIZE, {"tokens": None}), (DETOKENIZE, {"tokens": [[1]]}), (DETOKENIZE, {"tokens": [True]}),
    (CHAT, {"messages": [USER], "max_tokens": 501, "max_completion_tokens": 1}),
    (COMPLETIONS, {"prompt": "a", "prompt_logprobs": 1, "stream": True}), (COMPLETIONS, {"prompt": ["a"] * 6, "n": 8}),
    (COMPLETIONS, {"prompt": "word " * 5000}), (CHAT, {"messages": [{"role": "user", "content": "word " * 5000}]}),
]  # fmt: skip


def cases() -> Iterator[Any]:
    for path, good, tables in (
        (COMPLETIONS, {"prompt": "import"}, (FIELDS, COMPLETION_FIELDS)),
        (CHAT, {"messages": [USER]}, (CHAT_FIELDS,)),
    ):
        for table in tables:
            for field, values in table.items():
                for i, value in enumerate(values):
                    yield pytest.param(path, {**good, field: value}, id=f"{path}-{field}-{i}")
    for i, (path, body) in enumerate(OTHER):
        yield pytest.param(path, body, id=f"{path}-other-{i}")


@pytest.mark.parametrize(("path", "body"), list(cases()))
def test_bad_fields(live: Live, path: str, body: Any) -> None:
    content = json.dumps(body).encode()  # with NaN and Infinity, as Python writes them
    answer = live.client.post(path, content=content, headers={"Content-Type": "application/json"})
    unknown_model = isinstance(body, dict) and isinstance(body.get("model"), str)
    error = check(answer.status_code, answer.json(), 404 if unknown_model else 400)
    assert error["code"] == "model_not_found" or not unknown_model


def deep(levels: int) -> bytes:
    return b'{"prompt": "a", "x": ' + b"[" * levels + b"]" * levels + b"}"


#: bodies that are no JSON object as it must be
BODIES: dict[str, bytes] = {
    "empty": b"", "null": b"null", "number": b"5", "text": b'"prompt"', "list": b"[]", "true": b"true",
    "cut": b'{"prompt": "a"', "cut text": b'{"prompt": "a', "comma": b'{"prompt": "a",}',
    "single quotes": b"{'prompt': 'a'}",
    "two": b'{"prompt": "a"}{"prompt": "b"}', "comment": b'{"prompt": "a"} // b', "no quotes": b"{prompt: 1}",
    "bom": b'\xef\xbb\xbf{"prompt": "a"}', "utf-16": '{"prompt": "a"}'.encode("utf-16"),
    "latin-1": b'{"prompt": "\xe9"}',
    "overlong": b'{"prompt": "\xc0\xaf"}', "surrogate bytes": b'{"prompt": "\xed\xa0\x80"}', "zero": b"\x00" * 100,
    "lone surrogate": b'{"prompt": "\\ud800"}', "lone surrogate key": b'{"prompt": "a", "\\udfff": 1}',
    "bad escape": b'{"prompt": "\\x41"}', "control": b'{"prompt": "a\nb"}', "NaN": b'{"prompt": "a", "x": NaN}',
    "Infinity": b'{"prompt": "a", "x": [-Infinity]}', "overflow": b'{"prompt": "a", "x": 1e999}',
    "underflowing exponent": b'{"prompt": "a", "temperature": -1e-1}',
    "long integer": b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
    "leading zero": b'{"prompt": "a", "n": 01}', "plus": b'{"prompt": "a", "n": +1}',
    "hex": b'{"prompt": "a", "n": 0x1}',
    "deep": deep(70), "deeper": deep(5000), "deepest": deep(40_000),
    "deep objects": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    "open lists": b"[" * 90_000, "form": b"prompt=a&max_tokens=5", "xml": b"<prompt>a</prompt>",
    "deep schema": b'{"prompt": "a", "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": '
    + b'{"items":' * 100 + b"{}" + b"}" * 100 + b"}}}",
}  # fmt: skip


@pytest.mark.parametrize("path", [COMPLETIONS, TOKENIZE])
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_bad_bodies(live: Live, path: str, body: bytes) -> None:
    if path == TOKENIZE and b"temperature" in body:
        pytest.skip("/tokenize ignores it")
    answer = live.client.post(path, content=body, headers={"Content-Type": "application/json"})
    check(answer.status_code, answer.json(), 400)


@pytest.mark.parametrize(
    "content_type",
    [None, "", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "json",
     "application/jsonp", "text/json", "application/json/x", "\x7f"],
)  # fmt: skip
def test_bodies_not_declared_as_json(live: Live, content_type: str | None) -> None:
    """Pages of other sites may send these without asking; JSON they may not."""
    headers = {} if content_type is None else {"Content-Type": content_type}
    answer = live.client.post(COMPLETIONS, content=b'{"prompt": "a"}', headers=headers)
    check(answer.status_code, answer.json(), 415)


@pytest.mark.parametrize(
    "path",
    ["/v1", "/v1/", "/v1/completion", "/v1/completions//", "/v1/completions/x", "//v1/completions", "/V1/completions",
     "/v1/models//", "/v1/models/another", "/v1/models/..%2fetc", "/v1/models/%00", "/v1/models/gemma-mtp-bundled/x",
     "/v1/embeddings", "/v1/chat", "/docs", "/redoc", "/admin", "/.env", "/page", "/page/", "/page/none.js",
     "/page/../app.py", "/page/%2e%2e/app.py", "/page/..%2fapp.py", "/page/%2fetc/passwd", "/page/....//app.py",
     "/page/%00", "/page/index.html%00.js", "/page/" + "a" * 5000, "/page/%ff%fe", "/%c0%ae%c0%ae/", "/health/x",
     "/metrics/x", "/openapi.yaml", "/page/..\\app.py", "/static/../../etc/passwd"],
)  # fmt: skip
def test_paths_that_lead_nowhere(live: Live, path: str) -> None:
    status, body = exchange(live, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    check(status, body, 404)


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", COMPLETIONS), ("PUT", COMPLETIONS), ("DELETE", CHAT), ("PATCH", TOKENIZE), ("POST", "/v1/models"),
     ("POST", "/health"), ("DELETE", "/v1/models/gemma-mtp-bundled"), ("OPTIONS", COMPLETIONS), ("POST", "/"),
     ("POST", "/metrics"), ("TRACE", "/health"), ("BREW", CHAT), ("POST", "/page/index.html")],
)  # fmt: skip
def test_methods_that_a_path_does_not_take(live: Live, method: str, path: str) -> None:
    answer = live.client.request(method, path)
    check(answer.status_code, answer.json(), 405)


def test_bodies_that_are_too_large(live: Live) -> None:
    large = json.dumps({"prompt": "a" * MOST_BYTES}).encode()
    headers = {"Content-Type": "application/json"}
    for path in (COMPLETIONS, CHAT, TOKENIZE, "/nothing"):
        answer = live.client.post(path, content=large, headers=headers)
        check(answer.status_code, answer.json(), 413)
        pieces = live.client.post(
            path, content=(large[i : i + 1000] for i in range(0, len(large), 1000)), headers=headers
        )
        check(pieces.status_code, pieces.json(), 413)


def exchange(live: Live, request: bytes) -> tuple[int, Any]:
    """Send bytes as they are; the answer's status and JSON."""
    with socket.create_connection(("127.0.0.1", live.port), timeout=SECONDS) as connection:
        connection.sendall(request)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    (length,) = re.findall(rb"\r\ncontent-length: (\d+)", head)
    return int(head.split()[1]), json.loads(body[: int(length)])


POST = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\n".encode()


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (POST + b"Content-Length: 99999999999999999999999\r\nConnection: close\r\n\r\n", 400),
        (POST + b"Content-Length: 200000\r\nConnection: close\r\n\r\n", 413),
        (POST + b"Content-Length: -5\r\nConnection: close\r\n\r\n", 400),
        (POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n", 400),
        (POST + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\nzz\r\n", 400),
        (POST + b"X: " + b"a" * 50_000 + b"\r\nConnection: close\r\n\r\n", 431),
        (POST + b"X" * 50_000, 400),
        (POST + b"".join(b"X-%d: 1\r\n" % i for i in range(150)) + b"Connection: close\r\n\r\n", 431),
        (POST + b"".join(b"X-%d: 1\r\n" % i for i in range(3000)) + b"Connection: close\r\n\r\n", 431),
        (POST + b"no colon\r\n\r\n", 400),
        (POST + b"Bad Name: x\r\n\r\n", 400),
        (b"GET /" + b"a" * 50_000 + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"nonsense\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 404),
    ],
)  # fmt: skip
def test_bad_http(live: Live, request_bytes: bytes, status: int) -> None:
    answered, body = exchange(live, request_bytes)
    # headers that do not come in one piece are refused while they come
    check(answered, body, 400 if status == 431 and answered == 400 else status)


def test_there_are_enough_of_them() -> None:
    assert len(list(cases())) + len(BODIES) >= 200
