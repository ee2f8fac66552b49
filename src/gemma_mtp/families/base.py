"""What a family of models is, to a loader: a table of how it differs from the skeleton that all of them share.

The skeleton is Gemma 4's decoder stack, with Gemma 4's fields of config.json and names of tensors. A family says how
its own fields become those, what its layers do otherwise, and how its stored tensors are spelled and meant.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

_NORM = re.compile(r"norm(_\d)?\.weight$")


@dataclass(frozen=True)
class LayerOptions:
    """What families of this skeleton do differently in a decoder layer. The defaults are Gemma 4's.

    `value_norm`: values are normalised. `score_scale`: attention scores are multiplied by it. `layer_scalar`: a stored
    number multiplies the layer's output. `float32_norms`: the norms' weights are float32 whatever the rest is, and
    multiply before the result is rounded.
    """

    value_norm: bool = True
    score_scale: float = 1.0
    layer_scalar: bool = True
    float32_norms: bool = False


@dataclass(frozen=True)
class Family:
    """One family's table.

    Of config.json:
    `name` is what messages call the family. `targets` and `drafters` are its top-level model_types; a target's text
    configuration stands under the key given, or is the whole file (None). `text_model_type` is what a text
    configuration is that does not say. `defaults` gives the values of fields that a text configuration of a model_type
    leaves out. `translated` returns a text configuration with the family's own fields turned into the skeleton's; it
    raises ConfigError for what can not be. `options` reads the layers' options from the untranslated text
    configuration. `ends_full` says that the last layer is a full one. `architectures` are what written files name for
    each model_type; a family without them is read only. `written` is the inverse of `translated` and `options`.

    Of tensors:
    `renames` maps parts of official names, between dots, to the family's own. A norm multiplies by its stored weight
    plus `norm_offset`.
    """

    name: str
    targets: Mapping[str, str | None]
    text_model_type: str
    defaults: Callable[[str], Mapping[str, Any]]
    drafters: tuple[str, ...] = ()
    translated: Callable[[dict[str, Any]], dict[str, Any]] = lambda raw: raw
    options: Callable[[Mapping[str, Any]], LayerOptions] = lambda raw: LayerOptions()
    ends_full: bool = True
    architectures: Mapping[str, str] = field(default_factory=dict)
    written: Callable[[dict[str, Any], LayerOptions], dict[str, Any]] = lambda raw, options: raw
    renames: Mapping[str, str] = field(default_factory=dict)
    norm_offset: float = 0.0

    def stored_name(self, official: str) -> str:
        """Returns the family's own spelling of an official tensor name."""
        return ".".join(self.renames.get(part, part) for part in official.split("."))

    def added(self, official: str) -> float:
        """Returns what is added to a stored tensor as it is loaded: 0 for all but norms."""
        return self.norm_offset if _NORM.search(official) else 0.0
