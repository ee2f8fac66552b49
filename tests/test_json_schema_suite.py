"""The official test suite of JSON Schema: a schema is held in full, or refused before anything is decoded.

Some files of draft 2020-12 lie beside this one; `make build/json-schema-suite` brings all drafts, for the slow test.
They hold what is written to the schema in both forms: as JSON, and as a call of a tool.
"""

import contextlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from table_models import QUOTE, table_tokenizer

from gemma_mtp.chat.calls import BARE_KEY
from gemma_mtp.decoding.grammar import Grammar
from gemma_mtp.decoding.grammar_compiler import GrammarCompiler
from gemma_mtp.decoding.turn_rules import TurnRules
from gemma_mtp.errors import SamplingError

HERE = Path(__file__).parent
FEW, ALL = HERE / "json_schema_suite", HERE.parent / "build" / "json-schema-suite" / "tests"
DRAFTS = ("draft3", "draft4", "draft6", "draft7", "draft2019-09", "draft2020-12")
TOKENIZER = table_tokenizer()
COMPILER = GrammarCompiler(TOKENIZER, TOKENIZER.vocab_size)
#: ways to write one value that are tried; the order of names is the schema's
WAYS = 200
#: valid by the drafts before 2019-09 alone, which take no notice of what stands beside a $ref
OLDER = ("ref overrides any sibling keywords",)

Write = Callable[[Any], str]


def orders(value: Any) -> Iterator[Any]:
    """The value with the names of its objects in every order."""
    if isinstance(value, dict):
        for names in itertools.permutations(value):
            for values in itertools.product(*(list(orders(value[name])) for name in names)):
                yield dict(zip(names, values, strict=True))
    elif isinstance(value, list):
        yield from map(list, itertools.product(*map(list, map(orders, value))))
    else:
        yield value


def takes(rules: Grammar | TurnRules, text: str) -> bool:
    """Whether the grammar allows the text whole, however it is cut into tokens."""
    cursor = COMPILER._cursor(rules, (1,))
    for token in TOKENIZER.encode(text, special=False):
        if not cursor.accepts(token):  # type: ignore[attr-defined]
            return False
        cursor.take(token)
    return cursor.complete


def call(value: Any) -> str:
    """A value as calls have it."""
    if isinstance(value, str):
        return f"{QUOTE}{value}{QUOTE}"
    if isinstance(value, list):
        return f"[{','.join(map(call, value))}]"
    if isinstance(value, dict):  # in the order of templates, which is the grammar's
        names = {name: name if BARE_KEY.fullmatch(name) else call(name) for name in sorted(value, key=str.lower)}
        return f"{{{','.join(f'{text}:{call(value[name])}' for name, text in names.items())}}}"
    return json.dumps(value)


def as_json(schema: Any) -> tuple[Grammar, Write]:
    return Grammar("json_schema", json.dumps(schema)), lambda value: json.dumps(value, ensure_ascii=False)


def as_call(schema: Any) -> tuple[Grammar, Write]:
    """What the schema says of a value, of one that a tool is called with; what it points at stays at the root."""
    shared = {word: schema.pop(word) for word in ("$defs", "definitions") if word in schema}
    if "$ref" in json.dumps(schema) + json.dumps(shared) and not shared:
        raise SamplingError("a reference to the root, which is another one here.")
    whole = {"type": "object", "properties": {"v": schema}, "required": ["v"], "additionalProperties": False, **shared}
    source = json.dumps([{"name": "f", "parameters": whole}])
    return Grammar("calls", source), lambda value: f"call:f{{v:{call(value)}}}<tool_call|>"


def whole_float(value: Any) -> bool:
    """Whether there is a number such as 1.0, which is 1 by the standard, and is to be written so."""
    if isinstance(value, list | dict):
        return any(map(whole_float, value.values() if isinstance(value, dict) else value))
    return isinstance(value, float) and value.is_integer()


