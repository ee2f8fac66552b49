"""A grammar of calls in Gemma 4's syntax (`chat.calls`) whose arguments a JSON schema accepts, in llguidance's Lark.

A text stands between two quotes, which are tokens of their own, so it can be any text; keys stand bare where they can.
Names of properties come in the order in which templates show them, which is that of Jinja's `dictsort`. A keyword that
constrains and can not be written so is refused by name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gemma_mtp.chat.calls import BARE, BARE_KEY
from gemma_mtp.decoding.call_schema import (
    FORMATS,
    NUMBERS,
    REFUSED,
    REMARKS,
    TYPES,
    UnsupportedError,
    all_apart,
    alone,
    count_of,
    pointed,
    properties_in,
    required_in,
    resolved,
    types_in,
    types_of,
    whole_text,
)
from gemma_mtp.errors import SamplingError

_COMMA = '","'
#: of all tools; a property has three, or more by its schema
MAX_RULES = 7500
#: rules that refer to each other: of properties one after the other, too
MAX_RULES_DEEP = 1000
_NAME, _TEXTS = re.compile(r"\b(?:r|ref)[0-9]+\b"), re.compile(r'"(?:\\.|[^"\\])*"')


def call_lark(tools: Sequence[Mapping[str, Any]], quote_id: int, end_id: int) -> str:
    """Returns a Lark grammar of what follows a call's first mark, its last one included.

    tools     objects with a `name`, and `parameters`: a JSON schema, or None for any arguments
    quote_id  the token around texts, and `end_id` that of a call's end
    Raises SamplingError for a schema that can not be held.
    """
    rules = _Rules(quote_id)
    calls = []
    for tool in tools:
        try:
            calls.append(f"{_literal(tool['name'])} {rules.arguments(tool['parameters'])}")
        except UnsupportedError as refusal:
            raise SamplingError(
                f"the parameters of the tool {tool['name']} can not be held to their schema: {refusal}."
            ) from None
        except RecursionError:
            raise SamplingError(f"the parameters of the tool {tool['name']} are nested too deeply.") from None
    head = [f'start: "call:" call <[{end_id}]>', f"call: {' | '.join(calls)}"]
    return "\n".join([*head, *rules.lines, ""])


class _Rules:
    """The grammar's rules as they are made; a schema's rule is named by its number."""

    def __init__(self, quote_id: int) -> None:
        self.lines: list[str] = [
            f"q: <[{quote_id}]>", "string: q TEXT? q", "TEXT: /(?s:.+)/", 'key: KEY ":"', f"KEY: /{BARE}/",
            'number: %json {"type": "number"}', 'constant: "true" | "false" | "null"',
            "any: string | number | constant | object | array", 'object: "{" (pair ("," pair)*)? "}"',
            "pair: key any", 'array: "[" (any ("," any)*)? "]"',
        ]  # fmt: skip
        self._count = 0
        self._depths: dict[str, int] = {}  # of rules that refer to others
        self._named: dict[str, str] = {}  # rules of what a $ref points at
        self._root: Mapping[str, Any] = {}

    def arguments(self, schema: object) -> str:
        """The rule of a tool's arguments, which are an object."""
        if schema is None:
            return "object"
        if not isinstance(schema, dict):
            raise UnsupportedError("they must be a schema's object")
        self._root, self._named = schema, {}
        found = resolved(schema, self._root)
        if "object" not in types_in(found) or any(word in found for word in ("anyOf", "oneOf", "const", "enum")):
            raise UnsupportedError("they must be of the type object")
        return self._value({**found, "type": "object"})

    def _rule(self, body: str, prefix: str = "r") -> str:
        self._count += 1
        return self._define(f"{prefix}{self._count}", body)

    def _define(self, name: str, body: str) -> str:
        depth = 1 + max((self._depths.get(word, 0) for word in _NAME.findall(_TEXTS.sub("", body))), default=0)
        if depth > MAX_RULES_DEEP:  # which llguidance goes down by recursion
            raise UnsupportedError("there are too many properties or items of one value, or it is nested too deeply")
        if len(self.lines) > MAX_RULES:
            raise SamplingError("the tools have more properties and values in all than can be held to; use fewer.")
        self._depths[name] = depth
        self.lines.append(f"{name}: {body}")
        return name

    def _value(self, schema: object) -> str:
        """The rule of a value that a schema accepts."""
        if schema is True or schema == {}:
            return "any"
        if not isinstance(schema, dict):
            raise UnsupportedError("a schema that accepts nothing")
        if isinstance(reference := schema.get("$ref"), str):
            alone(schema, "$ref")
            if reference not in self._named:
                self._count += 1
                self._named[reference] = name = f"ref{self._count}"
                body = self._value(pointed(reference, self._root))
                self._define(name, body)
            return self._named[reference]
        schema = resolved(schema, self._root)
        for word in REFUSED:
            if word in schema:
                raise UnsupportedError(f"{word} is not offered in parameters of tools")
        for word in ("anyOf", "oneOf"):
            if word in schema:
                return self._one_of(schema, word)
        if "const" in schema or "enum" in schema:
            return self._constants(schema)
        types = types_in(schema)
        if types == set(TYPES) and set(schema) <= REMARKS:
            return "any"
        return self._rule(" | ".join(self._of_type(kind, schema) for kind in TYPES if kind in types))

    def _one_of(self, schema: Mapping[str, Any], word: str) -> str:
        alone(schema, word)
        parts = schema[word]
        if not isinstance(parts, list) or not parts:
            raise UnsupportedError(f"{word} must be a list of schemas")
        if word == "oneOf" and not self._disjoint(parts):
            raise UnsupportedError("oneOf whose schemas may accept the same value; use anyOf")
        return self._rule(" | ".join(dict.fromkeys(self._value(part) for part in parts)))

    def _disjoint(self, parts: Sequence[Any]) -> bool:
        """Whether no value is accepted by two of them, as far as types and a property that tells them apart say."""
        if not all(isinstance(part, dict) for part in parts):
            return False
        return all_apart([resolved(part, self._root) for part in parts])

    def _constants(self, schema: Mapping[str, Any]) -> str:
        values = [schema["const"]] if "const" in schema else schema["enum"]
        if not isinstance(values, list) or set(schema) - REMARKS - {"const", "enum", "type"}:
            raise UnsupportedError("enum and const beside other keywords")
        if "const" in schema and "enum" in schema:
            values = [value for value in values if isinstance(schema["enum"], list) and value in schema["enum"]]
        accepted = [value for value in values if types_in(schema) & types_of(value)]
        if not accepted:
            raise UnsupportedError("a schema that accepts nothing")
        texts = [_literal(value) for value in accepted if isinstance(value, str) and value]
        words = [self._constant(value) for value in accepted if not isinstance(value, str | list | dict)]
        found = [self._constant(value) for value in accepted if isinstance(value, list | dict) or value == ""]
        if texts:
            found.append(f"q {self._any_of(texts)} q")
        if words:
            found.append(self._any_of(words))
        return self._rule(" | ".join(found))

    def _any_of(self, literals: Iterable[str]) -> str:
        """One automaton of all of them: rules would be items of a row each, and work in each of its tokens."""
        return self._rule(" | ".join(dict.fromkeys(literals)), "TEXT")

    def _constant(self, value: Any) -> str:
        if isinstance(value, str):
            return f"q {_literal(value)} q" if value else "q q"
        if isinstance(value, list):
            return self._around("[", [self._constant(each) for each in value], "]")
        if isinstance(value, dict):
            return self._around("{", [f"{self._key(k)} {self._constant(v)}" for k, v in _sorted(value)], "}")
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # which 2.0 is by the standard, and what models write
        return _literal(json.dumps(value))

    def _around(self, first: str, parts: Sequence[str], last: str) -> str:
        return " ".join([_literal(first), ' "," '.join(parts), _literal(last)])

    def _key(self, name: str) -> str:
        return _literal(f"{name}:") if BARE_KEY.fullmatch(name) else f"q {_literal(name) if name else ''} q " + '":"'

    def _of_type(self, kind: str, schema: Mapping[str, Any]) -> str:
        match kind:
            case "string":
                return self._string(schema)
            case "number" | "integer":
                words = {word: schema[word] for word in NUMBERS if word in schema}
                return "number" if kind == "number" and not words else self._rule(
                    f"%json {json.dumps({'type': kind, **words})}"
                )  # fmt: skip
            case "boolean":
                return '"true" | "false"'
            case "null":
                return '"null"'
            case "array":
                return self._array(schema)
        return self._object(schema)

    def _string(self, schema: Mapping[str, Any]) -> str:
        parts = []
        least, most = count_of(schema, "minLength", 0), count_of(schema, "maxLength", None)
        if least or most is not None:
            parts.append(f"(?s:.{{{least},{'' if most is None else most}}})")
        if "pattern" in schema:
            parts.append(whole_text(schema["pattern"]))
        if (form := schema.get("format")) and isinstance(form, str) and form in FORMATS:
            parts.append(FORMATS[form])
        if not parts:
            return "string"
        if most == 0:
            return "q q"
        text = self._rule(" & ".join(f"/{_slashed(part)}/" for part in parts), "TEXT")
        return f"q {text} q"

    def _array(self, schema: Mapping[str, Any]) -> str:
        first, rest = schema.get("prefixItems", []), schema.get("items", True)
        if isinstance(rest, list):  # of drafts before 2020-12
            first, rest = rest, True
        if not isinstance(first, list):
            raise UnsupportedError("prefixItems must be a list")
        least, most = count_of(schema, "minItems", 0), count_of(schema, "maxItems", None)
        length = len(first) if rest is False else math.inf
        most = min(math.inf if most is None else most, length)
        if least > most:
            raise UnsupportedError("a list that must be longer than it may be")
        first = first[: int(min(most, len(first)))]
        tail = self._repeated(rest, max(0, least - len(first)), most - len(first), bool(first))
        for i in reversed(range(len(first))):  # from the last of the first ones on
            body = f"{_COMMA if i else ''} {self._value(first[i])} {tail}"
            tail = self._rule(f"({body})?" if least <= i else body)
        return f'"[" {tail} "]"'

    def _repeated(self, schema: Any, least: int, most: float, follows: bool) -> str:
        """More items, after others or not."""
        if most == 0:
            return ""
        item = self._value(schema)
        if follows:
            return f'("," {item}){_times(least, most)}'
        body = f'{item} ("," {item}){_times(max(0, least - 1), most - 1)}'
        return f"({body})?" if least == 0 else body

    def _object(self, schema: Mapping[str, Any]) -> str:
        more, required = schema.get("additionalProperties", True), required_in(schema)
        properties = {**dict.fromkeys(required, more), **properties_in(schema)}
        names = [name for name, _ in _sorted(properties)]
        if more is False:
            ends = ['""', '""']
        else:
            pair = f"{self._other_key(names)} {self._value(more)}"
            ends = [f'({pair} ("," {pair})*)?', f'("," {pair})*']
        first, later = self._rule(ends[0]), self._rule(ends[1])
        for name in reversed(names):  # what may come from this property on: as the first one, or after others
            if properties[name] is False and name not in required:
                continue
            pair = self._rule(f"{self._key(name)} {self._value(properties[name])}")
            skipped = ("", "") if name in required else (f" | {first}", f" | {later}")
            first, later = self._rule(f"{pair} {later}{skipped[0]}"), self._rule(f'"," {pair} {later}{skipped[1]}')
        return f'"{{" {first} "}}"'

    def _other_key(self, names: Iterable[str]) -> str:
        known = [re.escape(name) for name in names if BARE_KEY.fullmatch(name)]
        if not known:
            return "key"
        name = self._rule(f"/{BARE}/ & ~/({_slashed('|'.join(known))})/", "KEY")
        return f'{name} ":"'


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _slashed(expression: str) -> str:
    """An expression as it stands between two slashes."""
    return re.sub(r"(?<!\\)((?:\\\\)*)/", r"\1\\/", expression).replace("\n", r"\n")


def _times(least: int, most: float) -> str:
    return "*" if (least, most) == (0, math.inf) else f"{{{least},{'' if most == math.inf else int(most)}}}"


def _sorted(properties: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """As Jinja's `dictsort` has it."""
    return sorted(properties.items(), key=lambda item: item[0].lower())
