"""Grammars that would be much work are refused by what they say; those of people and clients are far from that."""

import json
import time
from typing import Any

import pytest
from table_models import table_tokenizer

from gemma_mtp.decoding import expression_cost, schema_cost
from gemma_mtp.decoding.expression_cost import MAX_PARTS, MAX_REQUIRED, check_expression
from gemma_mtp.decoding.grammar import Grammar
from gemma_mtp.decoding.grammar_compiler import GrammarCompiler
from gemma_mtp.decoding.turn_rules import TurnRules
from gemma_mtp.errors import SamplingError

COMPILER = GrammarCompiler(table_tokenizer(), table_tokenizer().vocab_size)
TEXT = {"type": "string"}


def reading(expression: str) -> tuple[int, int]:
    read = expression_cost._Expression()
    read.read(expression)
    return read.parts, read.required


@pytest.mark.parametrize(
    ("expression", "parts", "required"),
    [("abc", 0, 3), ("ab{3}c", 1, 5), ("(ab|c){10}x", 2, 21), ("a{0,5}b*c?", 3, 3), ("(a{20}){30}", 3, 600),
     ("x(a{100}b){50}|zz", 3, 5051), (r"\(a\{3\}", 0, 5), (r"\p{L}\w", 6, 2), (r"[\d(){9}a-z]x{3}", 5, 4),
     ("[a[b]&&[^c]]{2}", 4, 2), ("[(?<]x>{3}", 2, 5), (r"[\]](a){4}", 3, 5), (r"\x{1F600}{5}", 1, 5),
     ("(?:a|(?P<n>bb)){2}", 3, 4), ("^(?i)a.$", 2, 2), ("(a", 1, 1), ("a)", 0, 1), ("\\", 0, 1), ("[", 1, 0),
     ("{9}", 1, 0)],
)  # fmt: skip
def test_parts_and_required_text(expression: str, parts: int, required: int) -> None:
    assert reading(expression) == (parts, required)


def test_numbers_stay_short() -> None:
    with pytest.raises(SamplingError, match="one after the other") as refused:
        check_expression("a" + "{999999999}" * 900, "regular expression")
    assert len(str(refused.value)) < 200


def all_of(*parts: Any) -> dict[str, Any]:
    return {"allOf": list(parts)}


def patterned(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [{**TEXT, "pattern": f"^[a-z]{{0,{first + i}}}$"} for i in range(count)]


def any_of(count: int) -> dict[str, Any]:
    return {"anyOf": patterned(count)}


def chained(count: int) -> dict[str, Any]:
    links = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}", "pattern": f"^a{{0,{i}}}$"} for i in range(count)}
    return {"$ref": "#/$defs/d0", "$defs": {**links, f"d{count}": TEXT}}


def in_property(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"type": "object", "properties": {"x": part}} for part in parts]


def in_others(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"additionalProperties": part} for part in parts]


def tagged(count: int, tags: int) -> dict[str, Any]:
    """Objects told apart by so many properties, of which each one has some."""
    return {"oneOf": [{"type": "object", "properties": {f"k{i % tags}": {"const": i}}, "required": [f"k{i % tags}"]}
                      for i in range(count)]}  # fmt: skip


def names(count: int) -> dict[str, Any]:
    return {"type": "object", "patternProperties": {f"^a{i}$": {} for i in range(count)}}


