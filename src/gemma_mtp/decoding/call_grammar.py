"""A grammar of calls in Gemma 4's syntax (`chat.calls`) whose arguments a JSON schema accepts, in llguidance's Lark.

A text stands between two quotes, which are tokens of their own, so it can be any text; keys stand bare where they can.
Names of properties come in the order in which templates show them, which is that of Jinja's `dictsort`. A keyword that
constrains and can not be written so is refused by name.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gemma_mtp.chat.calls import BARE, BARE_KEY
from gemma_mtp.errors import SamplingError

#: keywords that constrain, and that a grammar of calls does not know
REFUSED = (
    "not", "if", "then", "else", "patternProperties", "dependentRequired", "dependentSchemas", "dependencies",
    "propertyNames", "contains", "minContains", "maxContains", "uniqueItems", "unevaluatedItems",
    "unevaluatedProperties", "minProperties", "maxProperties", "$dynamicRef", "$recursiveRef", "additionalItems",
)  # fmt: skip
#: texts of a `format` that is held; others are what the standard makes of all of them, a remark
FORMATS = {
    "date": r"[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])",
    "time": r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]+)?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])",
    "uuid": r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
    "ipv4": r"((25[0-5]|2[0-4][0-9]|1?[0-9]?[0-9])\.){3}(25[0-5]|2[0-4][0-9]|1?[0-9]?[0-9])",
    "email": r"[a-zA-Z0-9._%+-]+@[a-zA-Z0-9-]+(\.[a-zA-Z0-9-]+)+",
}
FORMATS["date-time"] = f"{FORMATS['date']}[Tt]{FORMATS['time']}"
TYPES = ("string", "number", "integer", "boolean", "null", "array", "object")
_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
#: what says nothing of a value
_REMARKS = {
    "title", "description", "default", "examples", "example", "$comment", "deprecated", "readOnly", "writeOnly",
    "$schema", "$id", "$defs", "definitions", "format", "nullable",
}  # fmt: skip
_COMMA = '","'
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
        except _UnsupportedError as refusal:
            raise SamplingError(
                f"the parameters of the tool {tool['name']} can not be held to their schema: {refusal}."
            ) from None
        except RecursionError:
            raise SamplingError(f"the parameters of the tool {tool['name']} are nested too deeply.") from None
    head = [f'start: "call:" call <[{end_id}]>', f"call: {' | '.join(calls)}"]
    return "\n".join([*head, *rules.lines, ""])


class _UnsupportedError(Exception):
    """What of a schema can not be held."""


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
            raise _UnsupportedError("they must be a schema's object")
        self._root, self._named = schema, {}
        resolved = self._resolved(schema)
        if "object" not in _types(resolved) or any(word in resolved for word in ("anyOf", "oneOf", "const", "enum")):
            raise _UnsupportedError("they must be of the type object")
        return self._value({**resolved, "type": "object"})

    def _rule(self, body: str, prefix: str = "r") -> str:
        self._count += 1
        return self._define(f"{prefix}{self._count}", body)

    def _define(self, name: str, body: str) -> str:
        depth = 1 + max((self._depths.get(word, 0) for word in _NAME.findall(_TEXTS.sub("", body))), default=0)
        if depth > MAX_RULES_DEEP:  # which llguidance goes down by recursion
            raise _UnsupportedError("there are too many properties or items of one value, or it is nested too deeply")
        self._depths[name] = depth
        self.lines.append(f"{name}: {body}")
        return name

    def _resolved(self, schema: Mapping[str, Any]) -> Mapping[str, Any]:
        """What a $ref at the top points at, and the one schema of an allOf."""
        seen = 0
        while seen < 64:
            seen += 1
            if "$ref" in schema:
                _alone(schema, "$ref")
                schema = self._pointed(schema["$ref"])
            elif "allOf" in schema:
                parts = schema["allOf"]
                if not isinstance(parts, list) or len(parts) != 1 or not isinstance(parts[0], dict):
                    raise _UnsupportedError("allOf of several schemas")
                _alone(schema, "allOf")
                schema = parts[0]
            else:
                return schema
        raise _UnsupportedError("$ref points at itself")

    def _pointed(self, reference: object) -> Mapping[str, Any]:
        if not isinstance(reference, str) or not reference.startswith("#"):
            raise _UnsupportedError("$ref to another document")
        node: Any = self._root
        for part in reference[1:].split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            if isinstance(node, list) and name.isdecimal() and int(name) < len(node):
                node = node[int(name)]
            elif isinstance(node, dict) and name in node:
                node = node[name]
            else:
                raise _UnsupportedError("$ref to what is not there")
        if not isinstance(node, dict):
            raise _UnsupportedError("$ref to what is no schema's object")
        return node

    def _value(self, schema: object) -> str:
        """The rule of a value that a schema accepts."""
        if schema is True or schema == {}:
            return "any"
        if not isinstance(schema, dict):
            raise _UnsupportedError("a schema that accepts nothing")
        if isinstance(reference := schema.get("$ref"), str):
            _alone(schema, "$ref")
            if reference not in self._named:
                self._count += 1
                self._named[reference] = name = f"ref{self._count}"
                body = self._value(self._pointed(reference))
                self._define(name, body)
            return self._named[reference]
        schema = self._resolved(schema)
        for word in REFUSED:
            if word in schema:
                raise _UnsupportedError(f"{word} is not offered in parameters of tools")
        for word in ("anyOf", "oneOf"):
            if word in schema:
                return self._one_of(schema, word)
        if "const" in schema or "enum" in schema:
            return self._constants(schema)
        types = _types(schema)
        if types == set(TYPES) and set(schema) <= _REMARKS:
            return "any"
        return self._rule(" | ".join(self._of_type(kind, schema) for kind in TYPES if kind in types))

    def _one_of(self, schema: Mapping[str, Any], word: str) -> str:
        _alone(schema, word)
        parts = schema[word]
        if not isinstance(parts, list) or not parts:
            raise _UnsupportedError(f"{word} must be a list of schemas")
        if word == "oneOf" and not self._disjoint(parts):
            raise _UnsupportedError("oneOf whose schemas may accept the same value; use anyOf")
        return self._rule(" | ".join(dict.fromkeys(self._value(part) for part in parts)))

    def _disjoint(self, parts: Sequence[Any]) -> bool:
        """Whether no value is accepted by two of them, as far as types and a property that tells them apart say."""
        if not all(isinstance(part, dict) for part in parts):
            return False
        return all(itertools.starmap(_apart, itertools.combinations(map(self._resolved, parts), 2)))

    def _constants(self, schema: Mapping[str, Any]) -> str:
        values = [schema["const"]] if "const" in schema else schema["enum"]
        if not isinstance(values, list) or set(schema) - _REMARKS - {"const", "enum", "type"}:
            raise _UnsupportedError("enum and const beside other keywords")
        if "const" in schema and "enum" in schema:
            values = [value for value in values if value in schema["enum"]]
        accepted = [value for value in values if _types(schema) & _types_of(value)]
        if not accepted:
            raise _UnsupportedError("a schema that accepts nothing")
        return self._rule(" | ".join(map(self._constant, accepted)))

    def _constant(self, value: Any) -> str:
        if isinstance(value, str):
            return f"q {_literal(value)} q" if value else "q q"
        if isinstance(value, list):
            return self._around("[", [self._constant(each) for each in value], "]")
        if isinstance(value, dict):
            return self._around("{", [f"{self._key(k)} {self._constant(v)}" for k, v in _sorted(value)], "}")
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
                words = {word: schema[word] for word in _NUMBERS if word in schema}
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
        least, most = _count(schema, "minLength", 0), _count(schema, "maxLength", None)
        if least or most is not None:
            parts.append(f"(?s:.{{{least},{'' if most is None else most}}})")
        if "pattern" in schema:
            parts.append(_whole(schema["pattern"]))
        if schema.get("format") in FORMATS:
            parts.append(FORMATS[schema["format"]])
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
            raise _UnsupportedError("prefixItems must be a list")
        least, most = _count(schema, "minItems", 0), _count(schema, "maxItems", None)
        length = len(first) if rest is False else math.inf
        most = min(math.inf if most is None else most, length)
        if least > most:
            raise _UnsupportedError("a list that must be longer than it may be")
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
        more, properties = schema.get("additionalProperties", True), schema.get("properties", {})
        required = schema.get("required", [])
        if not isinstance(properties, dict) or not isinstance(required, list):
            raise _UnsupportedError("properties must be an object, and required a list")
        properties = {**dict.fromkeys(required, more), **properties}
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


def _count(schema: Mapping[str, Any], word: str, default: int | None) -> Any:
    value = schema.get(word, default)
    if value is not default and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise _UnsupportedError(f"{word} must be a number of 0 or more")
    return value


def _types(schema: Mapping[str, Any]) -> set[str]:
    given = schema.get("type", list(TYPES))
    types: set[Any] = {given} if isinstance(given, str) else set(given) if isinstance(given, list) else {None}
    if not types <= set(TYPES):
        raise _UnsupportedError("type must be of JSON Schema's types")
    return types - ({"integer"} if "number" in types else set())


def _types_of(value: Any) -> set[str]:
    for kind, types in ((bool, {"boolean"}), (str, {"string"}), (int, {"integer", "number"}), (float, {"number"}),
                        (list, {"array"}), (dict, {"object"})):  # fmt: skip
        if isinstance(value, kind):
            return types
    return {"null"}


def _alone(schema: Mapping[str, Any], word: str) -> None:
    others = set(schema) - _REMARKS - {word}
    if others:
        raise _UnsupportedError(f"{word} beside {min(others)}")


def _apart(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether no value is accepted by both schemas: by their types, or by a property that both must have."""
    kinds, others = ({"number" if t == "integer" else t for t in _types(schema)} for schema in (one, other))
    if kinds.isdisjoint(others):
        return True
    names = set(one.get("required", ())) & set(other.get("required", ()))
    tags = [(_tag(one, name), _tag(other, name)) for name in names]
    return kinds & others == {"object"} and any(a is not None and b is not None and a != b for a, b in tags)


