"""Reading one field of a JSON object, with its kind checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gemma_mtp.errors import ConfigError

REQUIRED = object()
#: no size is larger, and PyTorch takes no larger ones
LARGEST = 2**31 - 1


def field_value(raw: Mapping[str, Any], name: str, kind: type, default: Any = REQUIRED) -> Any:
    """Field `name` of `raw`, checked to be of `kind`; a missing or null field takes the default. Raises ConfigError."""
    value = raw.get(name)
    if value is None:
        if default is REQUIRED:
            raise ConfigError(f"config.json has no {name!r}; it is needed to build the model.")
        return default
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**1000 else math.inf
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"config.json has {name} = {repr(value)[:80]}, but a {kind.__name__} was expected.")
    if type(value) is int and abs(value) > LARGEST:
        raise ConfigError(
            f"config.json has {name} = {str(value)[:80]}, but a number of {LARGEST} at most was expected."
        )
    return value
