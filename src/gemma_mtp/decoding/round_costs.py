"""What a round with 0, 1, ... drafts costs: measured once, then put right by every round that is played.

A round takes `drafting + verify[drafts]` seconds. Drafting is `first + (drafts - 1) * step`: the first draft begins a
call, and finds the processor's caches full of the target. The first draft, a further step and the 17 verify costs are
believed to be what was measured, times a factor near 1. Factors of neighbouring lengths err alike, because what
disturbs a measurement lasts for some rounds. A Kalman filter over the logarithms of the 19 factors takes in the rounds.

A machine's other work makes all rounds slower, from one round to the next or for minutes, and says nothing about the
factors. So a round is compared with the rounds just before and after it: their median says how slow the machine was.
Rounds of one length in a row teach nothing but how far single ones are off, and one round that was held up is no news
about the others. What more rows cost does change while a machine's memory is shared, so what was learnt long ago is
forgotten.
"""

from __future__ import annotations

import bisect
import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

#: most drafts of a round that are considered
LONGEST = 16
#: rows before the rounds that are measured
CONTEXT_ROWS = 32
#: indexes behind the verify factors of 0 to LONGEST drafts
FIRST, STEP = LONGEST + 1, LONGEST + 2
#: how far measured costs may be off, as standard deviations of factors: of the first draft and further ones alike; of
#: either alone; of what more rows add, all alike; of neighbouring lengths (over about so many doublings of the number
#: of rows); of each length alone
DRAFTING_ERROR, STEP_ERROR, SLOPE_ERROR, ROWS_ERROR, ROWS_DOUBLINGS, LENGTH_ERROR = 0.35, 0.2, 0.35, 0.15, 1.5, 0.05
#: rounds after which as little is known of lengths that are not played as at the start
FORGOTTEN_ROUNDS = 800
#: rounds before and after one that it is compared with
BEFORE, AFTER = 4, 1
#: how far single rounds are off, at the start, and the least that is ever believed; how fast it is learnt
NOISE, LEAST_NOISE, NOISE_RATE = 0.2, 0.02, 0.08
#: share of what is normally distributed that is further off than one standard deviation
BEYOND_ONE = 0.32
#: a round further off than so many standard deviations counts as this far
SURPRISES = 1.5
#: rounds that are noted before they are taken into account, at most
MOST_NOTED = 16

Vector = NDArray[np.float64]