def play(file: Path, form: Callable[[Any], tuple[Grammar, Write]], counts: Counter[str]) -> list[tuple[str, str]]:
    """Tests of a file that go wrong."""
    wrong = []
    for group in json.loads(file.read_text(encoding="utf-8")):
        schema = group["schema"]
        if not isinstance(schema, dict):
            continue
        try:
            grammar, write = form(schema)
            COMPILER.check(TurnRules(calls=grammar) if grammar.kind == "calls" else grammar)
        except SamplingError:
            counts["refused"] += 1
            continue
        counts["held"] += 1
        for test in group["tests"]:
            ways = itertools.islice(orders(test["data"]), WAYS)
            taken = any(takes(grammar, write(value)) for value in ways)
            narrower = test["valid"] and (whole_float(test["data"]) or group["description"] in OLDER)
            counts["tests"] += 1
            if taken != test["valid"] and not narrower:
                wrong.append((group["description"], test["description"]))
    return wrong


@pytest.mark.parametrize("form", [as_json, as_call])
def test_what_is_held_is_held_in_full(form: Callable[[Any], tuple[Grammar, Write]]) -> None:
    counts: Counter[str] = Counter()
    assert [wrong for file in sorted(FEW.glob("*.json")) for wrong in play(file, form, counts)] == []
    assert counts["held"] > 50 and counts["tests"] > 200 and counts["refused"] > 5


@pytest.mark.slow
@pytest.mark.skipif(not ALL.exists(), reason="the suite is not here; make build/json-schema-suite")
@pytest.mark.parametrize("form", [as_json, as_call])
@pytest.mark.parametrize("draft", DRAFTS)
def test_every_draft(draft: str, form: Callable[[Any], tuple[Grammar, Write]]) -> None:
    """But for `format`, which says nothing by the standard, and of which we hold what docs/use/constrained.md names."""
    counts: Counter[str] = Counter()
    files = [file for file in sorted((ALL / draft).glob("*.json")) if file.stem != "format"]
    assert [wrong for file in files for wrong in play(file, form, counts)] == []
    print(draft, dict(counts))
    assert counts["held"] > 30 and counts["tests"] > 100


@pytest.mark.parametrize(
    ("schema", "words"),
    [({"disallow": "string"}, "use not"), ({"properties": {"a": {"divisibleBy": 2}}}, "use multipleOf"),
     ({"extends": {"type": "string"}}, "use allOf"),
     ({"$defs": {"a": {}}, "items": {"$ref": "#/$defs/a", "$id": "http://a"}}, "leave the $id out")],
)  # fmt: skip
def test_keywords_that_drafts_read_differently_are_refused(schema: Any, words: str) -> None:
    with pytest.raises(SamplingError) as refused:
        Grammar("json_schema", json.dumps(schema))
    assert words in str(refused.value)
    names = {"properties": {"extends": {"type": "string"}, "disallow": {"type": "integer"}}, "x-note": {"extends": "a"}}
    Grammar("json_schema", json.dumps(names))  # names of properties, and a remark


#: what no keyword, or hardly one, takes
ODD: list[Any] = [None, True, -1, 0.5, "x", "", [], [1], [{}], [[]], ["a", "a"], {}, {"a": 1}, {"a": []}, {"$ref": 1}]
WORDS = (
    "type", "enum", "const", "properties", "required", "additionalProperties", "items", "prefixItems", "minItems",
    "maxItems", "minLength", "maxLength", "pattern", "format", "minimum", "exclusiveMaximum", "multipleOf", "anyOf",
    "oneOf", "allOf", "$ref", "$defs", "not", "nullable", "description", "$schema", "$id", "if", "contains",
    "patternProperties", "uniqueItems", "x-guidance",
)  # fmt: skip


@pytest.mark.parametrize("word", WORDS)
def test_keywords_with_odd_values_are_held_or_refused(word: str) -> None:
    """By themselves, and beside others that look at them."""
    for value in ODD:
        tagged = {"type": "object", "properties": {"k": {word: value}}, "required": ["k"], word: value}
        for schema in ({word: value}, {"type": "string", word: value}, {"oneOf": [tagged, {"type": "object"}]},
                       {"const": 1, word: value}, {"items": {word: value}}):  # fmt: skip
            for form in (as_json, as_call):
                with contextlib.suppress(SamplingError):
                    grammar, _ = form(json.loads(json.dumps(schema)))
                    COMPILER.check(TurnRules(calls=grammar) if grammar.kind == "calls" else grammar)
