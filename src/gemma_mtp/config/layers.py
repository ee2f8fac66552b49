"""What config.json says of single layers: their types, and how full-attention layers differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gemma_mtp.config.text import FULL, LAYER_TYPES, SLIDING, LayerType
from gemma_mtp.config.values import field_value
from gemma_mtp.errors import ConfigError
from gemma_mtp.families.base import Family
from gemma_mtp.json_files import shown

#: far more than any model has: each layer is built before its tensors are looked for
MAX_LAYERS = 1024


def parse_layer_types(raw: Mapping[str, Any], layers: int, family: Family) -> tuple[LayerType, ...]:
    """Returns the type of each layer. Raises ConfigError where those given do not fit."""
    if not 0 < layers <= MAX_LAYERS:
        raise ConfigError(f"config.json has num_hidden_layers = {layers}, but 1 to {MAX_LAYERS} were expected.")
    given = raw.get("layer_types")
    if given is None:  # every sixth layer is full, and Gemma 4's last always (Gemma4TextConfig.__post_init__)
        last = layers - 1 if family.ends_full else layers
        return tuple(FULL if (i + 1) % 6 == 0 or i == last else SLIDING for i in range(layers))
    if not isinstance(given, list) or len(given) != layers or any(kind not in LAYER_TYPES for kind in given):
        raise ConfigError(
            f"config.json has layer_types that do not fit num_hidden_layers {layers}: expected one of"
            f" {LAYER_TYPES} for each layer."
        )
    check_last_layer(given, family)
    return tuple(given)


def check_last_layer(layer_types: Sequence[LayerType], family: Family) -> None:
    """Raise ConfigError where transformers makes a full layer of the last one, whatever its weights are."""
    if family.ends_full and layer_types[-1] != FULL:
        raise ConfigError(
            f"config.json has layer_types that end in {layer_types[-1]!r}, but the last layer of {family.name} is"
            f" {FULL!r}."
        )


#: what per_layer_config can say of full-attention layers
PER_LAYER_FIELDS = ("head_dim", "num_key_value_heads")


def full_layer_sizes(
    raw: Mapping[str, Any], layer_types: Sequence[LayerType], head_dim: int, kv_heads: int, k_eq_v: bool, default: int
) -> tuple[int, int]:
    """Returns head_dim and num_key_value_heads of full layers. `default` is global_head_dim where no field says it.

    transformers >= 5.20 stores what differs in full layers in per_layer_config; the hub's files name it directly.
    Raises ConfigError where the two differ.
    """
    overrides = _full_layer_overrides(raw, layer_types)
    if overrides is None:
        # Gemma4TextConfig applies num_global_key_value_heads only where keys are values
        global_kv = field_value(raw, "num_global_key_value_heads", int, kv_heads) if k_eq_v else kv_heads
        return field_value(raw, "global_head_dim", int, default), global_kv
    global_head_dim = field_value(overrides, "head_dim", int, head_dim)
    global_kv = field_value(overrides, "num_key_value_heads", int, kv_heads)
    _check_agrees(raw, "global_head_dim", "head_dim", global_head_dim)
    if k_eq_v:  # elsewhere transformers does not look at it
        _check_agrees(raw, "num_global_key_value_heads", "num_key_value_heads", global_kv)
    return global_head_dim, global_kv


def _full_layer_overrides(raw: Mapping[str, Any], layer_types: Sequence[LayerType]) -> dict[str, Any] | None:
    """What per_layer_config says of full layers, the same for all of them; None where there is no such field.

    Raises ConfigError for anything else that it says: of sliding layers, or of other fields.
    """
    per_layer = field_value(raw, "per_layer_config", dict, None)
    if per_layer is None:
        return None
    # transformers pads the keys with zeros to the width of the highest
    named = {key.lstrip("0") or "0": entry for key, entry in per_layer.items()}
    for key, entry in named.items():
        _check_layer_entry(key, entry, raw, layer_types)
    entries = [named.get(str(i), {}) for i, kind in enumerate(layer_types) if kind == FULL]
    first: dict[str, Any] = entries[0] if entries else {}
    if any(entry != first for entry in entries):
        raise ConfigError("config.json has a per_layer_config that differs between full-attention layers.")
    return first


def _check_layer_entry(key: str, entry: Any, raw: Mapping[str, Any], layer_types: Sequence[LayerType]) -> None:
    where = f"config.json has per_layer_config of layer {key!r}"
    if key not in map(str, range(len(layer_types))):
        raise ConfigError(f"{where}, but the layers are 0 to {len(layer_types) - 1}.")
    if not isinstance(entry, dict):
        raise ConfigError(f"{where} = {shown(entry)}, but an object was expected.")
    full = layer_types[int(key)] == FULL
    for name, value in entry.items():
        if value != raw.get(name) and not (full and name in PER_LAYER_FIELDS):
            raise ConfigError(
                f"{where} ({layer_types[int(key)]}) with {name} = {shown(value)}, but {name} ="
                f" {shown(raw.get(name))} for all; only {' and '.join(PER_LAYER_FIELDS)} of full-attention layers can"
                " differ."
            )


def _check_agrees(raw: Mapping[str, Any], name: str, per_layer_name: str, value: int) -> None:
    given = field_value(raw, name, int, None)
    if given not in (None, value):
        raise ConfigError(
            f"config.json has {name} = {given}, but per_layer_config gives full-attention layers {per_layer_name} ="
            f" {value}; remove the one that is wrong."
        )
