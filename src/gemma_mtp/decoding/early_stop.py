"""When to stop drafting within a round, by how sure the drafter is of what it has drafted.

After each draft its confidence (the drafter's own probability of it) is turned into a chance of acceptance, and the
product of these chances is the reach: the chance that every draft so far is accepted, without which the next one is in
vain. Drafting goes on while the reach is high enough to pay for the next draft. `src/native/drafter.cpp` has it too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

#: log-odds of acceptance are BIAS + SLOPE * log-odds of the confidence until a sequence has shown otherwise: what a
#: drafter finds likeliest, the target chooses more often than its probability says
BIAS, SLOPE = 0.5, 1.2
#: how far that may be off at the start: variance of the bias, covariance, variance of the slope
PRIOR_ERRORS = (4.0, 0.0, 0.16)
#: what of these is left where another text of the same drafter has been seen
KEPT_DOUBT = 0.25
#: weight of what is known against what the next round says: text changes
FORGETTING = 0.98
LEAST_SLOPE, NEWTON_STEPS = 0.1, 12
#: log-odds of a confidence beyond this teach and say no more
EXTREME = 6.0


@dataclass(frozen=True)
class StopRule:
    """`least[i]`: the reach that is needed to make draft i + 1 after i drafts; `bias` and `slope`: the calibration."""

    least: tuple[float, ...]
    bias: float
    slope: float

    def goes_on(self, made: int, reach: float) -> bool:
        """Whether another draft pays after `made` of them."""
        return made < len(self.least) and reach >= self.least[made]


def log_odds(confidence: float) -> float:
    """Of a probability, cut off at `EXTREME` on both sides; a NaN counts as no confidence."""
    if not confidence > 0:
        return -EXTREME
    if confidence >= 1:
        return EXTREME
    return max(-EXTREME, min(EXTREME, math.log(confidence / (1 - confidence))))


def chance(confidence: float, bias: float, slope: float) -> float:
    """The chance that a draft is accepted, given those before it were."""
    return 1 / (1 + math.exp(-(bias + slope * log_odds(confidence))))


@dataclass
class Calibration:
    """What one sequence's drafts have shown of confidence and acceptance: a logistic regression, learnt online.

    How sure it is of bias and slope, as a covariance, decides how far a draft moves them: a drafter that is sure of
    every draft and often wrong is found out by its first few mistakes.
    """

    bias: float = BIAS
    slope: float = SLOPE
    errors: tuple[float, float, float] = PRIOR_ERRORS  # of bias; of both; of slope

    def for_another_text(self) -> Calibration:
        """Returns the same, less sure of itself."""
        return Calibration(self.bias, self.slope, tuple(KEPT_DOUBT * error for error in PRIOR_ERRORS))  # type: ignore[arg-type]

    def learn(self, confidences: Sequence[float], accepted: int) -> None:
        """Take a round into account: of its drafts, the first `accepted` were accepted, and the next was refused."""
        if not confidences:
            return
        self.errors = _forgotten(self.errors)
        for i, confidence in enumerate(confidences[: accepted + 1]):
            self._learn_one(log_odds(confidence), i < accepted)

    def _learn_one(self, odds: float, accepted: bool) -> None:
        of_bias, of_both, of_slope = self.errors
        to_bias, to_slope = of_bias + of_both * odds, of_both + of_slope * odds
        variance = to_bias + to_slope * odds
        found = _likeliest(self.bias + self.slope * odds, variance, accepted)
        miss = accepted - found
        self.bias += to_bias * miss
        # below zero it would trust the least sure draft most
        self.slope = max(LEAST_SLOPE, self.slope + to_slope * miss)
        weight = found * (1 - found)
        shrink = weight / (1 + weight * variance)
        self.errors = (
            of_bias - shrink * to_bias * to_bias,
            of_both - shrink * to_bias * to_slope,
            of_slope - shrink * to_slope * to_slope,
        )


def _forgotten(errors: tuple[float, float, float]) -> tuple[float, float, float]:
    """What a round later is known: a little less, but never less than at the start."""
    of_bias, of_both, of_slope = errors
    keep = 1 / FORGETTING
    if of_bias * keep > PRIOR_ERRORS[0] or of_slope * keep > PRIOR_ERRORS[2]:
        return errors
    return of_bias * keep, of_both * keep, of_slope * keep


def _likeliest(expected: float, variance: float, accepted: bool) -> float:
    """The chance whose log-odds are likeliest after one draft, when they were `expected` with that variance before.

    It is where `log-odds + variance * chance = expected + variance * accepted`, of which the left side rises.
    """
    low, high = (expected, expected + variance) if accepted else (expected - variance, expected)
    odds = expected
    for _ in range(NEWTON_STEPS):
        chance_ = 1 / (1 + math.exp(-odds))
        excess = odds - expected + variance * (chance_ - accepted)
        if abs(excess) < 1e-3:
            break
        low, high = (low, odds) if excess > 0 else (odds, high)
        odds -= excess / (1 + variance * chance_ * (1 - chance_))
        if not low < odds < high:
            odds = (low + high) / 2
    return 1 / (1 + math.exp(-odds))
