"""The gate: a drafter is measured in the engine on held-out prompts, against the one that training started from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from gemma_mtp.checkpoint import load_drafter
from gemma_mtp.decoding.params import SamplingParams
from gemma_mtp.engine.pair import Pair
from gemma_mtp.measure.acceptance import (
    AcceptanceReport,
    Comparison,
    OnPrompt,
    Prompt,
    compare,
    measure_acceptance,
    nobody,
)
from gemma_mtp.measure.speedup import MeasuredSpeedup, best, measure_speedup, predict
from gemma_mtp.weight_types import WeightTypes

#: prompts whose decoding is timed, plain and drafted
TIMED_PROMPTS = 4

#: one report for each temperature
Reports = tuple[AcceptanceReport, ...]


@dataclass(frozen=True)
class Speed:
    """Speed-up over plain decoding: predicted for the best draft length, measured at the gate's. What was measured on a
    busy machine is said to be, and nothing is predicted there."""

    predicted: float
    measured: MeasuredSpeedup

    def __str__(self) -> str:
        predicted = "" if self.measured.disturbed else f"predicted {self.predicted:.2f}x, "
        return f"{predicted}measured {self.measured}"


@dataclass(frozen=True)
class EngineGate:
    """What is measured: `prompts` gone on from for `max_tokens` tokens, at each of `temperatures`. Of `weight_types`,
    those of the drafter's parts say how it is quantised while loading."""

    pair: Pair
    prompts: Sequence[Prompt]
    temperatures: tuple[float, ...]
    draft_tokens: int
    max_tokens: int
    top_k: int = 0
    top_p: float = 1.0
    weight_types: WeightTypes = field(default_factory=WeightTypes)

    def with_drafter(self, directory: Path) -> Pair:
        """The pair with the drafter of a checkpoint directory, ready to decode."""
        table = self.pair.target.embed_tokens
        drafter = load_drafter(directory, table.dtype, table.device, self.weight_types.of_drafter())
        return self.pair.with_drafter(drafter)

    def measure(self, directory: Path, on_prompt: OnPrompt = nobody) -> Reports:
        """Acceptance of the drafter in `directory`, at each temperature. `on_prompt` is told of all temperatures'
        prompts."""
        pair = self.with_drafter(directory)

        def tell(before: int, done: int, of: int) -> None:
            on_prompt(before * of + done, len(self.temperatures) * of)

        return tuple(
            measure_acceptance(pair, self.prompts, self.draft_tokens, self._params(t), on_prompt=partial(tell, i))
            for i, t in enumerate(self.temperatures)
        )

    def speed(self, directory: Path, reports: Reports, on_prompt: OnPrompt = nobody) -> Speed:
        """What the drafter in `directory`, with these reports, gains; greedy."""
        pair = self.with_drafter(directory)
        predicted = best(predict(reports[0].pooled, pair.round_costs())).speedup
        params = replace(self._params(0.0), max_tokens=self.max_tokens)
        measured = measure_speedup(pair, self.prompts[:TIMED_PROMPTS], self.draft_tokens, params, repeats=1,
                                   on_prompt=on_prompt)  # fmt: skip
        return Speed(predicted, measured)

    def _params(self, temperature: float) -> SamplingParams:
        return SamplingParams(temperature=temperature, top_k=self.top_k, top_p=self.top_p, max_tokens=self.max_tokens,
                              ignore_eos=True)  # fmt: skip


def setting(report: AcceptanceReport) -> str:
    """A report's temperature, in words."""
    temperature = report.params.temperature
    return f"temperature {temperature:g}" if temperature else "greedy"


def pooled(reports: Reports) -> AcceptanceReport:
    """All temperatures' rounds as one report, prompt by prompt."""
    first = reports[0]
    prompts = tuple(
        replace(p, acceptance=sum((r.prompts[i].acceptance for r in reports[1:]), p.acceptance))
        for i, p in enumerate(first.prompts)
    )
    return AcceptanceReport(first.draft_tokens, first.params, first.verification, prompts)


def mean_length(reports: Reports) -> float:
    """Mean acceptance length over all temperatures' rounds."""
    return pooled(reports).pooled.mean_length


@dataclass(frozen=True)
class Verdict:
    """How a drafter compares with the start: over all temperatures, and at each."""

    overall: Comparison
    at_temperature: tuple[tuple[float, Comparison], ...]

    @property
    def not_worse(self) -> bool:
        """No shorter on average, and at no temperature shorter beyond the measurement's uncertainty."""
        return self.overall.difference >= 0 and all(c.high >= 0 for _, c in self.at_temperature)

    def lines(self) -> list[str]:
        """For people to read."""
        each = [f"  temperature {temperature:g}: {comparison}" for temperature, comparison in self.at_temperature]
        return [str(self.overall), *each]


def judge(start: Reports, now: Reports) -> Verdict:
    """Compare two measurements of the same prompts."""
    each = [(a.params.temperature, compare(a, b)) for a, b in zip(start, now, strict=True)]
    return Verdict(compare(pooled(start), pooled(now)), tuple(each))
