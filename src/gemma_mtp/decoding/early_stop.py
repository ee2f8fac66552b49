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
#: how fast a sequence's own drafts change that
LEARNING_RATE = 0.1
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
    """What one sequence's drafts have shown of confidence and acceptance: a logistic regression, learnt online."""

    bias: float = BIAS
    slope: float = SLOPE

    def learn(self, confidences: Sequence[float], accepted: int) -> None:
        """Take a round into account: of its drafts, the first `accepted` were accepted, and the next was refused."""
        for i, confidence in enumerate(confidences[: accepted + 1]):
            odds = log_odds(confidence)
            error = (i < accepted) - 1 / (1 + math.exp(-(self.bias + self.slope * odds)))
            self.bias += LEARNING_RATE * error
            # a slope learns slower, because its feature is larger; below zero it would trust the least sure draft most
            self.slope = max(0.1, self.slope + LEARNING_RATE / EXTREME * error * odds)