REFUSED: dict[str, tuple[str, Any, str]] = {
    "repeated": ("regex", "(a{1000}){1000}", "asks for 1000000 characters"),
    "repeated later": ("regex", "x|y(a{200}b){200}", "asks for 40201 characters"),
    "repetitions": ("regex", "a?" * (MAX_PARTS + 1), "1001 groups, classes"),
    "unicode": ("regex", r"(?i)(\pL" + r"\pL" * 400 + ")", "those of Unicode count as 3"),
    "verbose": ("regex", "(?x)#[\n(a{1000}){1000}", "flag x"),
    "long text": ("regex", "é" * (MAX_REQUIRED + 1), "one after the other"),
    "pattern repeated": ("json", {**TEXT, "pattern": "^(a{1000}){1000}$"}, "pattern asks for"),
    "patterns": ("json", {"anyOf": [{"pattern": rf"^\w\d{i}$"} for i in range(500)]}, "3500 parts"),
    "formats": ("json", {"prefixItems": [{"format": "email"}] * 800}, "3200 parts"),
    "pattern of names": ("json", {"patternProperties": {"(a{200}){200}": {}}}, "asks for 40000"),
    "names": ("json", names(33), "must exclude each other"),
    "names of many": ("json", {"prefixItems": [names(12)] * 8}, "must exclude each other"),
    "constant": ("json", {"const": "x" * 20_001}, "a constant of 20001 characters"),
    "constant's name": ("json", {"enum": [{"x" * 20_001: 1}]}, "a constant of 20001 characters"),
    "values": ("json", {"enum": [[i, i] for i in range(1001)]}, "2002 values inside"),
    "alternatives": ("json", {"anyOf": [{"const": i} for i in range(1001)]}, "more than 1000 schemas"),
    "together": ("json", all_of(*patterned(9)), "9 patterns that one text must match"),
    "nested": ("json", all_of(all_of(*patterned(5)), all_of(*patterned(5, 5))), "10 patterns"),
    "beside": ("json", {**all_of(*patterned(8)), "format": "date"}, "9 patterns"),
    "references": ("json", chained(9), "9 patterns"),
    "anchors": ("json", {**chained(9), "$anchor": "a", "items": {"$ref": "#a"}}, "references by name"),
    "properties": ("json", all_of(*in_property(patterned(9))), "9 patterns"),
    "others": ("json", all_of(*in_property(patterned(5)), *in_others(patterned(5, 5))), "10 patterns"),
    "items": ("json", all_of(*({"items": part} for part in patterned(9))), "9 patterns"),
    "ways": ("json", all_of(*[any_of(11)] * 3), "more than 1000 ways"),
    "ways inside": ("json", all_of(*in_property([any_of(11)] * 3)), "more than 1000 ways"),
    "ways beside": ("json", {**any_of(40), "oneOf": any_of(40)["anyOf"]}, "more than 1000 ways"),
    "tool": ("calls", {**TEXT, "pattern": "(a{1000}){1000}"}, "schema of the tool f's pattern asks for"),
    "tool's properties": ("calls", {"properties": {f"p{i}": {"properties": {f"q{j}": {"const": j} for j in range(50)}}
                          for i in range(52)}}, "more properties"),
    "tool's oneOf": ("calls", tagged(201, 2), "no one property tells apart"),
}  # fmt: skip
TAKEN: dict[str, tuple[str, Any]] = {
    "lengths": ("regex", r"(\w{1,500} ){1,500}"), "words": ("regex", "|".join(f"word{i}" for i in range(4_000))),
    "parts": ("regex", "[a-z]?x" * (MAX_PARTS // 2)), "required": ("regex", "a{200}{100}"),
    "patterns": ("json", {"prefixItems": [{**TEXT, "pattern": "^[a-z]+-[0-9]{4}$"} for _ in range(500)]}),
    "together": ("json", all_of(*patterned(8))), "apart": ("json", all_of(*({"properties": {f"p{i}": part}}
                                                           for i, part in enumerate(patterned(50))))),
    "alternatives": ("json", {"type": "array", "items": {"anyOf": [any_of(40), any_of(40)]}}),
    "inherited": ("json", {**all_of({"$ref": "#/$defs/a"}, {"properties": {"c": TEXT}}), "$defs": {
        "a": {"type": "object", "properties": dict(zip("bdefghijklmn", patterned(12), strict=True))}}}),
    "recursive": ("json", {"type": "object", "properties": {"next": {"$ref": "#"}, "v": any_of(30)}}),
    "ways": ("json", all_of(*[any_of(10)] * 2)), "enum": ("json", {"enum": [f"v{i}" for i in range(10_000)]}),
    "tool's enum": ("calls", {"enum": [f"v{i}" for i in range(5_000)]}),
    "tool's oneOf": ("calls", tagged(300, 1)),
}  # fmt: skip


def made(kind: str, source: Any) -> Grammar:
    if kind == "regex":
        return Grammar("regex", source)
    if kind == "json":
        return Grammar("json_schema", json.dumps(source))
    parameters = {"type": "object", "properties": {"v": source}}
    return Grammar("calls", json.dumps([{"name": "f", "parameters": parameters}]))


@pytest.mark.parametrize("name", REFUSED)
def test_much_work_is_refused(name: str) -> None:
    kind, source, words = REFUSED[name]
    with pytest.raises(SamplingError) as refused:
        made(kind, source)
    assert words in str(refused.value)


@pytest.mark.parametrize("name", TAKEN)
def test_little_work_is_taken(name: str) -> None:
    grammar = made(*TAKEN[name])
    COMPILER.check(TurnRules(calls=grammar) if grammar.kind == "calls" else grammar)


def test_parts_in_many_places_are_looked_at_once() -> None:
    """Each definition has all later ones in it: so many places as 2 to the power of their number."""
    tree = {f"d{i}": {"properties": {f"p{j}": {"$ref": f"#/$defs/d{j}"} for j in range(i + 1, 40)}} for i in range(39)}
    began = time.process_time()
    schema_cost.check_cost({"$ref": "#/$defs/d0", "$defs": {**tree, "d39": any_of(20)}}, "JSON schema")
    joined = {f"d{i}": all_of(*({"properties": {"p": {"$ref": f"#/$defs/d{j}"}}} for j in range(i + 1, 40)))
              for i in range(39)}  # fmt: skip
    with pytest.raises(SamplingError, match="ways"):
        schema_cost.check_cost({"$ref": "#/$defs/d0", "$defs": {**joined, "d39": any_of(20)}}, "JSON schema")
    assert time.process_time() - began < 5
