"""Calls held to a schema: what the grammar accepts is of the schema, and what is of the schema it accepts."""

import contextlib
import json
import time
from typing import Any

import jsonschema
import pytest
import torch
from table_models import QUOTE, table_tokenizer

from gemma_mtp.chat.calls import CallReader
from gemma_mtp.decoding.grammar import Grammar
from gemma_mtp.decoding.grammar_compiler import GrammarCompiler
from gemma_mtp.decoding.turn_rules import TurnRules
from gemma_mtp.errors import SamplingError

TOKENIZER = table_tokenizer()
COMPILER = GrammarCompiler(TOKENIZER, TOKENIZER.vocab_size)
NODE = {"type": "object", "properties": {"v": {"type": "number"}, "next": {"anyOf": [{"$ref": "#/$defs/node"},
        {"type": "null"}]}}, "required": ["v", "next"], "additionalProperties": False}  # fmt: skip
SCHEMAS: dict[str, dict[str, Any]] = {
    "weather": {"type": "object", "properties": {"city": {"type": "string", "minLength": 1, "maxLength": 3},
                "days": {"type": "integer", "minimum": 1, "maximum": 7}, "unit": {"enum": ["c", "f", None, 5]}},
                "required": ["city"], "additionalProperties": False},
    "lists": {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "boolean"}, "minItems": 1,
              "maxItems": 3}, "b": {"type": "array", "prefixItems": [{"const": 1}, {"type": "null"}], "items": False},
              "c": {"type": "array", "prefixItems": [{"const": 1}], "items": {"const": True}, "minItems": 2,
              "maxItems": 3}}, "required": ["a"], "additionalProperties": {"type": "integer"}},
    "recursive": {"$defs": {"node": NODE}, "$ref": "#/$defs/node"},
    "optional": {"type": "object", "properties": {f"p{i}": {"type": "null"} for i in range(6)},
                 "required": ["p2", "p4"], "additionalProperties": False},
    "texts": {"type": "object", "properties": {"p": {"type": "string", "pattern": "^(a|b/)+$"},
              "d": {"type": "string", "format": "date"},
              "both": {"type": "string", "pattern": "^a+$", "maxLength": 2}, "odd key!": {"type": ["null", "boolean"]},
              "": {"const": {"k": ["v", 1]}}}, "additionalProperties": False,
              "required": ["p", "d", "both", "odd key!", ""]},
    "one of": {"type": "object", "properties": {"e": {"oneOf": [
               {"type": "object", "properties": {"k": {"const": "a"}, "n": {"type": "integer"}}, "required": ["k", "n"],
                "additionalProperties": False},
               {"type": "object", "properties": {"k": {"const": "b"}}, "required": ["k"],
                "additionalProperties": False}, {"type": "integer"}]}}, "required": ["e"],
               "additionalProperties": False},
    "any": {},
    "nothing": {"type": "object", "properties": {}, "additionalProperties": False},
}  # fmt: skip


def calls(schema: Any, name: str = "f") -> Grammar:
    return Grammar("calls", json.dumps([{"name": name, "parameters": schema}]))


def accepts(grammar: Grammar, text: str) -> bool:
    state = COMPILER.start(grammar, (), "cpu")
    tokens = TOKENIZER.encode(text + "<tool_call|>", special=False)
    return state.commit(tokens) == len(tokens) if state.ended_after(tokens) and _taken(state, tokens) else False


def _taken(state: Any, tokens: list[int]) -> bool:
    return all(bool(state.allowed(tokens[:i])[i, token]) for i, token in enumerate(tokens))


def arguments_of(tokens: list[int]) -> Any:
    reader, found = CallReader({"f"}), ""
    decoder = TOKENIZER.stream(skip_special_tokens=False)
    for token in tokens[:-1]:
        if token == TOKENIZER.marks.quote:
            found += reader.push(decoder.flush()) + reader.quote()
        else:
            found += reader.push(decoder.push([token]))
    assert reader.complete and tokens[-1] == TOKENIZER.raw.token_to_id("<tool_call|>")
    return json.loads(found)


