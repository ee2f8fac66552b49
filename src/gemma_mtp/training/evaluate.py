"""Acceptance of a pair, measured by decoding held-out prompts in the engine."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gemma_mtp.decoding.sampling import SamplingParams
from gemma_mtp.engine.pair import Pair
from gemma_mtp.engine.result import GenerationResult


@dataclass(frozen=True)
class AcceptanceReport:
    """Acceptance over several generations, rounds pooled. `by_position[i]` is given the drafts before it."""

    draft_tokens: int
    rounds: int
    by_position: list[float]
    mean_length: float
    by_prompt: dict[str, float]


def measure_acceptance(
    pair: Pair,
    prompts: Sequence[tuple[str, str]],
    draft_tokens: int = 4,
    max_tokens: int = 128,
    temperature: float = 0.0,
) -> AcceptanceReport:
    """Complete each (name, text) prompt, past any end of text so that every prompt counts alike."""
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, ignore_eos=True)
    results = {name: pair.generate(text, params, draft_tokens=draft_tokens) for name, text in prompts}
    return report(results, draft_tokens)


def report(results: dict[str, GenerationResult], draft_tokens: int) -> AcceptanceReport:
    """Pool the decode rounds of several results. Rounds shortened by the token limit are left out."""
    rounds = [r for result in results.values() for r in result.decode_rounds if r.drafted == draft_tokens]
    shares = []
    for position in range(draft_tokens):
        reached = [r for r in rounds if r.accepted >= position]
        shares.append(_share(r.accepted > position for r in reached))
    mean = 1 + sum(r.accepted for r in rounds) / max(1, len(rounds))
    return AcceptanceReport(draft_tokens, len(rounds), shares, mean,
                            {name: result.mean_acceptance_length for name, result in results.items()})  # fmt: skip


def _share(hits: Iterable[bool]) -> float:
    counted = list(hits)
    return sum(counted) / len(counted) if counted else 0.0


def read_prompts(path: Path) -> list[tuple[str, str]]:
    """(source, text) of each line of a held-out prompts file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [(entry["source"], entry["text"]) for entry in map(json.loads, lines)]
