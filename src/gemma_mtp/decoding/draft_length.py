"""How many tokens to draft: what commits most tokens a second, by measured costs and the sequence's record.

With a_i the chance that draft i is accepted given those before it, a round of K drafts commits
1 + a_1 + a_1 a_2 + ... + a_1 ... a_K tokens; what it costs is measured, round by round. Within a round, `early_stop`
ends the drafting where this very draft is less sure than the record.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from gemma_mtp.decoding.early_stop import Calibration, StopRule

#: drafts a round: a number, or what the policy below finds
DraftTokens = int | Literal["auto"]
#: most drafts of a round that the policy considers
LONGEST = 16
#: what is believed of the first position before anything was seen, and the rounds that this belief counts for
PRIOR_ACCEPTANCE, PRIOR_ROUNDS = 0.7, 2.0
#: a later position is believed to be as good as the one before it; the rounds that this counts for
NEIGHBOUR_ROUNDS = 6.0
#: weight of a round against the next one's: text changes, and what was accepted long ago says little
DECAY = 0.98
#: what drafting may cost a sequence beyond plain decoding in all: so many plain rounds, and a share of its length
LOSS_ROUNDS, LOSS_SHARE = 0.75, 0.01
PLAIN_WEIGHT = 0.1
#: among several sequences, where perfect drafts would not gain this much, real ones lose: a tenth to a fifth of them is
#: refused
LEAST_GAIN = 1.45
#: sequences that play together of which each may end its own drafts: of more, all wait for the longest chain, and for
#: how sure the drafter is of every draft, which costs more than the drafts that are spared
STOP_EARLY_AMONG = 2
#: rounds after which a plan is made anew; it changes slowly, and making one takes longer than anything else here
PLAN_ROUNDS = 8
#: plain rounds in a row, at most, before drafting is looked at again
LONGEST_PAUSE = 500
#: how much of the difference between two played rounds goes into their costs; a log-ratio beyond the limit says no more
NOTE_WEIGHT, NOTE_LIMIT = 0.05, 0.5


class RoundCosts:
    """What a round with 0, 1, ... drafts costs on this machine: `seconds`, whose ratios are kept up to date.

    Nothing depends on more than their ratios.
    """

    def __init__(self, measured: Mapping[int, float], draft_step: float = 0.0) -> None:
        """From some lengths' seconds and a draft step's; others follow on straight lines, the last one going on.

        Verifying more rows never costs less: where it was measured to, the fewer rows were disturbed.
        """
        known = sorted(measured)
        assert known and known[0] == 0
        step = min([draft_step, *(0.9 * measured[k] / k for k in known[1:])])  # whatever the clock said
        verify = [measured[k] - k * step for k in known]
        verify = list(itertools.accumulate(reversed(verify), min))[::-1]
        self.seconds = [_interpolated(known, verify, k) + k * step for k in range(LONGEST + 1)]
        self._last: tuple[int, float] | None = None
        self._best_gain: float | None = None  # this and the next one are asked for at every step
        self._next_draft: list[float] | None = None

    def note(self, drafts: int, seconds: float) -> None:
        """Take a played round into account, by its ratio to the one before it.

        A busy machine or a longer context makes both slower, and says nothing about lengths that are not being played.
        """
        last, self._last = self._last, (drafts, seconds)
        if last is None or last[0] == drafts:
            return
        change = math.log(seconds * self.seconds[last[0]] / (last[1] * self.seconds[drafts]))
        self._best_gain = self._next_draft = None
        factor = math.exp(NOTE_WEIGHT / 2 * max(-NOTE_LIMIT, min(NOTE_LIMIT, change)))
        self.seconds[drafts] *= factor
        self.seconds[last[0]] /= factor

    def best_gain(self) -> float:
        """How many times as fast as plain rounds the best length would be if every draft were accepted."""
        if self._best_gain is None:
            self._best_gain = max((k + 1) * self.seconds[0] / seconds for k, seconds in enumerate(self.seconds))
        return self._best_gain

    def loss(self, drafts: int) -> float:
        """What a round of which no draft is accepted takes longer than a plain one, in plain rounds."""
        return self.seconds[drafts] / self.seconds[0] - 1

    def next_draft(self) -> list[float]:
        """Seconds that draft i + 1 adds, smoothed to never fall: the slopes of the lower convex hull.

        A step that costs much (a seventh row where the hardware takes six at once) is shared by the drafts that it
        makes possible, and noise in the measurements evens out.
        """
        if self._next_draft is not None:
            return self._next_draft
        seconds, hull, slopes = self.seconds, [0], list[float]()
        for k in range(1, LONGEST + 1):  # Andrew's monotone chain
            rate = (seconds[k] - seconds[hull[-1]]) / (k - hull[-1])
            while slopes and slopes[-1] >= rate:
                slopes.pop()
                hull.pop()
                rate = (seconds[k] - seconds[hull[-1]]) / (k - hull[-1])
            slopes.append(rate)
            hull.append(k)
        drafts = [b - a for a, b in itertools.pairwise(hull)]
        self._next_draft = [max(rate, 0.0) for rate, n in zip(slopes, drafts, strict=True) for _ in range(n)]
        return self._next_draft


def _interpolated(known: Sequence[int], values: Sequence[float], k: int) -> float:
    """The value at k of the line through the two known points beside it, or through the last two."""
    if len(known) == 1:
        return values[0]
    right = min(max(1, bisect.bisect_left(known, k)), len(known) - 1)
    low, high = known[right - 1], known[right]
    return values[right - 1] + (values[right] - values[right - 1]) * (k - low) / (high - low)


def expected_tokens(acceptance: Sequence[float]) -> float:
    """Tokens a round commits with one draft for each chance, the target's own included."""
    total, chance = 1.0, 1.0
    for a in acceptance:
        chance *= a
        total += chance
    return total


