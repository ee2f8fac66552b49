"""Annotations of JSON schemas: what allows every value by the standard is no error and no constraint."""

from __future__ import annotations

import copy
import functools
import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_mtp.decoding.grammar import Grammar
from gemma_mtp.decoding.grammar_compiler import GrammarCompiler
from gemma_mtp.decoding.params import SamplingParams
from gemma_mtp.decoding.schema import schemas, without_annotations
from gemma_mtp.engine.pair import Pair, bundled_directory, load_pair
from gemma_mtp.errors import SamplingError
from gemma_mtp.tokenizer import Tokenizer

#: what Pydantic writes, what the standard names and llguidance does not know, and what nobody knows
UNKNOWN = ("path", "file-path", "directory-path", "binary", "password", "url", "iri", "uri-template", "json-pointer",
           "base64url", "json-string", "nope", "", "x" * 5000)  # fmt: skip
TEXT = {"type": "string", "maxLength": 8}


@functools.cache
def bundled_tokenizer() -> Tokenizer:
    return Tokenizer.from_dir(bundled_directory() / "target")


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    tokenizer = bundled_tokenizer()
    return GrammarCompiler(tokenizer, tokenizer.vocab_size)


def takes(compiler: GrammarCompiler, schema: object, text: str) -> bool:
    """Whether the grammar of a schema allows the text whole, token by token."""
    state = compiler.start(Grammar("json_schema", json.dumps(schema)), (1,), "cpu")
    ids = bundled_tokenizer().raw.encode(text, add_special_tokens=False).ids
    return all(bool(mask[token]) for mask, token in zip(state.allowed(ids), [*ids, 1], strict=True))


@pytest.mark.parametrize("name", UNKNOWN, ids=lambda name: name[:20])
def test_an_unknown_format_allows_what_the_schema_without_it_does(compiler: GrammarCompiler, name: str) -> None:
    text = {**TEXT, "format": name}
    for schema in (text, {"anyOf": [text, {"type": "null"}]}, {"$ref": "#/$defs/a", "$defs": {"a": text}},
                   {"allOf": [text]}, {"oneOf": [text, {"type": "null"}]}):  # fmt: skip
        assert takes(compiler, schema, '"a b/c"')
        assert not takes(compiler, schema, '"123456789"')
    assert takes(compiler, {"format": name}, "3") and takes(compiler, {"format": name}, '"a b"')
    assert takes(compiler, {"type": "array", "items": text, "maxItems": 1}, '["x"]')
    assert takes(compiler, {"type": "array", "prefixItems": [text], "items": False, "minItems": 1}, '["x"]')
    assert takes(compiler, {"type": "object", "additionalProperties": text}, '{"a": "x"}')
    assert takes(compiler, {"type": "object", "patternProperties": {"^a$": text}}, '{"a": "x"}')
    assert takes(compiler, {"$ref": "#/components/schemas/format", "components": {"schemas": {"format": text}}}, '"x"')


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [("date", "2024-02-29", "2024-13-01"), ("uuid", "123e4567-e89b-12d3-a456-426614174000", "123e4567"),
     ("ipv4", "10.0.0.1", "10.0.0.256"), ("date-time", "2024-01-02T03:04:05Z", "yesterday")],
)  # fmt: skip
def test_a_known_format_is_kept(compiler: GrammarCompiler, name: str, good: str, bad: str) -> None:
    for schema in ({"type": "string", "format": name}, {"anyOf": [{"type": "string", "format": name}]}):
        assert takes(compiler, schema, json.dumps(good))
        assert not takes(compiler, schema, json.dumps(bad))


@pytest.mark.parametrize("name", ["format", "default", "enum", "const", "examples", "properties", "items", "$defs"])
def test_a_property_may_have_a_keywords_name(compiler: GrammarCompiler, name: str) -> None:
    schema = {"type": "object", "properties": {name: {**TEXT, "format": "path"}}, "required": [name],
              "additionalProperties": False}  # fmt: skip
    assert takes(compiler, schema, json.dumps({name: "x"}))
    assert not takes(compiler, schema, json.dumps({name: 3}))
    assert not takes(compiler, schema, "{}")


@pytest.mark.parametrize("keyword", ["const", "enum"])
def test_data_are_left_as_they_are(compiler: GrammarCompiler, keyword: str) -> None:
    value = {"format": "path", "if": {}, "uniqueItems": False}
    schema = {keyword: [value] if keyword == "enum" else value}
    assert takes(compiler, schema, json.dumps(value))
    assert not takes(compiler, schema, "{}")


