"""How deep a JSON schema nests, its references followed. llguidance goes down by recursion and does not look at the end
of its stack, so that a schema that is too deep would end the process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gemma_mtp.decoding.schema import References
from gemma_mtp.errors import SamplingError

#: objects and lists inside each other; a tenth of what ends a process with a stack of 8 MB
MAX_DEPTH = 300
#: of one object: what more of them cost to compile is seconds
MAX_PROPERTIES = 1000


def check_depth(schema: dict[str, Any], name: str) -> None:
    """Raise SamplingError where a schema nests too deep, or an object has too many properties.

    Where a reference is no path from the root (`$anchor`, `$id`), all that there is counts as one way down.
    """
    if named_references(schema) and sum(1 for _ in _containers(schema)) > MAX_DEPTH:
        raise SamplingError(f"the {name} is too large for references by name; use paths, such as #/$defs/a.")
    if _Heights(schema, name).of(schema, 0) > MAX_DEPTH:
        raise _too_deep(name)


class _Heights:
    """Heights of the parts of one schema."""

    def __init__(self, root: dict[str, Any], name: str) -> None:
        self._name = name
        self._references = References(root, 0)  # those into themselves are not gone down twice

    def of(self, node: Any, level: int) -> int:
        """How many containers are inside each other from this one on. `level`: how many are around it."""
        if level > MAX_DEPTH:
            raise _too_deep(self._name)
        if isinstance(node, list):
            return 1 + max((self.of(child, level + 1) for child in node if isinstance(child, dict | list)), default=0)
        if not isinstance(node, dict):
            return 0
        properties = node.get("properties")
        if isinstance(properties, dict) and len(properties) > MAX_PROPERTIES:
            raise SamplingError(
                f"the {self._name} has {len(properties)} properties of one object, but may have {MAX_PROPERTIES}."
            )
        inner = max((self.of(child, level + 1) for child in node.values() if isinstance(child, dict | list)), default=0)
        reference = node.get("$ref")
        if not isinstance(reference, str):
            return 1 + inner
        return 1 + max(inner, self._references.found(reference, lambda part: self.of(part, level + 1)))


def _containers(node: Any) -> Iterator[Any]:
    left = [node]
    while left:
        each = left.pop()
        if isinstance(each, dict | list):
            yield each
            left += each.values() if isinstance(each, dict) else each


def named_references(schema: dict[str, Any]) -> bool:
    """Whether a reference is no path from the root, or may be none."""
    references = (node.get("$ref") for node in _containers(schema) if isinstance(node, dict))
    inner = any("$id" in node for node in _containers(schema) if isinstance(node, dict) and node is not schema)
    return inner or any(isinstance(each, str) and each != "#" and not each.startswith("#/") for each in references)


def _too_deep(name: str) -> SamplingError:
    return SamplingError(f"the {name} is nested too deeply, references followed; flatten it.")
