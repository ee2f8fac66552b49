"""Statistics of a load against numpy and scipy, and what small samples are not asked for."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from virtual_time import run

from gemma_mtp.measure.load import ClosedLoop, Extent, OpenLoop, Record, Reply, Send
from gemma_mtp.measure.load_runs import LevelResult, failed_share, measure_levels, ratios
from gemma_mtp.measure.load_stats import CONFIDENCE, QUANTILES, distribution, interval_ranks, summarise

DOUBT = (1 - CONFIDENCE) / 2


def record(number: int = 0, intended: float = 0.0, seconds: float = 1.0, **reply: object) -> Record:
    return Record(number, intended, intended, (intended + seconds / 2, intended + seconds), intended + seconds,
                  Reply(**{"output_tokens": 3, **reply}))  # type: ignore[arg-type]  # fmt: skip


def level(*repeats: list[Record], shape: OpenLoop | ClosedLoop = ClosedLoop(1), side: str = "") -> LevelResult:
    loads = tuple(map(tuple, repeats))
    return LevelResult(shape, side, loads, summarise(loads), tuple(summarise([load]) for load in loads))


def test_quantiles_are_numpys() -> None:
    values = np.random.default_rng(0).lognormal(size=1000)
    found = distribution(values)
    assert found.count == 1000
    assert found.mean == pytest.approx(values.mean())
    assert found.longest == values.max()
    assert {name: q.value for name, q in found.quantiles.items()} == pytest.approx(
        {f"p{100 * q:g}": np.quantile(values, q) for q in QUANTILES}
    )


@pytest.mark.parametrize("count", [1, 2, 9, 10, 19, 20, 99, 100])
def test_small_samples_show_no_quantile_that_is_little_else_than_the_longest(count: int) -> None:
    least = {"p50": 2, "p90": 10, "p95": 20, "p99": 100}
    assert list(distribution(map(float, range(count))).quantiles) == [n for n, needs in least.items() if count >= needs]


def test_nothing_to_show() -> None:
    found = distribution([None, None])
    assert (found.count, found.mean, found.longest, found.quantiles, found.at("p50")) == (0, None, None, {}, None)


@pytest.mark.parametrize("count", [2, 5, 6, 10, 36, 100, 368, 369, 2000])
@pytest.mark.parametrize("q", QUANTILES)
def test_intervals_are_the_shortest_that_the_binomial_law_allows(count: int, q: float) -> None:
    """The value at index i lies above the quantile with chance P(B <= i), below it with 1 - P(B <= i)."""
    low, high = interval_ranks(count, q)
    at_most = stats.binom(count, q).cdf
    if low is None:
        assert at_most(0) > DOUBT
    else:
        assert at_most(low) <= DOUBT < at_most(low + 1)
    if high is None:
        assert at_most(count - 1) < 1 - DOUBT
    else:
        assert at_most(high) >= 1 - DOUBT > at_most(high - 1)


def test_intervals_hold_the_quantile_as_often_as_they_say_and_shorter_ones_do_not() -> None:
    """4000 samples of 60: the share of misses is at most 5%, three standard deviations of 0.34% allowed."""
    q, samples = 0.9, np.sort(np.random.default_rng(1).exponential(size=(4000, 60)), axis=1)
    truth = -np.log(1 - q)
    low, high = interval_ranks(60, q)
    assert low is not None and high is not None
    missed = np.mean((samples[:, low] > truth) | (samples[:, high] < truth))
    assert missed < 0.05 + 3 * 0.0034
    shorter = np.mean((samples[:, low + 2] > truth) | (samples[:, high - 2] < truth))
    assert shorter > 0.05 + 3 * 0.0034


def test_dependent_values_have_no_interval() -> None:
    found = distribution(map(float, range(1000)), independent=False).quantiles["p50"]
    assert (found.value, found.low, found.high) == (499.5, None, None)


def test_a_summary_counts_failures_by_kind_and_leaves_them_out_of_latencies() -> None:
    records = [record(i, float(i), 1.0, prompt_tokens=7, cached_tokens=2, accepted_drafts=3, rejected_drafts=1)
               for i in range(4)]  # fmt: skip
    records += [record(4, 4.0, 99.0, error="timeout"), record(5, 5.0, error="timeout"), record(6, error="http 500"),
                record(7, error="http 429", retry_after=2.0), record(8, error="http 429", retry_after=4.0),
                record(9, error="http 429")]  # fmt: skip
    summary = summarise([records])
    assert (summary.requests, summary.completed, summary.refused, summary.failed) == (10, 4, 2, 4)
    assert summary.errors == {"timeout": 2, "http 500": 1, "http 429": 1}
    assert summary.mean_retry_after == 3.0
    assert summary.seconds == 103.0
    assert summary.output_tokens_per_second == pytest.approx(12 / 103)
    assert summary.requests_per_second == pytest.approx(4 / 103)
    assert (summary.prompt_tokens, summary.cached_tokens, summary.output_tokens) == (28, 8, 12)
    assert summary.acceptance == 0.75
    assert (summary.end_to_end.count, summary.end_to_end.longest) == (4, 1.0)
    assert summary.time_to_first_token.at("p50") == 0.5
    assert summary.time_per_output_token.at("p50") == 0.25
    assert (summary.chunk_gap.count, summary.send_delay.count) == (4, 10)
    assert summary.to_dict()["acceptance"] == 0.75
    assert summarise([[record()]]).acceptance is None


def test_loads_of_several_repetitions_add_up_their_seconds() -> None:
    summary = summarise([[record(0, 0.0, 2.0)], [record(0, 1.0, 4.0)]])
    assert (summary.seconds, summary.output_tokens_per_second) == (6.0, 1.0)


def test_ratios_are_medians_over_the_repetitions() -> None:
    before = level(*([record(i, 0.0, 2.0) for i in range(4)] for _ in range(3)))
    after = level(*([record(i, 0.0, seconds) for i in range(4)] for seconds in (1.0, 0.5, 8.0)))
    found = ratios(before, after)
    assert (found["end_to_end"].median, found["end_to_end"].least, found["end_to_end"].greatest) == (0.5, 0.25, 4.0)
    assert found["output_tokens_per_second"].median == 2.0
    lone = level([record()])
    only = ratios(lone, lone)["requests_per_second"]
    assert (only.median, only.least, only.greatest, str(only)) == (1.0, None, None, "1.00x")
    assert str(found["end_to_end"]) == "0.50x (0.25 to 4.00)"
    assert set(ratios(lone, lone)) == {"requests_per_second", "output_tokens_per_second"}


def test_the_failed_share_leaves_refusals_out_unless_nothing_was_completed() -> None:
    refused = record(error="http 429", retry_after=1.0)
    assert failed_share([level([record(), refused]), level([record(error="timeout"), record()])]) == 0.25
    assert failed_share([level([refused])]) == 1.0


def test_sides_take_turns_and_get_the_same_arrivals() -> None:
    order: list[tuple[str, int]] = []

    def side(name: str):  # type: ignore[no-untyped-def]
        def begun(number: int) -> Send:
            order.append((name, number))

            async def send(_: int) -> Reply:
                return Reply(output_tokens=2)

            return send

        return begun

    shapes: list[OpenLoop | ClosedLoop] = [OpenLoop(1.0), ClosedLoop(2)]
    results = run(measure_levels(shapes, {"a": side("a"), "b": side("b")}, Extent(5), repeats=2))
    assert order[:4] == [("a", 0), ("b", 1), ("b", 2), ("a", 3)] and len(order) == 8
    assert [result.label for result in results] == ["1/s, a", "1/s, b", "2 clients, a", "2 clients, b"]
    first, second = ([[r.intended for r in load] for load in result.loads] for result in results[:2])
    assert first == second and first[0] != first[1]
