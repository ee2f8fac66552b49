"""How many tokens to draft: what commits most tokens a second, by measured costs and the sequence's record.

With a_i the chance that draft i is accepted given those before it, a round of K drafts commits
1 + a_1 + a_1 a_2 + ... + a_1 ... a_K tokens; what it costs is measured, round by round. Within a round, `early_stop`
ends the drafting where this very draft is less sure than the record.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from gemma_mtp.decoding.early_stop import Calibration, StopRule
from gemma_mtp.decoding.round_costs import LONGEST, RoundCosts

#: drafts a round: a number, or what the policy below finds
DraftTokens = int | Literal["auto"]
#: what is believed of the first position before anything was seen, and the rounds that this belief counts for
PRIOR_ACCEPTANCE, PRIOR_ROUNDS = 0.7, 2.0
#: a later position is believed to be as good as the one before it; the rounds that this counts for
NEIGHBOUR_ROUNDS = 12.0
#: rounds that an earlier sequence's record counts for
KEPT_ROUNDS = 4.0
#: weight of a round against the next one's: text changes, and what was accepted long ago says little
DECAY = 0.98
#: what drafting may cost a sequence beyond plain decoding in all: so many plain rounds, and a share of its length
LOSS_ROUNDS, LOSS_SHARE = 0.75, 0.01
PLAIN_WEIGHT = 0.1
#: what an earlier sequence gained pays for this one's first drafts: at most so many plain rounds
KEPT_GAIN = 3.0
#: sequences that play together of which each may end its own drafts: of more, all wait for the longest chain, and for
#: how sure the drafter is of every draft, which costs more than the drafts that are spared
STOP_EARLY_AMONG = 2
#: rounds after which a plan is made anew; it changes slowly, and making one takes longer than anything else here
PLAN_ROUNDS = 8
#: a length that would do better by this factor if its costs were this many standard deviations lower is tried, once in
#: so many rounds with drafts; one round tells what it costs
TRIAL_GAIN, TRIAL_ERRORS, TRIAL_ROUNDS = 1.02, 1.5, 16
#: plain rounds in a row, at most, before drafting is looked at again
LONGEST_PAUSE = 500


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


def least_reach(acceptance: Sequence[float], costs: Sequence[float], rate: float) -> tuple[float, ...]:
    """For 0, 1, ... drafts made: the chance that all of them are accepted, above which another draft pays.

    `rate`: tokens for a unit of cost that drafting must keep up. A step in the costs (a seventh row where the hardware
    takes six at once) is passed where the drafts behind it pay for it together.
    """
    least = []
    for made in range(len(acceptance)):
        begin, lowest, tokens, chance = costs[made], math.inf, 1e-9, 1.0
        for k in range(made, len(acceptance)):
            chance *= acceptance[k]
            tokens += chance
            of_token = (costs[k + 1] - begin) / tokens
            if of_token < lowest:
                lowest = of_token
        least.append(rate * max(0.0, lowest))
    return tuple(least)


@dataclass(frozen=True)
class Plan:
    """Drafts of a round: at most `longest`, and fewer where `stop` says so."""

    longest: int
    stop: StopRule | None = None


PLAIN = Plan(0)


class Outcome(Protocol):
    """What came of a round: drafts made, how many of them were accepted, how sure the drafter was of each."""

    @property
    def drafted(self) -> int: ...
    @property
    def accepted(self) -> int: ...
    @property
    def confidences(self) -> Sequence[float]: ...


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
    tried: float = 0.0  # how many of them there were at the last trial
    pause: int = 0  # plain rounds to play before the next look

    def use(self, costs: RoundCosts, sequences: int) -> None:
        """Go on with more sequences or fewer that play a round together, and with what it costs them."""
        if costs is not self.costs:
            self.costs, self.planned, self.pause = costs, -1.0, 0
        self.sequences = sequences

    def after(self, earlier: DraftLength) -> DraftLength:
        """Returns this policy, which begins with what an earlier sequence's policy learnt, as far as that goes for
        another text."""
        share = min(1.0, KEPT_ROUNDS / max(earlier.reached[0], 1e-9))
        self.reached = [share * reached for reached in earlier.reached]
        self.accepted = [share * accepted for accepted in earlier.accepted]
        self.calibration = earlier.calibration.for_another_text()
        self.allowance = max(LOSS_ROUNDS, min(KEPT_GAIN, earlier.allowance))
        return self

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
        lasts = 1 if self.planned == self.tried else min(PLAN_ROUNDS, max(1, self.rounds // 4))  # a trial, one round
        if self.planned < 0 or self.rounds - self.planned >= lasts:
            self.plan, self.planned = self._new_plan(), self.rounds
            if not self.plan.longest:
                return self._rest(self.costs.loss(1))
        elif not self.plan.longest:
            self.planned = -1.0  # the look, whose outcome makes a new plan
        return self._affordable(self.plan if self.plan.longest else Plan(1))

    def _new_plan(self) -> Plan:
        chances = self.acceptance()
        seconds = self.costs.seconds
        best, rate = best_length(chances, seconds)
        if self.rounds >= self.tried + TRIAL_ROUNDS:
            other, better = best_length(chances, self.costs.least_seconds(best, TRIAL_ERRORS))
            if other and other != best and better > TRIAL_GAIN * rate:
                self.tried = self.rounds
                return Plan(other)
        if best == 0 or not self.early_stop or self.sequences > STOP_EARLY_AMONG:
            return Plan(best)
        return Plan(
            LONGEST, StopRule(least_reach(chances, seconds, rate), self.calibration.bias, self.calibration.slope)
        )

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

    def learn(self, rounds: Sequence[Outcome], seconds: float = 0.0, drafting: float = 0.0) -> None:
        """Take the rounds into account that were played by the last plan, one of each sequence.

        `seconds`: what they took together, and `drafting`: what of it went by until the drafts were there. 0 where the
        sequences shared it with other work, which says nothing about costs.
        """
        lengths = {played.drafted for played in rounds}
        if seconds and len(lengths) == 1:
            # where drafts are not looked at, a device may still be making them when the host goes on
            self.costs.note(lengths.pop(), seconds, drafting if self.early_stop else None)
        alone = seconds if len(rounds) == 1 else 0.0
        for played in rounds:
            self.record(played.drafted, played.accepted, played.confidences, alone, 1 / len(rounds))

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