def best_length(acceptance: Sequence[float], costs: Sequence[float]) -> tuple[int, float]:
    """The number of drafts, 0 to len(acceptance), that commits most tokens for its cost; the smaller one at a tie.

    `costs[k]` is a round's with k drafts. Also that number's expected tokens for a unit of cost.
    """
    best, best_rate = 0, 1 / costs[0]
    total, chance = 1.0, 1.0
    for k, a in enumerate(acceptance, start=1):
        chance *= a
        total += chance
        if (rate := total / costs[k]) > best_rate:
            best, best_rate = k, rate
    return best, best_rate


@dataclass(frozen=True)
class Plan:
    """Drafts of a round: at most `longest`, and fewer where `stop` says so."""

    longest: int
    stop: StopRule | None = None


PLAIN = Plan(0)


@dataclass
class DraftLength:
    """The policy of one sequence, or of several that play each round together: the running record of acceptance by
    position, and what follows from it.

    With `early_stop`, and few sequences, rounds are planned long and cut short by the drafter's confidence; else their
    length is fixed before they begin.
    """

    costs: RoundCosts
    early_stop: bool = True
    sequences: int = 1
    reached: list[float] = field(default_factory=lambda: [0.0] * LONGEST)
    accepted: list[float] = field(default_factory=lambda: [0.0] * LONGEST)
    calibration: Calibration = field(default_factory=Calibration)
    allowance: float = LOSS_ROUNDS  # what drafting may still lose, in plain rounds
    plain_seconds: float = 0.0  # of plain rounds, recent ones most; 0 before the first
    plan: Plan = PLAIN
    rounds: float = 0.0  # rounds with drafts
    planned: float = -1.0  # how many of them there were when the plan was made
    pause: int = 0  # plain rounds to play before the next look

    def use(self, costs: RoundCosts, sequences: int) -> None:
        """Go on with more sequences or fewer that play a round together, and with what it costs them."""
        if costs is not self.costs:
            self.costs, self.planned, self.pause = costs, -1.0, 0
        self.sequences = sequences

    def acceptance(self) -> list[float]:
        """The chance of each position. One that was hardly reached is believed to be as good as the one before."""
        chances: list[float] = []
        prior, weight = PRIOR_ACCEPTANCE, PRIOR_ROUNDS
        for reached, accepted in zip(self.reached, self.accepted, strict=True):
            prior = (accepted + weight * prior) / (reached + weight)
            chances.append(prior)
            weight = NEIGHBOUR_ROUNDS
        return chances

    def choose(self) -> Plan:
        """What the next round may draft."""
        if self.pause:
            self.pause -= 1
            return PLAIN
        if self.planned < 0 or self.rounds - self.planned >= min(PLAN_ROUNDS, max(1, self.rounds // 4)):
            self.plan, self.planned = self._new_plan(), self.rounds
            if not self.plan.longest:
                return self._rest(self.costs.loss(1))
        elif not self.plan.longest:
            self.planned = -1.0  # the look, whose outcome makes a new plan
        return self._affordable(self.plan if self.plan.longest else Plan(1))

    def _new_plan(self) -> Plan:
        chances = self.acceptance()
        best, rate = best_length(chances, self.costs.seconds)
        if best == 0 or not self.early_stop or self.sequences > STOP_EARLY_AMONG:
            return Plan(best)
        costs = self.costs.next_draft()
        least = tuple(rate * cost / max(a, 1e-9) for cost, a in zip(costs, chances, strict=True))
        return Plan(LONGEST, StopRule(least, self.calibration.bias, self.calibration.slope))

    def _affordable(self, plan: Plan) -> Plan:
        """The plan, or the part of it that may be lost."""
        longest = plan.longest
        while longest and self.costs.loss(longest) > self.allowance:
            longest -= 1
        if plan.longest and not longest:
            return self._rest(self.costs.loss(1) - self.allowance)
        return plan if longest == plan.longest else Plan(longest, plan.stop)

    def _rest(self, loss: float) -> Plan:
        """Play plain rounds, this one included, until a loss has become affordable."""
        self.pause = max(0, min(math.ceil(loss / LOSS_SHARE), LONGEST_PAUSE) - 1)
        return PLAIN

    def record(
        self, drafted: int, accepted: int, confidences: Sequence[float] = (), seconds: float = 0.0, share: float = 1.0
    ) -> None:
        """Note a round, how sure the drafter was of each draft if that is known, and what it took if that is.

        `share`: of the sequences that played it together, of which each has its round noted.
        """
        self.allowance += share * LOSS_SHARE
        if not drafted:
            old = self.plain_seconds or seconds
            self.plain_seconds = old + PLAIN_WEIGHT * (min(seconds, 2 * old) - old)
            return
        self.rounds += share
        self.allowance += share * ((1 + LOSS_SHARE) * accepted - self._loss(drafted, seconds))
        decay = DECAY**share
        for i in range(min(drafted, accepted + 1, LONGEST)):
            self.reached[i] = decay * self.reached[i] + 1
            self.accepted[i] = decay * self.accepted[i] + (accepted > i)
        self.calibration.learn(confidences, accepted)

    def _loss(self, drafted: int, seconds: float) -> float:
        """What a round took longer than a plain one, in plain rounds: what its length costs, or at a look what it did.

        A drafter that is seldom asked finds the processor's caches full of other things. A hiccup counts for one round.
        """
        expected = self.costs.loss(drafted)
        if self.plan.longest or not seconds or not self.plain_seconds:
            return expected
        return max(expected, min(seconds / self.plain_seconds - 1, expected + 1))
