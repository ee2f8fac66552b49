"""Loads on a clock that the test turns: arrivals, who is charged for a stall, warm-up, and where a load ends."""

from __future__ import annotations

import asyncio
from itertools import islice, pairwise

import numpy as np
import pytest
from scipy import stats
from virtual_time import run

from gemma_mtp.measure.load import ClosedLoop, Extent, OpenLoop, Record, Reply, Send, Shape, run_load
from gemma_mtp.measure.load_stats import summarise

#: chance at which a true exponential sample would be called none
FALSE_ALARM = 1e-3


def gaps(shape: OpenLoop, seed: int = 0, count: int = 2000) -> list[float]:
    return [later - earlier for earlier, later in pairwise([0.0, *islice(shape.times(seed), count)])]


def played(shape: Shape, send: Send, extent: Extent, **rest: int | None) -> list[Record]:
    return run(run_load(shape, send, extent, **rest))  # type: ignore[arg-type]


async def at_once(number: int) -> Reply:
    return Reply()


def after(seconds: float) -> Send:
    async def send(number: int) -> Reply:
        await asyncio.sleep(seconds)
        return Reply((asyncio.get_running_loop().time(),), output_tokens=1)

    return send


class OneAtATime:
    """A server that answers in the order of arrival, `seconds` each, and stalls once."""

    def __init__(self, seconds: float, stalls_at: int, stall: float) -> None:
        self.seconds, self.stalls_at, self.stall = seconds, stalls_at, stall
        self.turn = asyncio.Lock()

    async def __call__(self, number: int) -> Reply:
        async with self.turn:
            await asyncio.sleep(self.seconds + (self.stall if number == self.stalls_at else 0.0))
        return Reply((asyncio.get_running_loop().time(),), output_tokens=1)


def test_poisson_arrivals_have_exponential_gaps_of_the_rate() -> None:
    for rate in (0.5, 20.0):
        drawn = gaps(OpenLoop(rate))
        assert stats.kstest(drawn, stats.expon(scale=1 / rate).cdf).pvalue > FALSE_ALARM
        assert abs(stats.spearmanr(drawn[:-1], drawn[1:]).statistic) < 4 / len(drawn) ** 0.5


def test_the_test_sees_what_is_not_poisson() -> None:
    exponential = stats.expon(scale=0.1).cdf
    for wrong in (gaps(OpenLoop(10.0, equal_gaps=True)), gaps(OpenLoop(13.0))):
        assert stats.kstest(wrong, exponential).pvalue < FALSE_ALARM


def test_a_seed_gives_the_same_arrivals() -> None:
    shape = OpenLoop(2.0)
    assert gaps(shape, seed=3) == gaps(shape, seed=3) != gaps(shape, seed=4)
    assert gaps(OpenLoop(4.0, equal_gaps=True), count=3) == [0.0, 0.25, 0.25]


def test_a_stall_is_charged_to_the_requests_that_came_meanwhile() -> None:
    """One request a second for 40 s, each served in 0.1 s; the tenth takes 5 s more. Those that come during the stall
    wait for its end at 14.1 s and for each other."""
    shape, extent = OpenLoop(1.0, equal_gaps=True), Extent(40)
    delayed = {9: 5.1, 10: 4.2, 11: 3.3, 12: 2.4, 13: 1.5, 14: 0.6}
    expected = [delayed.get(i, 0.1) for i in range(40)]
    for most in (None, 1):  # sent at once and queued there, or kept here until there is room
        records = played(shape, OneAtATime(0.1, 9, 5.0), extent, max_in_flight=most)
        assert [record.end_to_end for record in records] == pytest.approx(expected)
        summary = summarise([records])
        for name, q in (("p50", 0.5), ("p90", 0.9), ("p95", 0.95)):
            assert summary.end_to_end.at(name) == pytest.approx(np.quantile(expected, q))
            assert summary.time_to_first_token.at(name) == pytest.approx(np.quantile(expected, q))


def test_latencies_from_sending_would_hide_the_stall() -> None:
    """What the test above would miss if latencies counted from when requests were sent, and what a closed loop sees."""
    records = played(OpenLoop(1.0, equal_gaps=True), OneAtATime(0.1, 9, 5.0), Extent(40), max_in_flight=1)
    from_sending = [record.end_to_end - record.send_delay for record in records]
    assert sorted(from_sending) == pytest.approx([0.1] * 39 + [5.1])
    assert records[10].send_delay == pytest.approx(4.1)
    closed = played(ClosedLoop(1), OneAtATime(0.1, 9, 5.0), Extent(40))
    assert sorted(record.end_to_end for record in closed) == pytest.approx([0.1] * 39 + [5.1])


def test_open_loops_send_when_requests_are_due_however_slow_the_server() -> None:
    records = played(OpenLoop(8.0), after(100.0), Extent(50), seed=5)
    due = list(islice(OpenLoop(8.0).times(5), 50))
    assert [r.intended for r in records] == due
    assert [r.sent for r in records] == pytest.approx(due)
    assert [r.done for r in records] == pytest.approx([at + 100.0 for at in due])


def test_closed_loops_keep_every_client_busy() -> None:
    records = played(ClosedLoop(3), after(2.0), Extent(9))
    assert [r.intended for r in records] == pytest.approx([0.0] * 3 + [2.0] * 3 + [4.0] * 3)
    assert [r.number for r in records] == list(range(9))
    assert {r.send_delay for r in records} == {0.0}


@pytest.mark.parametrize("shape", [OpenLoop(10.0, equal_gaps=True), ClosedLoop(1)])
def test_warmup_requests_come_first_and_are_not_counted(shape: Shape) -> None:
    records = played(shape, after(0.1), Extent(4, warmup=3))
    assert [record.number for record in records] == [3, 4, 5, 6]
    assert records[0].intended == pytest.approx(0.3)


@pytest.mark.parametrize("shape", [OpenLoop(10.0, equal_gaps=True), ClosedLoop(1)])
def test_a_load_ends_by_requests_or_seconds_whichever_is_first(shape: Shape) -> None:
    """Sending ends 1.05 s after the first counted request was due; what is under way is waited for."""
    assert len(played(shape, after(0.1), Extent(None, 1.05))) == 11
    assert len(played(shape, after(0.1), Extent(None, 1.05, warmup=7))) == 11
    assert len(played(shape, after(0.1), Extent(5, 1.05))) == 5
    assert played(shape, after(0.1), Extent(None, 0.05))[0].done == pytest.approx(0.1)


def test_figures_of_a_record() -> None:
    reply = Reply(output_tokens=5)
    record = Record(0, 1.0, 1.5, (2.0, 2.4, 3.0), 3.25, reply)
    assert (record.send_delay, record.time_to_first_token, record.end_to_end) == (0.5, 1.0, 2.25)
    assert record.time_per_output_token == 0.25
    assert record.chunk_gaps == pytest.approx([0.4, 0.6])
    for short in (Record(0, 1.0, 1.5, (2.0,), 3.0, Reply(output_tokens=1)), Record(0, 1.0, 1.5, (), 3.0, Reply())):
        assert short.time_per_output_token is None and short.chunk_gaps == []
    assert Record(0, 1.0, 1.5, (), 3.0, Reply()).time_to_first_token is None
