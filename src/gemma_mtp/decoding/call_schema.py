"""Schemas of tools' parameters as a grammar of calls reads them: types, counts, references, patterns. What can not be
held is refused by name."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from gemma_mtp.decoding.schema import pointed_at

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
#: objects of one oneOf that are compared each with each other
MAX_PAIRED = 200
#: followed one after the other
MAX_REFERENCES = 64
TYPES = ("string", "number", "integer", "boolean", "null", "array", "object")
NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
#: what says nothing of a value
REMARKS = {
    "title", "description", "default", "examples", "example", "$comment", "deprecated", "readOnly", "writeOnly",
    "$schema", "$id", "$defs", "definitions", "format", "nullable",
}  # fmt: skip


class UnsupportedError(Exception):
    """What of a schema can not be held."""


def resolved(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns what a $ref at the top points at, and the one schema of an allOf; `root` is where references begin."""
    for _ in range(MAX_REFERENCES):
        if "$ref" in schema:
            alone(schema, "$ref")
            schema = pointed(schema["$ref"], root)
        elif "allOf" in schema:
            parts = schema["allOf"]
            if not isinstance(parts, list) or len(parts) != 1 or not isinstance(parts[0], dict):
                raise UnsupportedError("allOf of several schemas")
            alone(schema, "allOf")
            schema = parts[0]
        else:
            return schema
    raise UnsupportedError("$ref points at itself")


def pointed(reference: object, root: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the schema that a path such as #/$defs/a leads to."""
    if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
        raise UnsupportedError("$ref that is no path in the schema, such as #/$defs/a")
    node = pointed_at(root, reference)
    if node is None:
        raise UnsupportedError("$ref to what is not there")
    if not isinstance(node, dict):
        raise UnsupportedError("$ref to what is no schema's object")
    return node


def properties_in(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Properties and their schemas."""
    found = schema.get("properties", {})
    if not isinstance(found, dict):
        raise UnsupportedError("properties must be an object")
    return found


def required_in(schema: Mapping[str, Any]) -> list[str]:
    """Names of properties that must be there."""
    found = schema.get("required", [])
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise UnsupportedError("required must be a list of names")
    return found


def count_of(schema: Mapping[str, Any], word: str, default: int | None) -> Any:
    value = schema.get(word, default)
    if value is not default and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise UnsupportedError(f"{word} must be a number of 0 or more")
    return value


def types_in(schema: Mapping[str, Any]) -> set[str]:
    """Types that a schema lets a value have."""
    given = schema.get("type", list(TYPES))
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, list) or not all(name in TYPES for name in names):
        raise UnsupportedError("type must be of JSON Schema's types")
    return set(names) - ({"integer"} if "number" in names else set())


def types_of(value: Any) -> set[str]:
    """Types of JSON Schema that a value is of."""
    for kind, names in ((bool, {"boolean"}), (str, {"string"}), (int, {"integer", "number"}), (float, {"number"}),
                        (list, {"array"}), (dict, {"object"})):  # fmt: skip
        if isinstance(value, kind):
            return names
    return {"null"}


def alone(schema: Mapping[str, Any], word: str) -> None:
    """Raise UnsupportedError where other keywords constrain beside this one."""
    others = set(schema) - REMARKS - {word}
    if others:
        raise UnsupportedError(f"{word} beside {min(others)}")


def all_apart(schemas: Sequence[Mapping[str, Any]]) -> bool:
    """Whether no value is accepted by two of the schemas: by their types, or by a property that both must have."""
    kinds = [{"number" if kind == "integer" else kind for kind in types_in(schema)} for schema in schemas]
    objects = [i for i, found in enumerate(kinds) if "object" in found]
    others = Counter(kind for found in kinds for kind in found if kind != "object")
    if max(others.values(), default=0) > 1:
        return False
    tags = [_tags(schemas[i]) for i in objects]
    shared = set(tags[0]).intersection(*tags[1:]) if tags else set()
    if any(len({tag[name] for tag in tags}) == len(tags) for name in shared):
        return True  # one property tells all of them apart
    if len(tags) > MAX_PAIRED:
        raise UnsupportedError(f"oneOf of more than {MAX_PAIRED} objects that no one property tells apart")
    return all(
        any(one[name] != other[name] for name in set(one) & set(other))
        for one, other in itertools.combinations(tags, 2)
    )  # fmt: skip


def _tags(schema: Mapping[str, Any]) -> dict[str, str]:
    """Properties that must be there and have one value, which is no list or object; the value as JSON."""
    tags = {}
    for name in required_in(schema):
        of_property = properties_in(schema).get(name)
        given = of_property if isinstance(of_property, dict) else {}
        values = [given["const"]] if "const" in given else given.get("enum")
        if isinstance(values, list) and len(values) == 1 and not isinstance(values[0], list | dict):
            value = values[0]  # 1.0 is 1, but true is not
            tags[name] = json.dumps(int(value) if isinstance(value, float) and value.is_integer() else value)
    return tags


def whole_text(pattern: Any) -> str:
    """An expression of the whole text of one that may match anywhere in it."""
    if not isinstance(pattern, str):
        raise UnsupportedError("pattern must be text")
    inner = pattern.removeprefix("^")
    begins, ends = inner != pattern, inner.endswith("$") and not inner.endswith("\\$")
    inner = inner[:-1] if ends else inner
    if (begins or ends) and _has_alternatives(inner):
        raise UnsupportedError("a pattern of which some alternatives are anchored; put them between brackets")
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
