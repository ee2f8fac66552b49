"""Schemas that would end the process, because llguidance goes down them by recursion, are refused; others are taken."""

import json
import threading
from typing import Any

import pytest

from gemma_mtp.decoding.grammar import Grammar
from gemma_mtp.errors import SamplingError


def chain(count: int, link: str = "#/$defs/d{}", **more: Any) -> dict[str, Any]:
    """Definitions of which each refers to the next one."""
    definitions = {
        f"d{i}": {"items": {"$ref": link.format(i + 1)}, **dict.fromkeys(more, f"d{i}")} for i in range(count)
    }
    return {"type": "object", "properties": {"a": {"$ref": link.format(0)}}, "$defs": {**definitions, f"d{count}": {}}}


def listed(count: int) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"a": {"type": "array", "prefixItems": [{"const": i} for i in range(count)]}},
    }


def wide(count: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"k{i}": {} for i in range(count)}}


def required(count: int) -> dict[str, Any]:
    return {"type": "object", "required": [f"k{i}" for i in range(count)]}


def inside(count: int) -> dict[str, Any]:
    """Wide objects inside each other: each is allowed, and together they are too deep."""
    schema: dict[str, Any] = {}
    for _ in range(count):
        schema = {"type": "object", "properties": {**wide(150)["properties"], "z": schema}}
    return schema


def compiled(kind: str, schema: dict[str, Any]) -> Exception | None:
    """What compiling it in a thread raises; a thread's stack is no larger than the main one's."""
    raised: list[Exception] = []

    def compile_it() -> None:
        try:
            if kind == "calls":
                Grammar("calls", json.dumps([{"name": "f", "parameters": schema}]))
            else:
                Grammar("json_schema", json.dumps(schema))
        except SamplingError as error:
            raised.append(error)

    thread = threading.Thread(target=compile_it)
    thread.start()
    thread.join()
    return raised[0] if raised else None


@pytest.mark.parametrize(
    ("kind", "schema", "words"),
    [
        ("json_schema", chain(4000), "nested too deeply"), ("calls", chain(4000), "nested too deeply"),
        ("json_schema", chain(2000, "#d{}", **{"$anchor": 1}), "references by name"),
        ("json_schema", chain(2000, "d{}", **{"$id": 1}), "references by name"),
        ("json_schema", wide(5000), "5000 properties"), ("calls", wide(5000), "5000 properties"),
        ("calls", listed(5000), "too many properties or items"), ("calls", required(5000), "too many properties or"),
        ("calls", inside(20), "too many properties or items"),
    ],
)  # fmt: skip
def test_what_is_too_deep_is_refused(kind: str, schema: dict[str, Any], words: str) -> None:
    error = compiled(kind, schema)
    assert error is not None and words in str(error)


@pytest.mark.parametrize(
    ("kind", "schema"),
    [
        ("json_schema", chain(90)), ("calls", chain(60)), ("calls", wide(900)), ("calls", listed(900)),
        ("calls", required(900)), ("json_schema", listed(4000)), ("calls", inside(5)), ("json_schema", inside(20)),
        ("json_schema", {"$defs": {"a": {"properties": {"a": {"$ref": "#/$defs/a"}, "b": {"$ref": "#/$defs/b"}}},
                                   "b": {"items": {"$ref": "#/$defs/a"}}}, "$ref": "#/$defs/a"}),
    ],
)  # fmt: skip
def test_what_is_large_is_taken(kind: str, schema: dict[str, Any]) -> None:
    assert compiled(kind, schema) is None
