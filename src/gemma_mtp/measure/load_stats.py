"""What a load's records add up to: throughput, failures by kind, and latencies with the care small samples need."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from gemma_mtp.measure.load import Record

QUANTILES = (0.5, 0.9, 0.95, 0.99)
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Quantile:
    """An estimate and its distribution-free 95% interval, whose ends are None where the sample is too small for them.

    The interval takes the values to be independent; those of neighbouring requests in a queue are less so.
    """

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Distribution:
    """Of `count` values, in seconds. `quantiles` lacks those that lie beyond what the sample can show."""

    count: int
    mean: float | None
    longest: float | None
    quantiles: dict[str, Quantile]

    def at(self, name: str) -> float | None:
        return self.quantiles[name].value if name in self.quantiles else None


def distribution(values: Iterable[float | None], independent: bool = True) -> Distribution:
    """Of the values that are not None; without intervals where they are not `independent`."""
    ordered = np.sort([value for value in values if value is not None])
    found = {f"p{q * 100:g}": quantile(ordered, q, independent) for q in QUANTILES}
    return Distribution(
        count=len(ordered),
        mean=float(ordered.mean()) if len(ordered) else None,
        longest=float(ordered[-1]) if len(ordered) else None,
        quantiles={name: value for name, value in found.items() if value is not None},
    )


def quantile(ordered: np.ndarray[Any, Any], q: float, independent: bool = True) -> Quantile | None:
    """Of ascending values, interpolated linearly; None where less than one of them is expected beyond it.

    So p99 needs 100 values, p95 20 and p90 10: of fewer, it would be little else than the longest.
    """
    count = len(ordered)
    if count * (1 - q) < 1 - 1e-9:
        return None
    low, high = interval_ranks(count, q) if independent else (None, None)
    return Quantile(
        float(np.quantile(ordered, q)),
        None if low is None else float(ordered[low]),
        None if high is None else float(ordered[high]),
    )


def interval_ranks(count: int, q: float) -> tuple[int | None, int | None]:
    """Indices, in an ordered sample, between which the q-quantile lies with at least `CONFIDENCE`.

    How many values fall below a quantile is binomial, whatever the distribution. The closest index with at most half of
    the doubt on its own side; None where even the first or last value leaves more.
    """
    n = np.arange(count + 1)
    log_choose = np.concatenate([[0.0], np.cumsum(np.log(n[:0:-1]) - np.log(n[1:]))])
    at_most = np.cumsum(np.exp(log_choose + n * math.log(q) + (count - n) * math.log1p(-q)))
    doubt = (1 - CONFIDENCE) / 2
    low = int(np.searchsorted(at_most, doubt, side="right")) - 1
    high = int(np.searchsorted(at_most, 1 - doubt, side="left"))
    return low if low >= 0 else None, high if high < count else None


@dataclass(frozen=True)
class LoadSummary:
    """One load, or several like it. Latencies are of completed requests, counted from when each was due.

    refused         429 with Retry-After; not among `failed`
    errors          failed requests by kind
    seconds         from a load's first request's due time to its last one's end
    chunk_gap       between chunks of one answer, over all answers; these are no independent values
    send_delay      from due to sent
    """

    requests: int
    completed: int
    refused: int
    failed: int
    errors: dict[str, int]
    mean_retry_after: float | None
    seconds: float
    requests_per_second: float
    output_tokens_per_second: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    accepted_drafts: int
    rejected_drafts: int
    time_to_first_token: Distribution
    time_per_output_token: Distribution
    chunk_gap: Distribution
    end_to_end: Distribution
    send_delay: Distribution

    @property
    def acceptance(self) -> float | None:
        """Share of drafts that were accepted; None where none was made."""
        drafts = self.accepted_drafts + self.rejected_drafts
        return self.accepted_drafts / drafts if drafts else None

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "acceptance": self.acceptance}


def summarise(loads: Sequence[Sequence[Record]]) -> LoadSummary:
    """Of the records of one load or of several like it, one after the other; at least one record each."""
    records = [record for load in loads for record in load]
    completed = [record for record in records if record.completed]
    refused = [record for record in records if record.refused]
    errors = Counter(r.reply.error for r in records if r.reply.error is not None and not r.refused)
    replies = [record.reply for record in completed]
    seconds = sum(max(r.done for r in load) - min(r.intended for r in load) for load in loads)
    tokens = sum(reply.output_tokens for reply in replies)
    return LoadSummary(
        requests=len(records),
        completed=len(completed),
        refused=len(refused),
        failed=errors.total(),
        errors=dict(errors.most_common()),
        mean_retry_after=statistics.fmean(r.reply.retry_after or 0.0 for r in refused) if refused else None,
        seconds=seconds,
        requests_per_second=len(completed) / seconds if seconds else 0.0,
        output_tokens_per_second=tokens / seconds if seconds else 0.0,
        prompt_tokens=sum(reply.prompt_tokens for reply in replies),
        cached_tokens=sum(reply.cached_tokens for reply in replies),
        output_tokens=tokens,
        accepted_drafts=sum(reply.accepted_drafts for reply in replies),
        rejected_drafts=sum(reply.rejected_drafts for reply in replies),
        time_to_first_token=distribution(r.time_to_first_token for r in completed),
        time_per_output_token=distribution(r.time_per_output_token for r in completed),
        chunk_gap=distribution((gap for r in completed for gap in r.chunk_gaps), independent=False),
        end_to_end=distribution(r.end_to_end for r in completed),
        send_delay=distribution(r.send_delay for r in records),
    )
