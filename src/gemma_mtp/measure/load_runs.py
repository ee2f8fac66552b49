"""A benchmark of several loads: every level on every side, in turn, and what one side gains over the other."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gemma_mtp.errors import ServerError
from gemma_mtp.measure.load import Extent, Record, Send, Shape, run_load
from gemma_mtp.measure.load_stats import LoadSummary, summarise


@dataclass(frozen=True)
class LevelResult:
    """One level's loads on one side, a repetition each."""

    shape: Shape
    side: str
    loads: tuple[tuple[Record, ...], ...]
    summary: LoadSummary
    by_repeat: tuple[LoadSummary, ...]

    @property
    def label(self) -> str:
        return f"{self.shape.label}, {self.side}" if self.side else self.shape.label

    def to_dict(self, with_records: bool) -> dict[str, Any]:
        records = [[_record(record) for record in load] for load in self.loads]
        return {
            "label": self.label,
            "shape": {"kind": type(self.shape).__name__, **asdict(self.shape)},
            "side": self.side,
            **self.summary.to_dict(),
            "repeats": [summary.to_dict() for summary in self.by_repeat],
            **({"records": records} if with_records else {}),
        }


def _record(record: Record) -> dict[str, Any]:
    times = {name: getattr(record, name) for name in ("number", "intended", "sent", "chunks", "done")}
    return {**times, **{name: value for name, value in asdict(record.reply).items() if name != "chunk_times"}}


async def measure_levels(
    shapes: Sequence[Shape],
    sides: Mapping[str, Callable[[int], Send]],
    extent: Extent,
    repeats: int = 1,
    seed: int = 0,
    max_in_flight: int | None = None,
    say: Callable[[str], object] = lambda _: None,
) -> list[LevelResult]:
    """Play every level `repeats` times on every side, which take turns and begin in turn.

    A side makes the `Send` of a run's number. The sides of a repetition get the same arrivals; another repetition gets
    others. Raises ServerError where no request was counted.
    """
    results, runs = [], 0
    for shape in shapes:
        loads: dict[str, list[tuple[Record, ...]]] = {side: [] for side in sides}
        for repeat in range(repeats):
            for side in list(sides)[:: -1 if repeat % 2 else 1]:
                say(", ".join(part for part in (shape.label, side, f"{repeat + 1} of {repeats}") if part))
                records = await run_load(shape, sides[side](runs), extent, seed + repeat, max_in_flight)
                if not records:
                    raise ServerError(f"no request was counted at {shape.label}; give a longer --duration.")
                loads[side].append(tuple(records))
                runs += 1
        results += [
            LevelResult(shape, side, tuple(own), summarise(own), tuple(summarise([load]) for load in own))
            for side, own in loads.items()
        ]
    return results


@dataclass(frozen=True)
class Ratio:
    """One figure of a side over the other's: the median of the repetitions' ratios, and their least and greatest.

    Those are None for a single repetition, which shows no spread.
    """

    median: float
    least: float | None
    greatest: float | None

    @classmethod
    def of(cls, quotients: Sequence[float]) -> Ratio:
        """Of the repetitions' ratios."""
        spread = (min(quotients), max(quotients)) if len(quotients) > 1 else (None, None)
        return cls(statistics.median(quotients), *spread)

    def __str__(self) -> str:
        spread = "" if self.least is None else f" ({self.least:.2f} to {self.greatest:.2f})"
        return f"{self.median:.2f}x{spread}"


FIGURES: dict[str, Callable[[LoadSummary], float | None]] = {
    "requests_per_second": lambda summary: summary.requests_per_second,
    "output_tokens_per_second": lambda summary: summary.output_tokens_per_second,
    "time_to_first_token": lambda summary: summary.time_to_first_token.at("p50"),
    "time_per_output_token": lambda summary: summary.time_per_output_token.at("p50"),
    "end_to_end": lambda summary: summary.end_to_end.at("p50"),
}


def ratios(before: LevelResult, after: LevelResult) -> dict[str, Ratio]:
    """Of every figure that all repetitions of both sides have: after over before; of latencies, the medians."""
    found = {}
    for name, figure in FIGURES.items():
        pairs = [(figure(a), figure(b)) for a, b in zip(after.by_repeat, before.by_repeat, strict=True)]
        quotients = [a / b for a, b in pairs if a is not None and b]
        if len(quotients) == len(pairs):
            found[name] = Ratio.of(quotients)
    return found


def failed_share(results: Sequence[LevelResult]) -> float:
    """Of all counted requests, those that failed; refusals (429 with Retry-After) are none. 1 where none completed."""
    completed = sum(result.summary.completed for result in results)
    failed = sum(result.summary.failed for result in results)
    return failed / sum(result.summary.requests for result in results) if completed else 1.0