class RoundCosts:
    """What a round with 0, 1, ... drafts costs on this machine: `seconds`, whose ratios are kept up to date.

    Nothing depends on more than their ratios.
    """

    def __init__(self, measured: Mapping[int, float], drafting: Mapping[int, float] | None = None) -> None:
        """From some lengths' seconds, and how many of them drafting took; others follow on straight lines, the last one
        going on.

        Verifying more rows never costs less: where it was measured to, the measurement was disturbed.
        """
        known = sorted(measured)
        assert known and known[0] == 0
        first, step = _drafting_line(measured, drafting or {})
        verify = [measured[k] - (first + (k - 1) * step if k else 0.0) for k in known]
        verify = _rising(_without_outliers(verify))
        parts = [_interpolated(known, verify, k) for k in range(LONGEST + 1)] + [first, step]
        self._measured = np.array(parts)
        self._logs = np.zeros(STEP + 1)  # of the factors
        self._prior = _prior_errors(parts)
        self._errors = self._prior.copy()
        self._noise = NOISE
        self._noted: list[tuple[int, float, float | None]] = []  # the newest rounds
        self._taken = 0  # how many of them are taken into account
        self._believe()

    @property
    def seconds(self) -> list[float]:
        """Of rounds with 0 to LONGEST drafts, as fast as the machine was when they were measured, by all that was
        noted but the last round."""
        self._take_in()
        return self._seconds

    @property
    def drafting(self) -> list[float]:
        """What drafting takes of the seconds."""
        self._take_in()
        return [self._drafting(drafts) for drafts in range(LONGEST + 1)]

    def note(self, drafts: int, seconds: float, drafting: float | None = None) -> None:
        """Note a played round. `drafting`: how many of its seconds its drafts took, where that is known.

        It is taken into account when the costs are asked for and the round after it is known: between rounds, where
        caches are cold, the same work takes several times as long.
        """
        self._noted.append((drafts, seconds, drafting))
        if len(self._noted) - self._taken >= MOST_NOTED:
            self._take_in()

    def least_seconds(self, beside: int, errors: float) -> list[float]:
        """The seconds as low as they may well be, beside those of the length `beside`: by so many standard deviations
        of what is believed of the two together."""
        seconds = np.array(self.seconds)
        shares = np.array([self._shares(drafts) for drafts in range(LONGEST + 1)])
        shares -= shares[beside].copy()
        doubt = np.sqrt(np.maximum(0.0, ((shares @ self._errors) * shares).sum(axis=1)))
        return list((seconds * np.exp(-errors * doubt)).tolist())

    def loss(self, drafts: int) -> float:
        """What a round of which no draft is accepted takes longer than a plain one, in plain rounds, as it was believed
        when the costs were last asked for."""
        return self._seconds[drafts] / self._seconds[0] - 1

    def _drafting(self, drafts: int) -> float:
        return self._parts[FIRST] + (drafts - 1) * self._parts[STEP] if drafts else 0.0

    def _believe(self) -> None:
        """Work out the seconds that follow from the factors."""
        self._parts: list[float] = (self._measured * np.exp(self._logs)).tolist()
        self._seconds = [self._parts[drafts] + self._drafting(drafts) for drafts in range(LONGEST + 1)]
        self._known_shares: dict[int, Vector] = {}

    def _shares(self, drafts: int) -> Vector:
        """Returns how much of a round's seconds each factor's part is."""
        if drafts not in self._known_shares:
            shares = np.zeros(STEP + 1)
            shares[drafts] = self._parts[drafts]
            if drafts:
                shares[FIRST], shares[STEP] = self._parts[FIRST], (drafts - 1) * self._parts[STEP]
            self._known_shares[drafts] = shares / self._seconds[drafts]
        return self._known_shares[drafts]

    def _take_in(self) -> None:
        """Learn from the rounds of which the next one is known."""
        until = len(self._noted) - AFTER
        if until <= self._taken:
            return
        self._errors += (until - self._taken) / FORGOTTEN_ROUNDS * self._prior
        for i in range(self._taken, until):
            self._learn(i)
        dropped = max(0, until - BEFORE)
        del self._noted[:dropped]
        self._taken = until - dropped

    def _learn(self, i: int) -> None:
        """Compare a noted round with those around it."""
        drafts, seconds, drafting = self._noted[i]
        around = self._noted[max(0, i - BEFORE) : i] + self._noted[i + 1 : i + 1 + AFTER]
        load = statistics.median([took / self._seconds[of_one] for of_one, took, _ in around])
        noise = 1 + math.pi / 2 / len(around)  # of the round and of the median
        total = seconds / (load * self._seconds[drafts])
        if all(of_one == drafts for of_one, _, _ in around):
            self._learn_noise(math.log(total), math.sqrt(noise) * self._noise)
            return
        theirs = sum([self._shares(of_one) for of_one, _, _ in around]) / len(around)
        of_drafts, verify = self._drafting(drafts), self._parts[drafts]
        if drafting is None or not of_drafts or not 0 < drafting < seconds:
            self._take(total, self._shares(drafts) - theirs, noise)
        else:
            part = np.zeros(STEP + 1)
            part[FIRST] = self._parts[FIRST] / of_drafts
            part[STEP] = 1 - part[FIRST]
            self._take(drafting / (load * of_drafts), part - theirs, noise)
            part = np.zeros(STEP + 1)
            part[drafts] = 1.0
            self._take((seconds - drafting) / (load * verify), part - theirs, noise)
        self._believe()

    def _take(self, ratio: float, weights: Vector, noise: float) -> None:
        """One observation: `ratio` of what was seen to what is believed. `weights`: how much each factor's logarithm
        counts in it. `noise`: the variance of its noise to that of a single round's."""
        spread = self._errors @ weights
        variance = max(0.0, float(spread @ weights)) + noise * self._noise**2
        deviation, surprise = math.sqrt(variance), math.log(ratio)
        self._learn_noise(surprise, deviation)
        limit = SURPRISES * deviation
        gains = spread / variance
        self._logs += gains * max(-limit, min(limit, surprise))
        self._errors -= gains[:, None] * spread

    def _learn_noise(self, surprise: float, deviation: float) -> None:
        """By how often it is exceeded, not by how far: some rounds are held up for many times as long as they take."""
        change = NOISE_RATE * ((abs(surprise) > deviation) - BEYOND_ONE)
        self._noise = min(1.0, max(LEAST_NOISE, self._noise * math.exp(change)))


