"""Requests that are meant to cost much: each is refused, or taken and answered, for little processor time."""

import time
from typing import Any

import pytest
from live_server import Live
from table_models import table_pair

from gemma_mtp.engine.pair import Pair

CHAT = "/v1/chat/completions"
#: of processor time, of the whole server, on a machine that others use too; half a second is what they may take
MOST_SECONDS = 3.0


@pytest.fixture(scope="module")
def pair() -> Pair:
    return table_pair()


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def chain(links: int, word: str | None = None) -> dict[str, Any]:
    """References one after the other, or twice in each under a keyword: so many ways as 2 to the power of the links."""

    def link(i: int) -> dict[str, Any]:
        after = {"$ref": f"#/$defs/d{i + 1}"}
        one = {"type": "object", "properties": {"a": after}, "required": ["a"]}
        return one if word is None else {word: [after, one]}

    return {"$ref": "#/$defs/d0", "$defs": {**{f"d{i}": link(i) for i in range(links)}, f"d{links}": {"type": "null"}}}


def product(factors: int) -> dict[str, Any]:
    names = [({"required": [f"a{i}"]}, {"required": [f"b{i}"]}) for i in range(factors)]
    return {"type": "object", "allOf": [{"anyOf": list(pair)} for pair in names]}


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"v": schema}, "$defs": schema.get("$defs", {})}
    return {"tools": [tool("f", strict=True, parameters=parameters)], "tool_choice": "required"}


def formed(schema: dict[str, Any]) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}}


def tool(name: str, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **fields}}


def integers(count: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(count)}}


REFUSED: dict[str, dict[str, Any]] = {
    "schema deep": formed(nested(40)), "schema chain": formed(chain(2000)), "tool chain": strict(chain(400)),
    "schema doubled oneOf": formed(chain(20, "oneOf")), "schema doubled allOf": formed(chain(30, "allOf")),
    "schema product": formed(product(20)), "tool product": strict(product(20)), "schema wide": formed(integers(1001)),
    "schema optional": formed(integers(999)), "tool wide": strict(integers(999)),
    "schema patterns": formed({"patternProperties": {f"^a.*{i}$": {} for i in range(60)}}),
    "schema names": formed({"patternProperties": {f"^a{i}b[0-9]{{1,5}}x$": {} for i in range(60)}}),
    "schema together": formed({"allOf": [{"type": "string", "pattern": f"a.*{i}"} for i in range(20)]}),
    "schema ways": formed({"allOf": [{"anyOf": [{"type": "string", "pattern": f"^a{{0,{i}}}b{{{j}}}$"}
                                                for j in range(10)]} for i in range(4)]}),
    "regex repeated": {"regex": "(a{1000}){1000}"}, "regex stars": {"regex": "(ab)*" * 5000},
    "regex unicode": {"regex": r"(?i:\pL)" * 5000}, "regex literal": {"regex": "é" * 100_000},
    "regex nested": {"regex": "(" * 2000},
    "regex long": {"regex": "[a-z]*" * 3000}, "regex ahead": {"regex": "(?=a)a"},
    "regex too long": {"regex": "a" * 200_001}, "1000 tools": {"tools": [tool(f"f{i}") for i in range(1000)]},
    "128 tools": {"tools": [tool(f"f{i}", strict=True, parameters=integers(60)) for i in range(128)]},
    **{f"name {name[:12]!r}": {"tools": [tool(name)]} for name in (
        "", " ", "a b", "a/b", "a{b", "é", "x" * 129, "\n", "a\n", "<|tool_call>", "call:f{", "a\0", "🙂",
    )},
}  # fmt: skip
TAKEN: dict[str, dict[str, Any]] = {
    "schema deep": formed(nested(25)), "schema doubled anyOf": formed(chain(40, "anyOf")),
    "schema enum": formed({"enum": [f"v{i}" for i in range(15_000)]}),
    "schema long list": formed({"type": "array", "items": {"type": "integer"}, "minItems": 100_000}),
    "schema long text": formed({"type": "string", "maxLength": 1_000_000}),
    "schema pattern": formed({"type": "string", "pattern": "^((a{0,100}){0,100}){0,100}$"}),
    "tool pattern": strict({"type": "string", "pattern": "^(.*a.{12}|b)+$", "maxLength": 100}),
    "regex doubled": {"regex": "(x+x+)+y"}, "regex repeated": {"regex": "((a{0,500}){0,500}){0,500}"},
    "regex of states": {"regex": "(.*a.{16}){4}"}, "regex of words": {"regex": r"(\p{L}{1,500} ){1,500}"},
    "100 tools": {"tools": [tool(f"f{i}") for i in range(100)], "tool_choice": "required"},
    "tool enum": strict({"enum": [f"v{i}" for i in range(400)]}),
}  # fmt: skip


@pytest.mark.parametrize(("status", "name"), [(400, name) for name in REFUSED] + [(200, name) for name in TAKEN])
def test_costs_little(live: Live, status: int, name: str) -> None:
    fields = (REFUSED if status == 400 else TAKEN)[name]
    rounds, began = live.service.engine.stats().rounds, time.process_time()
    answer = live.post(CHAT, {"messages": [{"role": "user", "content": "TEXT"}], "max_tokens": 3, **fields})
    took = time.process_time() - began
    assert answer.status_code == status, answer.text
    assert took < MOST_SECONDS
    if status == 400:
        message = answer.json()["error"]["message"]
        assert message.endswith(".") and len(message) < 600
        assert live.service.engine.stats().rounds == rounds, "refused before anything is decoded"
