"""Reading one field of a JSON object, with its kind checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gemma_mtp.errors import ConfigError
from gemma_mtp.json_files import shown

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
        raise ConfigError(f"config.json has {name} = {shown(value)}, but a {kind.__name__} was expected.")
    if type(value) is int and abs(value) > LARGEST:
        raise ConfigError(f"config.json has {name} = {shown(value)}, but a number of {LARGEST} at most was expected.")
    return value


def is_token_id(value: Any) -> bool:
    """Whether it is a whole number that may name a token, of a vocabulary that need not have it."""
    return type(value) is int and abs(value) <= LARGEST


def check_range(name: str, value: float, least: float, most: float) -> None:
    """Raise ConfigError where a number is not from `least` to `most`."""
    if not least <= value <= most:
        raise ConfigError(f"config.json has {name} = {value}, but a number from {least:g} to {most:g} was expected.")