def _prior_errors(measured: Sequence[float]) -> NDArray[np.float64]:
    """Covariances of the logarithms of the factors before the first round."""
    errors = [[0.0] * (STEP + 1) for _ in range(STEP + 1)]
    doublings = [math.log2(k + 1) for k in range(LONGEST + 1)]
    added = [1 - measured[0] / measured[k] for k in range(LONGEST + 1)]
    for i in range(LONGEST + 1):
        for j in range(LONGEST + 1):
            near = math.exp(-(((doublings[i] - doublings[j]) / ROWS_DOUBLINGS) ** 2) / 2)
            errors[i][j] = SLOPE_ERROR**2 * added[i] * added[j] + ROWS_ERROR**2 * near
        errors[i][i] += LENGTH_ERROR**2
    for i in (FIRST, STEP):
        errors[i][FIRST] = errors[i][STEP] = DRAFTING_ERROR**2
        errors[i][i] += STEP_ERROR**2
    return np.array(errors)


def _drafting_line(measured: Mapping[int, float], drafting: Mapping[int, float]) -> tuple[float, float]:
    """Returns the seconds of a round's first draft and of each further one, whatever the clock said of either.

    The shortest round says what the first takes, and the longest how many seconds the further ones add to it.
    """
    known = sorted(k for k in drafting if k)
    if not known:
        return 0.0, 0.0
    shortest, longest = known[0], known[-1]
    step = (drafting[longest] - drafting[shortest]) / (longest - shortest) if longest > shortest else drafting[longest]
    step = min(max(0.0, step), *(drafting[k] / k for k in known))
    first = drafting[shortest] - (shortest - 1) * step
    share = min([1.0, *(0.9 * measured[k] / (first + (k - 1) * step) for k in measured if k and first + step > 0)])
    return share * first, share * step


def _without_outliers(values: Sequence[float]) -> list[float]:
    """Each value or, where its two neighbours lie on one side of it, the nearer of them: the median of the three.

    Values that rise stay as they are.
    """
    inner = [sorted(values[i - 1 : i + 2])[1] for i in range(1, len(values) - 1)]
    return [*values[:1], *inner, *(values[-1:] if len(values) > 1 else ())]


def _rising(values: Sequence[float]) -> list[float]:
    """What is nearest to the values and never falls: neighbours in the wrong order are averaged."""
    pools: list[tuple[float, int]] = []
    for value in values:
        pool = (value, 1)
        while pools and pools[-1][0] >= pool[0]:
            (mean, n), (other, m) = pools.pop(), pool
            pool = ((mean * n + other * m) / (n + m), n + m)
        pools.append(pool)
    return [mean for mean, n in pools for _ in range(n)]


def _interpolated(known: Sequence[int], values: Sequence[float], k: int) -> float:
    """The value at k of the line through the two known points beside it, or through the last two."""
    if len(known) == 1:
        return values[0]
    right = min(max(1, bisect.bisect_left(known, k)), len(known) - 1)
    low, high = known[right - 1], known[right]
    return values[right - 1] + (values[right] - values[right - 1]) * (k - low) / (high - low)