def _tag(schema: Mapping[str, Any], name: str) -> Any:
    """The one value of a property."""
    of_property = schema.get("properties", {}).get(name)
    if not isinstance(of_property, dict):
        return None
    values = [of_property["const"]] if "const" in of_property else of_property.get("enum", [])
    return values[0] if len(values) == 1 else None


def _whole(pattern: Any) -> str:
    """An expression of the whole text of one that may match anywhere in it."""
    if not isinstance(pattern, str):
        raise _UnsupportedError("pattern must be text")
    inner = pattern.removeprefix("^")
    begins, ends = inner != pattern, inner.endswith("$") and not inner.endswith("\\$")
    inner = inner[:-1] if ends else inner
    if (begins or ends) and _has_alternatives(inner):
        raise _UnsupportedError("a pattern of which some alternatives are anchored; put them between brackets")
    return f"{'' if begins else '(?s:.*)'}({inner}){'' if ends else '(?s:.*)'}"


def _has_alternatives(expression: str) -> bool:
    """Whether there is a bar outside of all brackets."""
    plain = re.sub(r"\\.|\[(?:\\.|[^\]\\])*\]", "", expression, flags=re.DOTALL)
    depth = 0
    for character in plain:
        depth += {"(": 1, ")": -1}.get(character, 0)
        if character == "|" and depth == 0:
            return True
    return False
