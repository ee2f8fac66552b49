"""How much work a JSON schema is, told from what it says before anything compiles it.

llguidance takes twice as long for each further expression that one text must match, compares all patterns for names of
one object with each other, multiplies alternatives that hold together, and takes about a tenth of a millisecond for a
value inside a constant.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from gemma_mtp.decoding.expression_cost import check_expression
from gemma_mtp.decoding.schema import References, schemas
from gemma_mtp.decoding.schema_depth import named_references
from gemma_mtp.errors import SamplingError

#: parts of all expressions, each of which counts itself, and a `format` as so many
MAX_PARTS, FORMAT_PARTS = 3000, 4
#: patterns and formats that one text must match; half as many are often too complex already
MAX_TOGETHER = 8
#: products of alternatives, where several anyOf and oneOf hold for one value
MAX_WAYS = 1000
#: pairs of `patternProperties` of one object, in all objects
MAX_PAIRS = 500
#: schemas of one `anyOf` or `oneOf`; llguidance takes 2000 items a row
MAX_ALTERNATIVES = 1000
#: values inside the lists and objects of `enum` and `const`
MAX_VALUES = 2000
#: characters of one constant: all of them are looked at for every token
MAX_CONSTANT = 20_000
#: parts of a schema that are put together to find that out
_MAX_STEPS = 50_000


def check_cost(schema: dict[str, Any], name: str) -> None:
    """Raise SamplingError where a schema would be too much work. Its depth is known to be sound."""
    parts = texts = values = pairs = 0
    for part in schemas(schema):
        _check_alternatives(part, name)
        pairs += math.comb(len(_by_name(part, "patternProperties")), 2)
        for expression in _expressions(part):
            parts += 1 + check_expression(expression, f"{name}'s pattern")
        if isinstance(part.get("format"), str):
            parts += FORMAT_PARTS
        texts += isinstance(part.get("pattern"), str) + isinstance(part.get("format"), str)
        values += sum(_inside(constant, name) for constant in _constants(part))
    if parts > MAX_PARTS:
        raise SamplingError(f"the {name}'s patterns and formats have {parts} parts, but may have {MAX_PARTS}.")
    if pairs > MAX_PAIRS:
        raise SamplingError(f"the {name} has too many patternProperties, which all must exclude each other; use fewer.")
    if values > MAX_VALUES:
        raise SamplingError(
            f"the {name} has {values} values inside the lists and objects of enum and const, but may have {MAX_VALUES}."
        )
    if texts > MAX_TOGETHER and named_references(schema):
        raise SamplingError(f"the {name} has too many patterns for references by name; use paths, such as #/$defs/a.")
    most = _Joining(schema, name).of(schema).most_patterns
    if most > MAX_TOGETHER:
        raise SamplingError(f"the {name} has {most} patterns that one text must match, but may have {MAX_TOGETHER}.")


def _check_alternatives(part: Mapping[str, Any], name: str) -> None:
    for word in ("anyOf", "oneOf"):
        if len(_listed(part, word)) > MAX_ALTERNATIVES:
            raise SamplingError(f"the {name} has an {word} of more than {MAX_ALTERNATIVES} schemas; use fewer.")


def _expressions(part: Mapping[str, Any]) -> Iterator[str]:
    if isinstance(pattern := part.get("pattern"), str):
        yield pattern
    yield from _by_name(part, "patternProperties")


def _constants(part: Mapping[str, Any]) -> Iterator[Any]:
    if "const" in part:
        yield part["const"]
    if isinstance(values := part.get("enum"), list):
        yield from values


def _inside(constant: Any, name: str) -> int:
    """How many values are inside a constant. Raises SamplingError where a text of it is too long."""
    found, left = 0, list[Any]([constant])
    while left:
        value = left.pop()
        if isinstance(value, str) and len(value) > MAX_CONSTANT:
            raise SamplingError(f"the {name} has a constant of {len(value)} characters, but may of {MAX_CONSTANT}.")
        if isinstance(value, dict | list):
            left += [*value, *value.values()] if isinstance(value, dict) else value
            found += len(value)
    return found


@dataclass(frozen=True)
class _Joined:
    """What is put together for values that stand here: how many patterns a text must match, and in how many ways the
    alternatives can be. And inside: by the name of a property, by `_OTHERS` for other properties, by `_ITEMS`."""

    patterns: int = 0
    ways: int = 1
    inside: Mapping[str, _Joined] = field(default_factory=dict)
    most_patterns: int = field(init=False)  # here and inside; found once, because parts may be in several places

    def __post_init__(self) -> None:
        inside = max((joined.most_patterns for joined in self.inside.values()), default=0)
        object.__setattr__(self, "most_patterns", max(self.patterns, inside))

    def at(self, key: str) -> _Joined:
        """What holds for a property: what is said of it, else of all others."""
        others = _PLAIN if key == _ITEMS else self.inside.get(_OTHERS, _PLAIN)
        return self.inside.get(key, others)


_OTHERS, _ITEMS = "*", "[]"
_PLAIN = _Joined()


class _Joining:
    """What one schema puts together."""

    def __init__(self, root: dict[str, Any], name: str) -> None:
        self._name = name
        self._references = References(root, _PLAIN)
        self._steps = 0

    def of(self, schema: Any) -> _Joined:
        """Raises SamplingError where there are too many ways."""
        if not isinstance(schema, dict):
            return _PLAIN
        found = self._own(schema)
        for part in _listed(schema, "allOf"):
            found = self._both(found, self.of(part))
        for word in ("anyOf", "oneOf"):
            if parts := [self.of(part) for part in _listed(schema, word)]:
                either = functools.reduce(self._either, parts)
                ways = sum(part.ways for part in parts)
                found = self._both(found, _Joined(either.patterns, ways, either.inside))
        reference = schema.get("$ref")
        return self._both(found, self._references.found(reference, self.of)) if isinstance(reference, str) else found

    def _own(self, schema: Mapping[str, Any]) -> _Joined:
        patterns = isinstance(schema.get("pattern"), str) + isinstance(schema.get("format"), str)
        others = [schema.get("additionalProperties"), *_by_name(schema, "patternProperties").values()]
        inside = {name: self.of(part) for name, part in _by_name(schema, "properties").items()}
        inside[_OTHERS] = functools.reduce(self._either, map(self.of, others))
        inside[_ITEMS] = functools.reduce(
            self._either, map(self.of, [schema.get("items"), *_listed(schema, "prefixItems")])
        )
        inside = {key: joined for key, joined in inside.items() if joined is not _PLAIN}
        return _Joined(patterns, 1, inside) if patterns or inside else _PLAIN

    def _both(self, one: _Joined, other: _Joined) -> _Joined:
        """Where two schemas hold."""
        if one is _PLAIN or other is _PLAIN:
            return other if one is _PLAIN else one
        ways = one.ways * other.ways
        if ways > MAX_WAYS and min(one.ways, other.ways) > 1:
            raise SamplingError(
                f"the {self._name} has alternatives that can be put together in more than {MAX_WAYS} ways; use fewer."
            )
        return _Joined(one.patterns + other.patterns, ways, self._inside(one, other, self._both))

    def _either(self, one: _Joined, other: _Joined) -> _Joined:
        """Where one of two schemas holds; of whichever is more."""
        if one is _PLAIN or other is _PLAIN:
            return other if one is _PLAIN else one
        patterns, ways = max(one.patterns, other.patterns), max(one.ways, other.ways)
        return _Joined(patterns, ways, self._inside(one, other, self._either))

    def _inside(
        self, one: _Joined, other: _Joined, join: Callable[[_Joined, _Joined], _Joined]
    ) -> Mapping[str, _Joined]:
        self._steps += 1
        if self._steps > _MAX_STEPS:
            raise SamplingError(f"the {self._name} puts its parts together in too many ways; say it in fewer.")
        return {key: join(one.at(key), other.at(key)) for key in {**one.inside, **other.inside}}


def _by_name(schema: Mapping[str, Any], word: str) -> Mapping[str, Any]:
    value = schema.get(word)
    return value if isinstance(value, dict) else {}


def _listed(schema: Mapping[str, Any], word: str) -> list[Any]:
    value = schema.get(word)
    return value if isinstance(value, list) else []
