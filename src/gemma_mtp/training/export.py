"""Writes a trained drafter in the official layout, with a model card."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_mtp.checkpoint import open_source, read_generation_config, save_drafter
from gemma_mtp.checkpoint.origin import Origin
from gemma_mtp.config import DrafterConfig
from gemma_mtp.json_files import write_json
from gemma_mtp.model.drafter import Drafter
from gemma_mtp.training.centroids import Recall
from gemma_mtp.training.gate import Reports, Verdict, setting

GENERATION_CONFIG, CARD = "generation_config.json", "MODEL_CARD.md"


def export_drafter(
    drafter: Drafter, config: DrafterConfig, directory: Path, target: Path, draft_tokens: int = 4
) -> None:
    """Weights in bf16, config and generation config, as transformers reads them. The token ids and sampling defaults
    are those of the target in `target`."""
    save_drafter(drafter, config, directory)
    write_json(directory / GENERATION_CONFIG, _generation_config(target, draft_tokens))


def _generation_config(target: Path, draft_tokens: int) -> dict[str, Any]:
    source = open_source(target)
    defaults = read_generation_config(source)
    given = dict(source.generation_config())
    given.setdefault("eos_token_id", list(defaults.eos_token_ids))
    return {**given, "num_assistant_tokens": draft_tokens, "num_assistant_tokens_schedule": "constant"}


@dataclass(frozen=True)
class CardFacts:
    """What the card of one run says. `start` is a phrase; `recipe` and `data` are shown as they are."""

    origin: Origin
    start: str
    parameters: int
    steps: int
    tokens: int
    seconds: float
    data: Mapping[str, Any]
    recipe: Mapping[str, Any]


def card(facts: CardFacts, start: Reports, now: Reports, verdict: Verdict, recall: Recall | None) -> str:
    """MODEL_CARD.md: what the drafter is for, what it was trained on, how, and the acceptance measured."""
    head = "" if recall is None else f"\nCentroid head: {recall}.\n"
    K = now[0].draft_tokens
    rows = "\n".join(
        f"| {setting(b)} | {a.pooled.mean_length:.3f} | {b.pooled.mean_length:.3f} |"
        f" {', '.join(f'{share:.3f}' for share in b.pooled.by_position)} | {b.pooled.rounds} |"
        for a, b in zip(start, now, strict=True)
    )
    licence = "\n".join(f"{name}: {value}" for name, value in facts.origin.license.items())
    found = verdict.lines()[0]
    return f"""---
{licence}
base_model: {facts.origin.base_model}
library_name: gemma-mtp
tags:
- speculative-decoding
- multi-token-prediction
- gemma4
---

# MTP drafter for {facts.origin.base_model}

Proposes tokens in speculative decoding, of which the target keeps those that it would have written itself: the output
stays the same, and comes faster. With any other target it is of no use. It was trained by `gemma-mtp train`,
{facts.start}.

{facts.parameters:,} parameters; {_counted(facts.steps, "step")}; {facts.tokens:,} tokens seen;
{_lasting(facts.seconds)}.

## Data

{_listed(facts.data)}

## Recipe

{_listed(facts.recipe)}

## Measured

On {_counted(len(now[0].prompts), "held-out prompt")}: {_counted(K, "draft")} a round, `exact` verification,
{_counted(now[0].params.max_tokens, "token")} for each. The mean acceptance length counts the target's own
token; acceptance at a position is given the ones before.

| | before | after | at positions 1 to {K}, after | rounds |
|---|---|---|---|---|
{rows}

{found[0].upper()}{found[1:]}.
{head}"""


def _listed(facts: Mapping[str, Any]) -> str:
    return "\n".join(f"- {name.replace('_', ' ')}: {_in_words(value)}" for name, value in facts.items())


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _lasting(seconds: float) -> str:
    minutes = round(seconds / 60)
    return "less than a minute" if seconds < 60 else _counted(minutes, "minute")


def _in_words(value: object) -> str:
    """A setting as people write it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{name.replace('_', ' ')} {_in_words(part)}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_in_words, value))
    if isinstance(value, int):
        return f"{value:,}"
    text = str(value).removeprefix("torch.")
    return text if re.fullmatch(r"[\w.,= +-]+", text) else f"`{text}`"  # or Markdown would take it for something else
