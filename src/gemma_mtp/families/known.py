"""The families that are known."""

from __future__ import annotations

from gemma_mtp.families.base import Family
from gemma_mtp.families.gemma3 import GEMMA3
from gemma_mtp.families.gemma4 import GEMMA4

FAMILIES: tuple[Family, ...] = (GEMMA4, GEMMA3)


def family_of(model_type: str) -> Family | None:
    """Returns the family of a target's or a drafter's top-level model_type, or None where none has it."""
    return next((f for f in FAMILIES if model_type in f.targets or model_type in f.drafters), None)


def target_types() -> list[str]:
    """Returns the model_types of all targets."""
    return [model_type for family in FAMILIES for model_type in family.targets]


def drafter_types() -> list[str]:
    """Returns the model_types of all drafters."""
    return [model_type for family in FAMILIES for model_type in family.drafters]


def names() -> str:
    """Returns the families' names, for a sentence."""
    return " or ".join(family.name for family in FAMILIES)
