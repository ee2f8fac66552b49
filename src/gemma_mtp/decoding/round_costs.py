"""What a round with 0, 1, ... drafts costs: measured once, then put right by every round that is played.

A round takes `load * (drafting + verify[drafts])` seconds. Drafting is `first + (drafts - 1) * step`: the first draft
begins a call, and finds the processor's caches full of the target. The first draft, a further step and the 17 verify
costs are believed to be what was measured, times a factor near 1. Factors of neighbouring lengths err alike, because
what disturbs a measurement lasts for some rounds. The load is what the machine's other work and a longer context do to
all rounds alike. It wanders from round to round, and says nothing about the factors. A Kalman filter over the 19
factors and the load takes in the seconds of rounds; time spent drafting is told apart where it is known.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

#: most drafts of a round that are considered
LONGEST = 16
#: rows before the rounds that are measured
CONTEXT_ROWS = 32
#: indexes behind the verify factors of 0 to LONGEST drafts
FIRST, STEP, LOAD = LONGEST + 1, LONGEST + 2, LONGEST + 3
#: how far measured costs may be off, as standard deviations of factors: of the first draft and further ones alike; of
#: either alone; of what more rows add, all alike; of neighbouring lengths (over about so many doublings of the number
#: of rows); of each length alone
DRAFTING_ERROR, STEP_ERROR, SLOPE_ERROR, ROWS_ERROR, ROWS_DOUBLINGS, LENGTH_ERROR = 0.35, 0.2, 0.35, 0.15, 1.5, 0.05
#: the same of the load at the start, and of its change from one round to the next
LOAD_ERROR, LOAD_CHANGE = 0.6, 0.1
#: how far single rounds are off, at the start, and the least that is ever believed; how fast it is learnt
NOISE, LEAST_NOISE, NOISE_WEIGHT = 0.3, 0.02, 0.1
#: a round further off than so many standard deviations counts as this far, and as no faster than a share of a guess
SURPRISES, LEAST_SHARE = 1.5, 0.1
#: gains below this are not lowered any more: costs that change slowly are followed, and most rounds cost little to note
LEAST_ROUND_GAIN = 0.01
#: of a length whose rounds say little, one in HEARD is looked at: between rounds even this little work is felt.
#: Little is less than the bound above until so many rounds were looked at, and then less than this one
HEARD, KNOWN_ROUNDS, LEAST_HEARD_GAIN = 4, 64, 0.05
#: rounds that are noted before they are taken into account, at most
MOST_NOTED = 16


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
        self._measured = [_interpolated(known, verify, k) for k in range(LONGEST + 1)] + [first, step, 1.0]
        self._factors = np.ones(LOAD + 1)
        self._errors = _prior_errors(self._measured)
        self._noise = NOISE
        self._heard = 0  # rounds that were looked at
        self._unheard = [0] * (LONGEST + 1)  # rounds of each length to leave out
        self._noted: list[tuple[int, float, float | None]] = []  # rounds that are not taken into account yet
        self._seconds = self._believed()

    @property
    def seconds(self) -> list[float]:
        """Of rounds with 0 to LONGEST drafts, at the load at which they were measured, by all that was noted."""
        if self._noted:
            self._take_in()
        return self._seconds

    def _take_in(self) -> None:
        noted, self._noted = self._noted, []
        for of_round in noted:
            self._learn(*of_round)
        self._seconds = self._believed()

    def _believed(self) -> list[float]:
        measured, factors = self._measured, self._factors.tolist()
        first, step = measured[FIRST] * factors[FIRST], measured[STEP] * factors[STEP]
        return [measured[k] * factors[k] + (first + (k - 1) * step if k else 0.0) for k in range(LONGEST + 1)]

    @property
    def drafting(self) -> list[float]:
        """What drafting takes of the seconds."""
        self._take_in()
        first, step = (self._measured[i] * float(self._factors[i]) for i in (FIRST, STEP))
        return [0.0] + [first + k * step for k in range(LONGEST)]

    def note(self, drafts: int, seconds: float, drafting: float | None = None) -> None:
        """Note a played round. `drafting`: how many of its seconds its drafts took, where that is known.

        It is taken into account when the costs are asked for, with others noted since: between rounds, where caches are
        cold, the same work takes several times as long. A busy machine or a longer context makes all rounds slower, and
        says nothing about lengths that are not played.
        """
        self._noted.append((drafts, seconds, drafting))
        if len(self._noted) == MOST_NOTED:
            self._take_in()

    def _learn(self, drafts: int, seconds: float, drafting: float | None) -> None:
        self._errors[LOAD, LOAD] += LOAD_CHANGE**2
        if self._unheard[drafts]:
            self._unheard[drafts] -= 1
            return
        verify = self._measured[drafts] * float(self._factors[drafts])
        first, step = (self._measured[i] * float(self._factors[i]) for i in (FIRST, STEP))
        parts = {FIRST: first, STEP: (drafts - 1) * step} if drafts else {}
        expected = sum(parts.values())
        if drafting is not None and expected and 0 < drafting < seconds:
            gain = self._take(drafting / expected, {LOAD: 1.0, **{i: part / expected for i, part in parts.items()}})
            gain = max(gain, self._take((seconds - drafting) / verify, {LOAD: 1.0, drafts: 1.0}))
        else:
            parts[drafts] = verify
            expected += verify
            gain = self._take(seconds / expected, {LOAD: 1.0, **{i: part / expected for i, part in parts.items()}})
        self._heard += 1
        little = LEAST_ROUND_GAIN if self._heard < KNOWN_ROUNDS else LEAST_HEARD_GAIN
        self._unheard[drafts] = HEARD - 1 if gain < little else 0

    def _take(self, ratio: float, weights: Mapping[int, float]) -> float:
        """One observation: `ratio` of what was seen to what the factors say at a load of 1. `weights`: how much each
        factor's share is in it. Returns by how much of its surprise it moved the factor that it moved most."""
        errors, factors = self._errors, self._factors
        spread = errors[LOAD] * weights[LOAD]
        for i, weight in weights.items():
            if i != LOAD:
                spread += errors[i] * weight
        variance = self._noise**2
        for i, weight in weights.items():
            variance += float(spread[i]) * weight
        limit = SURPRISES * math.sqrt(variance)
        surprise = max(-min(limit, 1 - LEAST_SHARE), min(limit, ratio / float(factors[LOAD]) - 1))
        self._noise += NOISE_WEIGHT * (max(LEAST_NOISE, 1.25 * abs(surprise)) - self._noise)
        gains = spread / variance
        self._factors = factors * (1 + gains * surprise)
        most = float(abs(gains[:LOAD]).max())
        if most < LEAST_ROUND_GAIN:
            errors[LOAD, LOAD] -= gains[LOAD] * spread[LOAD]
        else:
            errors -= gains[:, None] * spread
        return most

    def least_seconds(self, beside: int, errors: float) -> list[float]:
        """The seconds as low as they may well be, beside those of the length `beside`: by so many standard deviations
        of what is believed of the two together."""
        seconds = np.array(self.seconds)
        parts = np.zeros((LONGEST + 1, LOAD + 1))  # the share of each factor in the seconds of each length
        for k, verify in enumerate(self._measured[: LONGEST + 1]):
            parts[k, k] = verify * self._factors[k]
            if k:
                parts[k, FIRST] = self._measured[FIRST] * self._factors[FIRST]
                parts[k, STEP] = (k - 1) * self._measured[STEP] * self._factors[STEP]
        parts /= seconds[:, None]
        parts -= parts[beside].copy()
        doubt = np.sqrt(np.maximum(0.0, np.einsum("ki,ij,kj->k", parts, self._errors, parts)))
        return list((seconds * np.maximum(LEAST_SHARE, 1 - errors * doubt)).tolist())

    def loss(self, drafts: int) -> float:
        """What a round of which no draft is accepted takes longer than a plain one, in plain rounds, as it was believed
        when the costs were last asked for."""
        return self._seconds[drafts] / self._seconds[0] - 1


def _prior_errors(measured: Sequence[float]) -> NDArray[np.float64]:
    """Covariances of the factors before the first round."""
    errors = [[0.0] * (LOAD + 1) for _ in range(LOAD + 1)]
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
    errors[LOAD][LOAD] = LOAD_ERROR**2
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