#: keyword -> a schema in which it allows every value, though llguidance knows it for a constraint that it can not keep
ALLOW_ALL = [
    {"if": {"type": "string"}}, {"then": {"type": "string"}}, {"else": {"type": "string"}},
    {"then": {"type": "string"}, "else": {"type": "null"}}, {"minContains": 2}, {"maxContains": 0},
    {"contains": {"type": "string"}, "minContains": 0}, {"uniqueItems": False}, {"not": False},
    {"propertyNames": True}, {"propertyNames": {}}, {"unevaluatedItems": True}, {"unevaluatedProperties": {}},
    {"dependentRequired": {}}, {"dependentSchemas": {}}, {"dependencies": {}}, {"$dynamicAnchor": "a"},
    {"$recursiveAnchor": True},
]  # fmt: skip
#: annotations of the standard, of OpenAPI and of others
ANNOTATIONS = {
    "title": "T", "description": "d", "default": {"format": 3}, "examples": [{"format": 3}], "example": {"not": {}},
    "deprecated": True, "readOnly": True, "writeOnly": True, "$comment": "c", "contentMediaType": "application/json",
    "contentEncoding": "base64", "contentSchema": {"type": "string"}, "x-internal": {"not": 3}, "nullable": True,
    "discriminator": {"propertyName": "a"}, "externalDocs": {"url": "u"}, "markdownDescription": "m",
    "$vocabulary": {"https://example.org/v": False}, "$schema": "https://json-schema.org/draft/2020-12/schema",
    "propertyOrdering": ["a"], "enumNames": ["a"],
}  # fmt: skip


@pytest.mark.parametrize("part", [*ALLOW_ALL, *({k: v} for k, v in ANNOTATIONS.items())], ids=json.dumps)
def test_what_allows_every_value_is_no_error(compiler: GrammarCompiler, part: dict[str, Any]) -> None:
    schema = {"type": "array", "items": {"type": "integer", **part}, "maxItems": 3, **part}
    assert takes(compiler, schema, "[1, 1]")
    assert not takes(compiler, schema, '["1"]')


#: constraints that can not be kept
REFUSED = [
    {"if": {"type": "string"}, "then": {"maxLength": 3}}, {"if": {}, "else": False},
    {"contains": {"type": "string"}}, {"contains": {}, "minContains": 1},
    {"contains": {}, "minContains": 0, "maxContains": 2}, {"uniqueItems": True}, {"not": {"type": "string"}},
    {"not": True}, {"propertyNames": {"pattern": "a"}}, {"propertyNames": False}, {"unevaluatedItems": False},
    {"unevaluatedProperties": False}, {"dependentRequired": {"a": ["b"]}}, {"dependentSchemas": {"a": False}},
    {"dependencies": {"a": ["b"]}}, {"$dynamicRef": "#a"}, {"$recursiveRef": "#"},
]  # fmt: skip


@pytest.mark.parametrize("part", REFUSED, ids=json.dumps)
def test_a_constraint_that_can_not_be_kept_is_refused_by_name(part: dict[str, Any]) -> None:
    for schema in (part, {"type": "array", "items": part}, {"anyOf": [part, {"type": "null"}]}):
        with pytest.raises(SamplingError) as caught:
            Grammar("json_schema", json.dumps(schema))
        assert any(keyword in str(caught.value) for keyword in part)


simple = st.sampled_from([{"type": "string"}, {"type": "integer"}, {"minimum": 2}, {"maxLength": 1}, True, False, {}])
parts = st.sampled_from([*ALLOW_ALL, *REFUSED[:-2], {"format": "path"}, {"title": "t"}, {"enum": [1, {"format": "x"}]}])


def nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.builds(
        lambda where, part, schema: {**part, **where(schema)},
        st.sampled_from([lambda s: {"items": s}, lambda s: {"properties": {"format": s, "if": s}},
                         lambda s: {"anyOf": [s, {"type": "null"}]}, lambda s: {"additionalProperties": s},
                         lambda s: {"allOf": [s, {"$ref": "#/$defs/default"}]}]),
        parts, inner,
    )  # fmt: skip


values = st.recursive(
    st.sampled_from([None, 1, 3, "a", "bb"]),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["format", "if", "a"]), inner, max_size=2)
    ),
    max_leaves=4,
)


@settings(deadline=None, max_examples=300)
@given(inner=st.recursive(st.one_of(simple, parts), nested, max_leaves=3), named=st.one_of(simple, parts), value=values)
def test_what_is_taken_out_changes_nothing_that_the_standard_accepts(inner: Any, named: Any, value: Any) -> None:
    """By jsonschema, to which formats are annotations."""
    schema = {"allOf": [inner], "$defs": {"default": named}}
    changed = without_annotations(copy.deepcopy(schema), lambda name: False)
    accepts = jsonschema.Draft202012Validator(schema).is_valid(value)
    assert jsonschema.Draft202012Validator(changed).is_valid(value) == accepts
    assert without_annotations(copy.deepcopy(changed), lambda name: False) == changed


def test_schemas_are_what_they_are_said_to_be() -> None:
    inner, named = {"format": "a"}, {"format": "b"}
    schema = {"properties": {"enum": inner, "properties": {"properties": {"format": named}}}, "enum": [{"format": "c"}],
              "default": {"format": "d"}}  # fmt: skip
    found = list(schemas(schema))
    assert inner in found and named in found
    assert {"format": "c"} not in found and {"format": "d"} not in found


def test_the_bundled_pair_writes_a_path() -> None:
    pair: Pair = load_pair()
    schema = {"type": "object", "properties": {"file": {**TEXT, "format": "path"}}, "required": ["file"],
              "additionalProperties": False}  # fmt: skip
    params = SamplingParams(max_tokens=60, grammar=Grammar("json_schema", json.dumps(schema)))
    plain, drafted = (pair.generate("x = ", params, draft_tokens=k) for k in (0, 4))
    assert plain.token_ids == drafted.token_ids and drafted.text is not None
    jsonschema.validate(json.loads(drafted.text), schema)
