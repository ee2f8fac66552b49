"""The rotary embedding of each layer type, as config.json says it (transformers 5.22.2, modeling_rope_utils.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from gemma_mtp.config.values import check_range, field_value
from gemma_mtp.errors import ConfigError
from gemma_mtp.json_files import shown

RopeType = Literal["default", "linear", "proportional"]
ROPE_TYPES: tuple[RopeType, ...] = get_args(RopeType)
#: the fields of an entry that each type applies; transformers ignores all others
ROPE_FIELDS: dict[str, frozenset[str]] = {
    "default": frozenset({"rope_type", "type", "rope_theta"}),
    "linear": frozenset({"rope_type", "type", "rope_theta", "factor", "partial_rotary_factor"}),
    "proportional": frozenset({"rope_type", "type", "rope_theta", "factor", "partial_rotary_factor"}),
}


#: of these, float32 holds the angles of all positions
THETAS, FACTORS = (1.0, 1e30), (1e-3, 1e30)


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of one layer type. All frequencies are divided by `factor`.

    `proportional` rotates `partial_rotary_factor` of the head dimensions, with exponents divided by the whole head_dim;
    the other types rotate all of them. `default` has factor 1.
    """

    rope_theta: float
    rope_type: RopeType = "default"
    partial_rotary_factor: float = 1.0
    factor: float = 1.0


#: what Gemma 4 has where config.json does not say
DEFAULT_ROPES = {
    "sliding_attention": RopeConfig(1e4),
    "full_attention": RopeConfig(1e6, "proportional", 0.25),
}


def parse_ropes(raw: Mapping[str, Any], used: Sequence[str]) -> dict[str, RopeConfig]:
    """The rotary embedding of both layer types. The types in `used` need an entry where there are any.

    Raises ConfigError naming the field where transformers would fail, or where one field contradicts another.
    """
    name, given = _given(raw)
    if given is None:
        return dict(DEFAULT_ROPES)
    if not isinstance(given, dict):
        raise ConfigError(f"config.json has {name} = {shown(given)}, but an object was expected.")
    ropes = {kind: _parse_entry(given[kind], kind, name, raw) for kind in DEFAULT_ROPES if given.get(kind) is not None}
    missing = [kind for kind in DEFAULT_ROPES if kind in used and kind not in ropes]
    if missing:
        raise ConfigError(
            f"config.json has {name} without an object for {missing[0]}; one is needed for each type of layer:"
            f" {', '.join(DEFAULT_ROPES)}."
        )
    return {**DEFAULT_ROPES, **ropes}


def rope_to_hf(rope: RopeConfig) -> dict[str, Any]:
    """The entry of `rope_parameters`. Inverse of `parse_ropes`."""
    raw: dict[str, Any] = {"rope_type": rope.rope_type, "rope_theta": rope.rope_theta}
    if rope.rope_type == "proportional":
        raw["partial_rotary_factor"] = rope.partial_rotary_factor
    if rope.rope_type == "linear" or rope.factor != 1:
        raw["factor"] = rope.factor
    return raw


def rope_type(entry: Mapping[str, Any]) -> Any:
    """The type that an entry names, `type` being the older name of the field."""
    named = (entry.get(field) for field in ("rope_type", "type"))
    return next((kind for kind in named if kind is not None), "default")


def _given(raw: Mapping[str, Any]) -> tuple[str, Any]:
    """The field that holds the entries, and its value: transformers lets `rope_scaling` replace `rope_parameters`."""
    scaling, parameters = raw.get("rope_scaling"), raw.get("rope_parameters")
    if scaling is None:
        return "rope_parameters", parameters
    if parameters is not None and parameters != scaling:
        raise ConfigError(
            "config.json has rope_scaling and rope_parameters that differ; keep the one that the model was trained"
            " with, as rope_parameters."
        )
    return "rope_scaling", scaling


def _parse_entry(entry: Any, kind: str, name: str, raw: Mapping[str, Any]) -> RopeConfig:
    if not isinstance(entry, dict):
        raise ConfigError(f"config.json has {name} entry {shown(entry)} for {kind}, but an object was expected.")
    if None not in (entry.get("rope_type"), entry.get("type")) and entry["rope_type"] != entry["type"]:
        raise ConfigError(
            f"config.json has {name} for {kind} with rope_type {shown(entry['rope_type'])} and type"
            f" {shown(entry['type'])}; keep one of them."
        )
    chosen = rope_type(entry)
    if chosen not in ROPE_TYPES:
        raise ConfigError(
            f"config.json has rope_type {shown(chosen)} for {kind}, which can not be decoded with; supported are"
            f" {', '.join(ROPE_TYPES)}."
        )
    for field in ("rope_theta", "partial_rotary_factor"):
        if field in ROPE_FIELDS[chosen] and entry.get(field) is None and raw.get(field) is not None:
            raise ConfigError(
                f"config.json has {field} = {shown(raw[field])} beside {name}, whose entry for {kind} has none; move it"
                " into the entry."
            )
    theta = field_value(entry, "rope_theta", float)
    check_range("rope_theta", theta, *THETAS)
    if chosen == "default":
        return RopeConfig(theta)
    factor = field_value(entry, "factor", float, *([] if chosen == "linear" else [1.0]))
    check_range("factor", factor, *FACTORS)
    share = field_value(entry, "partial_rotary_factor", float, 1.0)
    if not 0 < share <= 1:
        raise ConfigError(f"config.json has partial_rotary_factor = {share}, but it must lie above 0 and at most 1.")
    if chosen == "linear" and share != 1:
        raise ConfigError(
            f"config.json has partial_rotary_factor = {share} with rope_type 'linear' for {kind}, which can not be"
            " decoded with; rope_type 'proportional' rotates a part of the dimensions."
        )
    return RopeConfig(theta, chosen, share, factor)
