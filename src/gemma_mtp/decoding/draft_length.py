"""How many tokens to draft: what commits most tokens a second, by measured costs and the sequence's record.

With a_i the chance that draft i is accepted given those before it, a round of K drafts commits
1 + a_1 + a_1 a_2 + ... + a_1 ... a_K tokens; what it costs is measured, round by round.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

#: most drafts of a round that the policy considers
LONGEST = 8
#: what is believed of the first position before anything was seen, and the rounds that this belief counts for
PRIOR_ACCEPTANCE, PRIOR_ROUNDS = 0.7, 2.0
#: a later position is believed to be as good as the one before it; the rounds that this counts for
NEIGHBOUR_ROUNDS = 6.0
#: weight of a round against the next one's: text changes, and what was accepted long ago says little
DECAY = 0.98
#: share of the time that may go into drafting where it does not pay, to notice when that changes
PROBE_SHARE = 0.02
NOTE_WEIGHT = 0.1


class RoundCosts:
    """Seconds of a round with 0, 1, ... drafts on this machine, kept up to date while rounds are played."""

    def __init__(self, measured: Mapping[int, float], longest: int = LONGEST) -> None:
        """From some lengths' seconds; others follow on straight lines between them, the last line going on."""
        known = sorted(measured)
        assert known and known[0] == 0
        self.seconds = [_interpolated(known, measured, k) for k in range(longest + 1)]

    def note(self, drafts: int, seconds: float) -> None:
        """Take a played round into account; a single slow one (the machine was busy) counts for little."""
        old = self.seconds[drafts]
        self.seconds[drafts] = old + NOTE_WEIGHT * (min(seconds, 2 * old) - old)


def _interpolated(known: Sequence[int], seconds: Mapping[int, float], k: int) -> float:
    if k in seconds or len(known) == 1:
        return seconds[k if k in seconds else known[0]]
    right = next((i for i, length in enumerate(known) if length > k), len(known) - 1)
    low, high = known[right - 1], known[right]
    return seconds[low] + (seconds[high] - seconds[low]) * (k - low) / (high - low)


def expected_tokens(acceptance: Sequence[float]) -> float:
    """Tokens a round commits with one draft for each chance, the target's own included."""
    total, chance = 1.0, 1.0
    for a in acceptance:
        chance *= a
        total += chance
    return total


def best_length(acceptance: Sequence[float], costs: RoundCosts) -> int:
    """The number of drafts, 0 to len(acceptance), that commits most tokens a second; the smaller one at a tie."""
    rates = [expected_tokens(acceptance[:k]) / costs.seconds[k] for k in range(len(acceptance) + 1)]
    return max(range(len(rates)), key=lambda k: (rates[k], -k))


@dataclass
class DraftLength:
    """One sequence's policy: its running record of acceptance by position, and what follows from it."""

    costs: RoundCosts
    reached: list[float] = field(default_factory=lambda: [0.0] * LONGEST)
    accepted: list[float] = field(default_factory=lambda: [0.0] * LONGEST)
    idle: int = 0  # rounds since the last with drafts

    @property
    def longest(self) -> int:
        return len(self.costs.seconds) - 1

    def acceptance(self) -> list[float]:
        """The chance of each position. One that was hardly reached is believed to be as good as the one before."""
        chances: list[float] = []
        for i in range(self.longest):
            prior, weight = (chances[-1], NEIGHBOUR_ROUNDS) if chances else (PRIOR_ACCEPTANCE, PRIOR_ROUNDS)
            chances.append((self.accepted[i] + weight * prior) / (self.reached[i] + weight))
        return chances

    def choose(self) -> int:
        """Drafts of the next round."""
        best = best_length(self.acceptance(), self.costs)
        return 1 if best == 0 and self._may_probe() else best

    def _may_probe(self) -> bool:
        plain, one = self.costs.seconds[:2] if self.longest else (1.0, math.inf)
        return self.idle * PROBE_SHARE * plain >= max(one - plain, PROBE_SHARE * plain)

    def record(self, drafted: int, accepted: int) -> None:
        """Note a round."""
        self.idle = 0 if drafted else self.idle + 1
        for i in range(min(drafted, accepted + 1, self.longest)):
            self.reached[i] = DECAY * self.reached[i] + 1
            self.accepted[i] = DECAY * self.accepted[i] + (accepted > i)
