"""Writes a trained drafter in the official layout, with a model card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_mtp.checkpoint import open_source, read_generation_config, save_drafter
from gemma_mtp.config import DrafterConfig
from gemma_mtp.files.replace import replace_file
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
    """What the card of one run says. `recipe` and `data` are shown as they are."""

    target: str
    start: str
    parameters: int
    steps: int
    tokens: int
    seconds: float
    data: Mapping[str, Any]
    recipe: Mapping[str, Any]
    base_model: str = "unknown"
    license: str = "other"


def write_card(
    path: Path, facts: CardFacts, start: Reports, now: Reports, verdict: Verdict, recall: Recall | None
) -> None:
    """MODEL_CARD.md: what the drafter is for, what it was trained on, how, and the acceptance measured."""
    text = card(facts, start, now, verdict, recall)
    replace_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def card(facts: CardFacts, start: Reports, now: Reports, verdict: Verdict, recall: Recall | None) -> str:
    """The card's text."""
    head = "" if recall is None else f"\nCentroid head: {recall}.\n"
    K = now[0].draft_tokens
    rows = "\n".join(
        f"| {setting(b)} | {a.pooled.mean_length:.3f} | {b.pooled.mean_length:.3f} |"
        f" {', '.join(f'{share:.3f}' for share in b.pooled.by_position)} | {b.pooled.rounds} |"
        for a, b in zip(start, now, strict=True)
    )
    return f"""---
license: {facts.license}
base_model: {facts.base_model}
library_name: gemma-mtp
tags:
- speculative-decoding
- multi-token-prediction
- gemma4
---

# MTP drafter for {facts.target}

Drafts tokens for this target in speculative decoding; the target alone decides what is written. It is of no use with
another target. Trained by `gemma-mtp train`, from {facts.start}.

{facts.parameters:,} parameters, {facts.steps:,} steps, {facts.tokens:,} tokens seen, {facts.seconds / 60:.1f} minutes.

## Data

{_listed(facts.data)}

## Recipe

{_listed(facts.recipe)}

## Measured

On {len(now[0].prompts)} held-out prompts, {K} drafts a round, `exact` verification, {now[0].params.max_tokens} tokens a
prompt. The mean acceptance length counts the target's own token; acceptance at a position is given the ones before.

| | before | after | after, at positions 1 to {K} | rounds |
|---|---|---|---|---|
{rows}

{verdict.lines()[0]}.
{head}"""


def _listed(facts: Mapping[str, Any]) -> str:
    return "\n".join(f"- {name.replace('_', ' ')}: {_in_words(value)}" for name, value in facts.items())


def _in_words(value: object) -> str:
    """A setting as people write it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{name.replace('_', ' ')} {_in_words(part)}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_in_words, value))
    return f"{value:,}" if isinstance(value, int) else str(value).removeprefix("torch.")