def random_call(grammar: Grammar, seed: int) -> list[int] | None:
    """A walk by random allowed tokens, with a bias to what ends; None where it grew long."""
    state, generator = COMPILER.start(grammar, (), "cpu"), torch.Generator().manual_seed(seed)
    ends = [*TOKENIZER.encode('}"],', special=False), 49, 52]
    tokens: list[int] = []
    for _ in range(300):
        allowed = state.allowed([])
        weights = allowed[0].float()
        weights[ends] *= 20
        tokens.append(int(torch.multinomial(weights, 1, generator=generator)))
        if state.commit(tokens[-1:]) is not None:
            return tokens
    return None


@pytest.mark.parametrize("name", SCHEMAS)
def test_random_tokens_make_arguments_of_the_schema(name: str) -> None:
    grammar = calls(SCHEMAS[name])
    found = [tokens for seed in range(12) if (tokens := random_call(grammar, seed)) is not None]
    assert len(found) >= 3, "walks end"
    for tokens in found:
        jsonschema.validate(arguments_of(tokens), SCHEMAS[name])


#: a schema of one property `p`, and values in the syntax of calls that it accepts and refuses
Q = QUOTE
VALUES: list[tuple[Any, list[str], list[str]]] = [
    ({"type": "string"}, [f"{Q}{Q}", f'{Q}a{{}}",:\n{Q}'], ["1", "null", f"{Q}a", "a"]),
    ({"type": ["integer", "null"]}, ["1", "-7", "null"], ["1.5", "true", f"{Q}1{Q}"]),
    ({"type": "number", "exclusiveMinimum": 0, "multipleOf": 0.5}, ["0.5", "2"], ["0", "-1", "0.3"]),
    ({"enum": ["a", 1, True, None, [1], {"k": "v"}]}, [f"{Q}a{Q}", "1", "true", "null", "[1]", f"{{k:{Q}v{Q}}}"],
     ["2", "false", f"{Q}b{Q}", "[]"]),
    ({"enum": ["a", 1], "type": "string"}, [f"{Q}a{Q}"], ["1"]),
    ({"type": "array", "items": {"type": "integer"}, "maxItems": 2}, ["[]", "[1]", "[1,2]"], ["[1,2,3]", "[true]"]),
    ({"type": "array", "minItems": 2}, ["[1,null]", "[1,2,3]"], ["[]", "[1]"]),
    ({"type": "array", "maxItems": 0}, ["[]"], ["[1]"]),
    ({"type": "string", "pattern": "b+"}, [f"{Q}abc{Q}"], [f"{Q}ac{Q}"]),
    ({"type": "string", "pattern": "^b"}, [f"{Q}bc{Q}"], [f"{Q}ab{Q}"]),
    ({"type": "string", "pattern": "c$"}, [f"{Q}bc{Q}"], [f"{Q}cb{Q}"]),
    ({"type": "string", "maxLength": 0}, [f"{Q}{Q}"], [f"{Q}a{Q}"]),
    ({"type": "string", "format": "uuid"}, [f"{Q}123e4567-e89b-12d3-a456-426614174000{Q}"], [f"{Q}x{Q}"]),
    ({"type": "string", "format": "of-our-own"}, [f"{Q}x{Q}"], ["1"]),
    ({"anyOf": [{"type": "boolean"}, {"type": "array"}]}, ["true", "[1]"], ["1"]),
    ({"allOf": [{"type": "boolean"}], "description": "x"}, ["true"], ["1"]),
    (True, ["1", f"{{a:{Q}b{Q}}}", "[[]]"], ["b", ""]),
    ({"type": "object", "additionalProperties": {"type": "null"}}, ["{}", "{a:null,b:null}"], ["{a:1}"]),
    ({"minimum": 3}, ["3", f"{Q}x{Q}", "null"], ["2"]),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "good", "bad"), VALUES)
def test_values_by_schema(schema: Any, good: list[str], bad: list[str]) -> None:
    grammar = calls({"type": "object", "properties": {"p": schema}, "required": ["p"], "additionalProperties": False})
    assert [value for value in good if not accepts(grammar, f"call:f{{p:{value}}}")] == []
    assert [value for value in bad if accepts(grammar, f"call:f{{p:{value}}}")] == []


