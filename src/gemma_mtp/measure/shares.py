"""Acceptance by position with intervals over prompts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gemma_mtp.measure.acceptance import AcceptanceReport

#: of fewer prompts, draws with replacement say nothing of others
FEWEST_PROMPTS = 5
RESAMPLES = 2000


@dataclass(frozen=True)
class Shares:
    """[K] each: the share of rounds that accepted draft i, and its 95% interval where there are prompts enough."""

    values: tuple[float, ...]
    intervals: tuple[tuple[float, float], ...] | None


def conditional(report: AcceptanceReport, seed: int = 0) -> Shares:
    """Of the rounds that accepted the drafts before. Intervals as in `joint`."""
    return _shares(report, list(report.pooled.by_position), conditional=True, seed=seed)


def joint(report: AcceptanceReport, seed: int = 0) -> Shares:
    """Of all rounds: those that accepted drafts 1 to i.

    The interval is the percentile bootstrap's over prompts, as in `acceptance.compare`: rounds of one prompt are alike.
    """
    return _shares(report, list(report.pooled.joint_by_position), conditional=False, seed=seed)


def _shares(report: AcceptanceReport, values: list[float], conditional: bool, seed: int) -> Shares:
    n = len(report.prompts)
    if n < FEWEST_PROMPTS:
        return Shares(tuple(values), None)
    reached = np.array([prompt.acceptance.reached for prompt in report.prompts])  # [prompts, K + 1]
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES) @ reached
    below = draws[:, :-1] if conditional else draws[:, :1]
    low, high = np.percentile(draws[:, 1:] / np.maximum(below, 1), [2.5, 97.5], axis=0)
    return Shares(tuple(values), tuple(zip(low.tolist(), high.tolist(), strict=True)))
