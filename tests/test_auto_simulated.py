"""What `auto` gains, simulated: true costs and acceptances are given, measured costs are wrong, and rounds are noisy.

A round's regret is the time it takes beyond what its expected tokens are worth at the speed of the best fixed length,
so that luck in what is accepted does not count. Its sum over a run, by the time that the best length takes, is what
`auto` loses. No clock is read: seconds are made up.
"""

import functools
import itertools
import math
import random
import statistics
from collections.abc import Callable

import pytest

from gemma_mtp.decoding.draft_length import DraftLength, Plan
from gemma_mtp.decoding.early_stop import StopRule, chance
from gemma_mtp.decoding.round_costs import LONGEST, RoundCosts
from gemma_mtp.engine.round import RoundOutput

#: a draft step, and verifying 1 to 17 rows, in plain rounds: rows that cost little; as measured of a pair of 112 M
#: parameters with AVX2 in bf16; with steps where the hardware takes six rows at once
TRUE = {
    "flat": (0.1, [1 + 0.015 * k for k in range(LONGEST + 1)]),
    "bf16": (0.14, [1, 1.01, 1.02, 1.09, 1.17, 1.23, 1.52, 1.71, 1.78, 1.84, 1.95, 2.11, 2.43, 2.57, 2.61, 2.7, 2.86]),
    "steps": (0.08, [1, 1.03, 1.1, 1.18, 1.28, 1.36, 1.9, 1.94, 1.98, 2.02, 2.07, 2.1, 2.73, 2.77, 2.8, 2.85, 2.9]),
}
ACCEPTANCE = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
TOKENS, SEEDS = 300, 8
Verify = list[float]
#: what the measurement says instead: (draft step, verify) -> the same
WRONG: dict[str, Callable[[float, Verify], tuple[float, Verify]]] = {
    "a draft step at half": lambda step, verify: (step / 2, verify),
    "a draft step at three times": lambda step, verify: (step * 3, verify),
    "verifying at half": lambda step, verify: (step, [v / 2 for v in verify]),
    "verifying at three times": lambda step, verify: (step, [v * 3 for v in verify]),
    "more rows at a third": lambda step, verify: (step, [1 + (v - 1) / 3 for v in verify]),
    "more rows at three times": lambda step, verify: (step, [1 + 3 * (v - 1) for v in verify]),
    "four drafts at three times": lambda step, verify: (step, [v * 3 if k == 4 else v for k, v in enumerate(verify)]),
    "four drafts at half": lambda step, verify: (step, [v / 2 if k == 4 else v for k, v in enumerate(verify)]),
}


def quiet(rng: random.Random) -> float:
    return rng.gauss(1, 0.02) * (1 + rng.expovariate(1) * (rng.random() < 0.02))


def busy(rng: random.Random) -> float:
    """A fifth up or down, and one in ten is held up, seldom for several times as long."""
    return math.exp(rng.gauss(0, 0.2)) * (1 + min(5, rng.paretovariate(1.2)) * (rng.random() < 0.1))


def costs_of(step: float, verify: Verify) -> RoundCosts:
    return RoundCosts({k: v + k * step for k, v in enumerate(verify)}, step)


def drafts_made(plan: Plan, left: int, sure: float) -> int:
    """By a drafter that is as sure of every draft, right or wrong."""
    made, reach, longest = 0, 1.0, min(plan.longest, left - 1)
    rule = plan.stop or StopRule((0.0,) * LONGEST, 0.0, 1.0)
    while made < longest and (made == 0 or rule.goes_on(made, reach)):
        reach *= chance(sure, rule.bias, rule.slope)
        made += 1
    return made


def losses(
    name: str, costs: RoundCosts, acceptance: float, noise: Callable[[random.Random], float], seed: int
) -> list[float]:
    """Of every round of one generation: the regret, as a share of what the best fixed length takes for all of it."""
    step, verify = TRUE[name]
    true = [v + k * step for k, v in enumerate(verify)]
    tokens = [sum(acceptance**i for i in range(k + 1)) for k in range(LONGEST + 1)]
    speed = max(n / seconds for n, seconds in zip(tokens, true, strict=True))
    rng, policy, left, lost = random.Random(seed), DraftLength(costs), TOKENS, list[float]()
    while left > 0:
        made = drafts_made(policy.choose(), left, 0.9999)
        accepted = 0
        while accepted < made and rng.random() < acceptance:
            accepted += 1
        drafting = made * step * noise(rng)
        sure = [0.9999] * made
        played = RoundOutput([], made, accepted, None, sure)
        policy.learn([played], drafting + verify[made] * noise(rng), drafting)
        lost.append((true[made] - tokens[made] / speed) * speed / TOKENS)
        left -= accepted + 1
    return lost[:-1]  # the last one is cut short for every length


def mean_loss(
    name: str, costs: Callable[[], RoundCosts], acceptance: float, noise: Callable[[random.Random], float],
    seeds: int = SEEDS, since: int = 0,
) -> float:  # fmt: skip
    runs = [losses(name, costs(), acceptance, noise, seed) for seed in range(seeds)]
    return statistics.fmean(sum(run[since:]) for run in runs)


@pytest.mark.parametrize("name", TRUE)
@pytest.mark.parametrize(("noise", "mean", "worst"), [(quiet, 0.03, 0.04), (busy, 0.03, 0.05)])
def test_close_to_the_best_fixed_length(
    name: str, noise: Callable[[random.Random], float], mean: float, worst: float
) -> None:
    """Over 300 tokens, from nothing known of the drafter, which is as sure of what is wrong."""
    lost = {a: mean_loss(name, functools.partial(costs_of, *TRUE[name]), a, noise) for a in ACCEPTANCE}
    assert statistics.fmean(lost.values()) <= mean, lost
    assert max(lost.values()) <= worst, lost


def corrected(noise: Callable[[random.Random], float], seeds: int) -> dict[tuple[str, str, float], float]:
    """What is lost from the fiftieth round on, by what was measured wrong, true costs and acceptance."""
    lost = {}
    for wrong, name, acceptance in itertools.product(WRONG, TRUE, (0.5, 0.7, 0.9)):
        measured = WRONG[wrong](*TRUE[name])
        lost[wrong, name, acceptance] = mean_loss(
            name, functools.partial(costs_of, *measured), acceptance, noise, seeds, 50
        )
    return lost


@pytest.mark.parametrize(("noise", "mean", "worst"), [(quiet, 0.01, 0.035), (busy, 0.015, 0.065)])
def test_wrong_costs_are_put_right_within_fifty_rounds(
    noise: Callable[[random.Random], float], mean: float, worst: float
) -> None:
    lost = corrected(noise, 3)
    assert statistics.fmean(lost.values()) <= mean, lost
    assert max(lost.values()) <= worst, lost


def test_the_control_without_correction_loses_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulation sees wrong costs where rounds do not put them right."""
    monkeypatch.setattr(RoundCosts, "note", lambda *what: None)
    lost = corrected(quiet, 3)
    assert statistics.fmean(lost.values()) > 0.02, lost
    assert max(lost.values()) > 0.15, lost
