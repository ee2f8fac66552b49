"""What an adapter_config.json of PEFT says, as far as it can be merged into weights; all else is refused by name."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from gemma_mtp.checkpoint.module_patterns import first_matches, wrapped
from gemma_mtp.errors import CheckpointError
from gemma_mtp.json_files import shown

FILE = "adapter_config.json"
#: fields that say how training went, where, or on which modules, which the stored tensors say themselves
NO_EFFECT = frozenset({
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "lora_dropout", "modules_to_save", "layers_to_transform", "layers_pattern",
    "megatron_core", "eva_config", "runtime_config", "qalora_group_size", "ensure_weight_tying", "velora_config",
})  # fmt: skip
#: fields with an effect that is honoured
HONOURED = frozenset({
    "peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "init_lora_weights",
    "bias", "fan_in_fan_out",
})  # fmt: skip
#: a longer pattern is refused before it is compiled
LONGEST_PATTERN = 2000
#: ways to begin that leave the base model's weights as they are
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class AdapterConfig:
    """Ranks and scales of an adapter's modules. The patterns are regular expressions of module names' ends."""

    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    rslora: bool
    dora: bool
    notes: tuple[str, ...] = ()

    def of_modules(self, modules: Collection[str]) -> ModuleScales:
        """Ranks and scales of modules, by their names in the model that was adapted. Raises CheckpointError where a
        pattern takes too long to decide."""
        found_ranks, found_alphas = (first_matches(list(each), modules) for each in (self.ranks, self.alphas))
        ranks = {name: self.ranks[found_ranks[name]] if name in found_ranks else self.rank for name in modules}
        alphas = {name: self.alphas[found_alphas[name]] if name in found_alphas else self.alpha for name in modules}
        scales = {name: alphas[name] / (math.sqrt(ranks[name]) if self.rslora else ranks[name]) for name in modules}
        return ModuleScales(ranks, scales)


@dataclass(frozen=True)
class ModuleScales:
    """Of each module of an adapter its rank, and what its product of matrices is multiplied by."""

    ranks: Mapping[str, int]
    scales: Mapping[str, float]


def parse_adapter_config(raw: Any) -> AdapterConfig:
    """Raises CheckpointError for what is malformed, and for what can not be merged exactly."""
    if not isinstance(raw, dict):
        raise CheckpointError(f"{FILE} holds a {type(raw).__name__}, but a JSON object was expected.")
    if raw.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{FILE} has peft_type {shown(raw.get('peft_type'))}, but only LORA adapters can be merged; merge it with"
            " PEFT (merge_and_unload) where PEFT can, and give the merged checkpoint."
        )
    for name, value in raw.items():
        if name not in NO_EFFECT | HONOURED and value not in (None, False, [], {}, ""):
            raise _refused(name, value)
    if not any(raw.get("init_lora_weights") is start for start in PLAIN_STARTS[:3]) and (
        raw["init_lora_weights"] not in PLAIN_STARTS[3:]
    ):
        raise _refused("init_lora_weights", raw["init_lora_weights"], "it changes the base model's weights as well")
    if raw.get("bias", "none") not in ("none", "all", "lora_only"):
        raise _refused("bias", raw["bias"])
    notes = []
    if raw.get("fan_in_fan_out"):
        notes.append(
            "the adapter has fan_in_fan_out, which is for layers that store their weights transposed; Gemma has none,"
            " and PEFT too leaves it out of account."
        )
    return AdapterConfig(
        rank=_rank(raw.get("r"), "r"),
        alpha=_number(raw.get("lora_alpha"), "lora_alpha"),
        ranks={key: _rank(value, f"rank_pattern[{key!r}]") for key, value in _pattern(raw, "rank_pattern").items()},
        alphas={
            key: _number(value, f"alpha_pattern[{key!r}]") for key, value in _pattern(raw, "alpha_pattern").items()
        },
        rslora=_flag(raw, "use_rslora"),
        dora=_flag(raw, "use_dora"),
        notes=tuple(notes),
    )


def _pattern(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = raw.get(name) or {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{FILE} has {name} {shown(value)}, but an object of patterns was expected.")
    for key in value:
        if len(key) > LONGEST_PATTERN:
            raise CheckpointError(f"{FILE} has {name} with a pattern of {len(key)} characters, but {LONGEST_PATTERN} at"
                                  " most were expected.")  # fmt: skip
        try:
            re.compile(wrapped(key))
        except (re.error, OverflowError, RecursionError) as error:
            raise CheckpointError(f"{FILE} has {name} with {key!r}, which is no regular expression: {error}.") from None
    return value


def _rank(value: Any, name: str) -> int:
    if type(value) is not int or not 0 < value < 1 << 31:
        raise CheckpointError(f"{FILE} has {name} {shown(value)}, but a whole number above 0 was expected.")
    return value


def _number(value: Any, name: str) -> float:
    if type(value) not in (int, float) or not abs(value) < 1e30:
        raise CheckpointError(f"{FILE} has {name} {shown(value)}, but a number was expected.")
    return float(value)


def _flag(raw: Mapping[str, Any], name: str) -> bool:
    value = raw.get(name)
    if value not in (True, False, None):
        raise CheckpointError(f"{FILE} has {name} {shown(value)}, but true or false was expected.")
    return bool(value)


def _refused(name: str, value: Any, why: str = "it is not known how to merge that") -> CheckpointError:
    return CheckpointError(
        f"{FILE} has {name} {str(value)[:80]!r}, which can not be merged: {why}; merge it with PEFT (merge_and_unload)"
        " and give the merged checkpoint."
    )
