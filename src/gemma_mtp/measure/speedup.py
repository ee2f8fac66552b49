"""What drafting gains: predicted from acceptance and measured round costs, and measured by decoding both ways."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gemma_mtp.cpu_clock import CpuClock
from gemma_mtp.decoding.draft_length import expected_tokens
from gemma_mtp.decoding.params import ChoiceKind, SamplingParams
from gemma_mtp.decoding.round_costs import RoundCosts
from gemma_mtp.decoding.verify import Verification
from gemma_mtp.engine.costs import MOST_ELSEWHERE, measure_costs
from gemma_mtp.engine.pair import Pair
from gemma_mtp.measure.acceptance import GREEDY, Acceptance, AcceptanceReport, OnPrompt, Prompt, nobody

#: drafts a round that are looked at beyond the measured ones
LONGEST_PREDICTED = 8
#: how often costs are measured at most, while other work disturbs them
ATTEMPTS = 3
#: draws of prompts for an interval
INTERVAL_RESAMPLES = 400


@dataclass(frozen=True)
class Prediction:
    """What rounds of `draft_tokens` drafts should give on this machine.

    `cost` is a round's time over that of plain decoding's step, and so the mean acceptance length at which drafting
    breaks even; `expected_length` is the mean acceptance length by the measured acceptance; `speedup` their quotient.
    Where `extrapolated`, positions beyond the measured ones were taken to be as good as the last of them.
    """

    draft_tokens: int
    cost: float
    expected_length: float
    speedup: float
    extrapolated: bool


def predict(acceptance: Acceptance, costs: RoundCosts) -> list[Prediction]:
    """For 0 (plain decoding) to 8 drafts a round, or to as many as were measured where those are more.

    (1 + a_1 + a_1 a_2 + ... ) / (round's cost), as `decoding.draft_length` weighs it. `costs` are to be those of rounds
    that choose as the measured ones did (`Pair.round_costs`).
    """
    longest = min(len(costs.seconds) - 1, max(LONGEST_PREDICTED, acceptance.draft_tokens))
    chances = acceptance.by_position
    chances += chances[-1:] * (longest - len(chances))
    predictions = []
    for k in range(longest + 1):
        cost, length = costs.seconds[k] / costs.seconds[0], expected_tokens(chances[:k])
        predictions.append(Prediction(k, cost, length, length / cost, k > acceptance.draft_tokens))
    return predictions


def best(predictions: Sequence[Prediction]) -> Prediction:
    """The fastest; the fewer drafts at a tie."""
    return max(predictions, key=lambda p: (p.speedup, -p.draft_tokens))


def break_even(predictions: Sequence[Prediction]) -> int:
    """The most drafts a round that are not slower than plain decoding; 0 where none pays."""
    return max(p.draft_tokens for p in predictions if p.speedup >= 1)


@dataclass(frozen=True)
class SteadyCosts:
    """Round costs for a report: `best` of several measurements, which other work disturbed least, and all of them.

    `busy`: the share of the processor that other work took meanwhile, at the quietest attempt; 0 where nobody tells.
    """

    best: RoundCosts
    measured: tuple[RoundCosts, ...]
    busy: float = 0.0

    @property
    def disturbed(self) -> bool:
        """Whether other work was such that nothing is to be concluded from them."""
        return self.busy > MOST_ELSEWHERE

    def relative(self, drafts: int) -> tuple[float, float]:
        """The least and the most that a round of so many drafts cost in plain rounds, of all measurements."""
        costs = [costs.seconds[drafts] / costs.seconds[0] for costs in self.measured]
        return min(costs), max(costs)


def steady_costs(pair: Pair, choice: ChoiceKind, repeats: int = 5) -> SteadyCosts:
    """Measures what rounds cost, and again, up to `ATTEMPTS` times, while the machine is busy with other things.

    `choice`: of rounds that choose so (`SamplingParams.choice`).
    """
    assert pair.drafter is not None
    attempts: list[SteadyCosts] = []
    for _ in range(ATTEMPTS):
        clock = CpuClock([os.getpid()])
        measured = tuple(measure_costs(pair.backend, choice) for _ in range(repeats))
        best = min(measured, key=lambda costs: sum(costs.seconds))
        attempts.append(SteadyCosts(best, measured, clock.share_elsewhere() or 0.0))
        if not attempts[-1].disturbed:
            break
    return min(attempts, key=lambda attempt: attempt.busy)


@dataclass(frozen=True)
class Interval:
    """Bounds of a predicted speed-up."""

    low: float
    high: float

    @property
    def sure(self) -> bool:
        """Whether drafting pays, or does not, wherever in it the truth lies."""
        return self.low >= 1 or self.high < 1


def speedup_intervals(report: AcceptanceReport, costs: SteadyCosts) -> list[Interval]:
    """Bounds of each prediction of `predict`: acceptance by the 95% bootstrap over prompts, costs by the least and the
    most that was measured. Both ends at once, so they are rather wide."""
    histograms = np.array([prompt.acceptance.histogram for prompt in report.prompts])
    n = len(histograms)
    draws = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=INTERVAL_RESAMPLES)
    pooled = [Acceptance(tuple(map(int, histogram))) for histogram in draws @ histograms]
    lengths = np.array([[p.expected_length for p in predict(drawn, costs.best)] for drawn in pooled])
    intervals = []
    for k, (low, high) in enumerate(zip(*np.percentile(lengths, [2.5, 97.5], axis=0), strict=True)):
        least, most = costs.relative(k)
        intervals.append(Interval(float(low) / most, float(high) / least))
    return intervals


@dataclass(frozen=True)
class MeasuredSpeedup:
    """Decode speeds in tokens/s, the median over `repeats` passes through the prompts, and their quotient. `busy`: the
    share of the processor that other work took meanwhile; 0 where nobody tells."""

    plain_tokens_per_second: float
    drafted_tokens_per_second: float
    repeats: int
    busy: float = 0.0

    @property
    def ratio(self) -> float:
        return self.drafted_tokens_per_second / self.plain_tokens_per_second if self.plain_tokens_per_second else 0.0

    @property
    def disturbed(self) -> bool:
        """Whether other work was such that the speeds say little."""
        return self.busy > MOST_ELSEWHERE

    def __str__(self) -> str:
        speeds = f"{self.drafted_tokens_per_second:.0f} against {self.plain_tokens_per_second:.0f} tokens/s"
        text = f"{self.ratio:.2f}x ({speeds})"
        return f"{text}, of little worth: other work took {self.busy:.0%} of the processor" if self.disturbed else text


def measure_speedup(
    pair: Pair,
    prompts: Sequence[Prompt],
    draft_tokens: int = 4,
    params: SamplingParams = GREEDY,
    verification: Verification = "exact",
    repeats: int = 3,
    on_prompt: OnPrompt = nobody,
) -> MeasuredSpeedup:
    """Decode every prompt plainly and drafted, one after the other, so that both sides meet the same machine.

    `on_prompt` is told of the prompts of every repeat.
    """
    sides = (0, draft_tokens)
    for k in sides:  # the first generation of a process allocates and is slow
        pair.generate(prompts[0].content, params, draft_tokens=k, verification=verification)
    clock, speeds = CpuClock([os.getpid()]), dict[int, list[float]]({k: [] for k in sides})
    for repeat in range(repeats):
        tokens, seconds = dict.fromkeys(sides, 0), dict.fromkeys(sides, 0.0)
        for i, prompt in enumerate(prompts):
            for k in sides if i % 2 else reversed(sides):
                result = pair.generate(prompt.content, params, draft_tokens=k, verification=verification)
                tokens[k] += sum(round_.committed for round_ in result.decode_rounds)
                seconds[k] += result.decode_seconds
            on_prompt(repeat * len(prompts) + i + 1, repeats * len(prompts))
        for k in sides:
            speeds[k].append(tokens[k] / seconds[k] if seconds[k] else 0.0)
    plain, drafted = (statistics.median(speeds[k]) for k in sides)
    return MeasuredSpeedup(plain, drafted, repeats, clock.share_elsewhere() or 0.0)
