"""What a JSON schema says (draft 2020-12 and those before it): which parts are schemas, and which keywords constrain.

The standard makes some keywords annotations: they say something about a value, and allow every value. llguidance
refuses some of these, as it should refuse a constraint that it can not keep. So they are taken out before it sees
them: a `format` whose texts it does not know, and keywords that constrain nothing as they stand, alone or by their
value, such as `then` without `if` or `uniqueItems: false`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import Any, Generic, TypeVar
from urllib.parse import unquote

from gemma_mtp.errors import SamplingError

Found = TypeVar("Found")

#: keywords whose values are data, not schemas
_DATA = {"const", "enum", "default", "examples", "example"}
#: keywords whose values give a schema to each of several names
_BY_NAME = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies"}
#: what keywords mean is said there; another place may say anything
_META = re.compile(r"https?://json-schema\.org/")
#: keywords of the standard's first drafts: types of their values, and what says the same now. llguidance does not know
#: them, and what it does not know it takes for a remark
_OLD: dict[str, tuple[tuple[type, ...], str]] = {
    "disallow": ((str, list), "not"), "divisibleBy": ((int, float), "multipleOf"), "extends": ((dict, list), "allOf"),
}  # fmt: skip
#: longer names are no known format
_LONGEST_FORMAT = 100


def schemas(node: Any, of_names: bool = False) -> Iterator[dict[str, Any]]:
    """Every object of a JSON schema that is a schema: itself and those inside, not data such as the values of `enum`.

    A property may have the name of a keyword. `of_names`: the node's keys are such names. What is in a keyword that is
    not known counts as a schema, because a `$ref` may point there.
    """
    if isinstance(node, list):
        for item in node:
            yield from schemas(item)
    elif isinstance(node, dict):
        if not of_names:
            yield node
        for key, value in node.items():
            if of_names or key not in _DATA:
                yield from schemas(value, not of_names and key in _BY_NAME)


def pointed_at(root: Any, reference: str) -> Any:
    """What a path such as #/$defs/a leads to; None where nothing is."""
    node = root
    for part in unquote(reference).removeprefix("#").split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(node, list):
            node = node[int(key)] if key.isdecimal() and int(key) < len(node) else None
        else:
            node = node.get(key) if isinstance(node, dict) else None
    return node


class References(Generic[Found]):
    """What is found of the parts that a schema's references point at. Each part is looked at once; `before` stands for
    it until it is known, where it refers to itself."""

    def __init__(self, root: Any, before: Found) -> None:
        self._root, self._before = root, before
        self._known: dict[str, Found] = {}

    def found(self, reference: str, look: Callable[[Any], Found]) -> Found:
        if reference not in self._known:
            self._known[reference] = self._before
            self._known[reference] = look(pointed_at(self._root, reference))
        return self._known[reference]


def check_drafts(schema: dict[str, Any], name: str) -> None:
    """Raise SamplingError where a schema says what drafts of the standard read differently, or have no more."""
    for part in schemas(schema):
        if isinstance(meta := part.get("$schema"), str) and not _META.match(meta):
            raise SamplingError(f"the {name} has a $schema that is none of the standard's own; leave it out.")
        for word, (types, instead) in _OLD.items():
            if isinstance(part.get(word), types):
                raise SamplingError(f"the {name} has {word}, which is of an early draft of JSON Schema; use {instead}.")
        if isinstance(part.get("$ref"), str) and any(isinstance(part.get(word), str) for word in ("$id", "id")):
            raise SamplingError(f"the {name} has $ref beside $id, which drafts read differently; leave the $id out.")


def without_annotations(schema: dict[str, Any], is_known_format: Callable[[str], bool]) -> dict[str, Any]:
    """The schema, changed in place, without keywords that allow every value and that llguidance would refuse."""
    for part in list(schemas(schema)):
        for keyword in [keyword for keyword in part if _allows_all(keyword, part, is_known_format)]:
            del part[keyword]
    return schema


def _allows_all(keyword: str, schema: Mapping[str, Any], is_known_format: Callable[[str], bool]) -> bool:
    """Whether a keyword of the schema constrains nothing. Those that llguidance takes are left to it."""
    value = schema[keyword]
    match keyword:
        case "format":
            return isinstance(value, str) and (len(value) > _LONGEST_FORMAT or not is_known_format(value))
        case "if":
            return "then" not in schema and "else" not in schema
        case "then" | "else":
            return "if" not in schema
        case "contains" | "minContains" | "maxContains":
            return "contains" not in schema or (schema.get("minContains") == 0 and "maxContains" not in schema)
        case "$dynamicAnchor" | "$recursiveAnchor":  # names that only $dynamicRef and $recursiveRef look up
            return True
        case "uniqueItems" | "not":
            return value is False
        case "propertyNames" | "unevaluatedItems" | "unevaluatedProperties":
            return value is True or value == {}
        case "dependentRequired" | "dependentSchemas" | "dependencies":
            return value == {}
    return False


def largest_multiple(schema: dict[str, Any]) -> int:
    """The least common multiple of every `multipleOf`, without factors of ten: how many remainders the digits of a
    number can leave."""
    return math.lcm(*(_remainders(multiple) for part in schemas(schema) for multiple in _multiples(part)))


def _multiples(schema: Mapping[str, Any]) -> Iterator[Fraction]:
    value = schema.get("multipleOf")
    if (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, float) and math.isfinite(value)):
        yield Fraction(repr(value))


def _remainders(multiple: Fraction) -> int:
    """The part of a number that is prime to ten: how many remainders of it the digits read so far can leave."""
    number = abs(multiple.numerator)
    for factor in (2, 5):
        while number and number % factor == 0:
            number //= factor
    return number or 1