def test_names_of_other_properties_are_others() -> None:
    grammar = calls({"type": "object", "properties": {"a": {"type": "null"}}, "additionalProperties": True})
    assert accepts(grammar, "call:f{a:null,b:1}") and accepts(grammar, "call:f{b:1}") and accepts(grammar, "call:f{}")
    assert not accepts(grammar, "call:f{a:1}") and not accepts(grammar, "call:f{a:null,a:1}")


@pytest.mark.parametrize(
    ("schema", "words"),
    [({"type": "string"}, "of the type object"), ({"properties": {"a": {"not": {}}}}, "not is not offered"),
     ({"properties": {"a": {"patternProperties": {"x": {}}}}}, "patternProperties"),
     ({"properties": {"a": {"type": "array", "uniqueItems": True}}}, "uniqueItems"),
     ({"properties": {"a": {"minProperties": 1}}}, "minProperties"),
     ({"properties": {"a": {"allOf": [{}, {}]}}}, "allOf of several"),
     ({"properties": {"a": {"oneOf": [{"type": "integer"}, {"type": "number"}]}}}, "oneOf"),
     ({"properties": {"a": {"$ref": "#/$defs/b"}}}, "not there"),
     ({"properties": {"a": {"$ref": "http://x"}}}, "no path"), ({"properties": {"a": {"$ref": "#a"}}}, "no path"),
     ({"properties": {"a": {"type": "strange"}}}, "JSON Schema's types"), ({"$ref": "#"}, "itself"),
     ({"properties": {"a": {"anyOf": [{}], "type": "null"}}}, "anyOf beside type"),
     ({"properties": {"a": False}, "required": ["a"]}, "accepts nothing"),
     ({"properties": {"a": {"type": "string", "pattern": "(?=x)"}}}, "can not be used"),
     ({"properties": {"a": {"type": "string", "pattern": "^a|b$"}}}, "anchored"),
     ({"properties": {"a": {"type": "number", "multipleOf": 1009}}}, "multipleOf"),
     ({"properties": {"a": {"type": "string", "maxLength": -1}}}, "maxLength"),
     ({"properties": {"a": {"type": "array", "minItems": 2, "maxItems": 1}}}, "longer than it may")],
)  # fmt: skip
def test_what_can_not_be_held_is_refused(schema: Any, words: str) -> None:
    with pytest.raises(SamplingError, match=words):
        COMPILER.check(calls(schema if "$ref" in schema else {"type": "object", **schema}))


@pytest.mark.parametrize(
    "source", ["", "x", "{}", "[]", "[1]", '[{"name": "f"}]', '[{"name": "f f", "parameters": null}]',
               '[{"name": "", "parameters": null}]', '[{"name": "f", "parameters": []}]',
               '[{"name": "f", "parameters": null}, {"name": "f", "parameters": null}]'],
)  # fmt: skip
def test_tools_that_are_none_are_refused(source: str) -> None:
    with pytest.raises(SamplingError):
        Grammar("calls", source)


def test_a_thousand_tools_and_a_deep_schema_take_no_second() -> None:
    deep: dict[str, Any] = {"type": "null"}
    for _ in range(200):
        deep = {"type": "object", "properties": {"a": deep}}
    began = time.process_time()
    COMPILER.check(Grammar("calls", json.dumps([{"name": f"t{i}", "parameters": None} for i in range(1000)])))
    with contextlib.suppress(SamplingError):
        COMPILER.check(calls(deep))
    assert time.process_time() - began < 20  # a second on any machine: what is meant is that it does not explode


def test_rules_of_turns_that_contradict_themselves_are_refused() -> None:
    text, tools = Grammar("regex", "a"), calls(None)
    for wrong in ({"answer": tools}, {"calls": text}, {"must_call": True}, {"max_thought_tokens": -1},
                  {"must_call": True, "calls": tools, "answer": text}):  # fmt: skip
        with pytest.raises(SamplingError):
            TurnRules(**wrong)
