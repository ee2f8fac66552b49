"""What rounds cost: from few measurements, some of them disturbed, and put right by the rounds themselves."""

import itertools
import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_mtp.decoding.round_costs import LONGEST, RoundCosts

measurements = st.dictionaries(st.integers(1, LONGEST), st.floats(0.1, 9), max_size=5)


@given(measurements, st.floats(0.1, 9), st.floats(0, 0.5))
@settings(max_examples=100, derandomize=True)
def test_costs_pass_through_what_was_measured(measured: dict[int, float], none: float, step: float) -> None:
    measured = {**measured, 0: none}
    step = min([step, *(s / (2 * k) for k, s in measured.items() if k)])
    costs = RoundCosts(measured, {1: step, LONGEST: LONGEST * step}).seconds
    assert min(costs) > 0
    assert len(costs) == LONGEST + 1
    assert all(b - a >= step - 1e-9 for a, b in itertools.pairwise(costs)), "a draft is never free"
    known = sorted(measured)
    if all(measured[b] - measured[a] >= step * (b - a) for a, b in itertools.pairwise(known)) and len(known) > 1:
        assert [costs[k] for k in known] == pytest.approx([measured[k] for k in known])


def test_costs_between_measured_ones_lie_on_straight_lines() -> None:
    costs = RoundCosts({0: 1.0, 4: 2.0}).seconds
    assert (costs[2], costs[8]) == pytest.approx((1.5, 3.0))


def test_a_length_measured_wrong_is_put_right_by_playing_it() -> None:
    costs, true = RoundCosts({0: 1.0, 2: 1.2, 4: 9.0}), {0: 1.0, 2: 1.2, 4: 1.4}
    for _ in range(500):
        for k, seconds in true.items():
            costs.note(k, seconds)
    assert [costs.seconds[k] / costs.seconds[0] for k in true] == pytest.approx(list(true.values()), rel=0.02)


def test_a_machine_that_gets_slower_changes_no_ratio() -> None:
    """With plain rounds alone, and with drafts among them; a single slow round is no news."""
    costs = RoundCosts({0: 1.0, 4: 1.4})
    for slower in (1.0, 10.0, 3.0):
        for _ in range(100):
            costs.note(0, slower)
        for _ in range(100):
            costs.note(0, slower)
            costs.note(4, 1.4 * slower)
    assert costs.seconds[4] / costs.seconds[0] == pytest.approx(1.4, rel=0.05)
    costs.note(0, 1000.0)
    assert costs.seconds[4] / costs.seconds[0] == pytest.approx(1.4, rel=0.05)


@pytest.mark.parametrize("wrong", [0.3, 0.5, 3.0])
@pytest.mark.parametrize("length", range(1, LONGEST))
def test_one_disturbed_measurement_among_many_counts_for_nothing(length: int, wrong: float) -> None:
    true = {k: 1 + 0.05 * k for k in range(LONGEST + 1)}
    costs = RoundCosts({**true, length: wrong * true[length]})
    assert costs.seconds == pytest.approx(list(true.values()), rel=0.06)


def test_steps_of_the_hardware_stay() -> None:
    steps = {k: 1.0 + 0.4 * (k // 6) + 0.1 * k for k in range(LONGEST + 1)}
    assert RoundCosts(steps, {1: 0.1, 16: 1.6}).seconds == pytest.approx(list(steps.values()))


@pytest.mark.parametrize("factor", [0.5, 3.0])
@pytest.mark.parametrize("part", ["step", "verify"])
def test_what_drafting_took_puts_both_parts_right_within_fifty_rounds(factor: float, part: str) -> None:
    """To a tenth, by rounds of one length and a few plain ones, whatever the load; lengths beside them follow."""
    step = 0.1 * (factor if part == "step" else 1)
    drafting = {k: k * step for k in range(LONGEST + 1)}
    costs = RoundCosts({k: (factor if part == "verify" else 1) + drafting[k] for k in drafting}, drafting)
    for i in range(50):
        load, k = 1 + (i % 7) / 10, 0 if i % 10 == 9 else 4
        costs.note(k, load * (1 + 0.1 * k), load * 0.1 * k)
    relative = [seconds / costs.seconds[0] for seconds in costs.seconds]
    assert relative[:9] == pytest.approx([1 + 0.1 * k for k in range(9)], rel=0.1)


def test_a_first_draft_that_costs_more_is_told_from_further_ones() -> None:
    """Rounds of one draft say nothing bad of long ones, whose further drafts are cheap."""
    drafting = {k: 0.3 + 0.1 * k if k else 0.0 for k in range(LONGEST + 1)}
    costs = RoundCosts({k: 1 + of_k for k, of_k in drafting.items()}, drafting)
    assert costs.drafting == pytest.approx(list(drafting.values()))
    for i in range(50):
        k = 0 if i % 10 == 9 else 1
        costs.note(k, 1 + drafting[k], drafting[k])
    assert costs.seconds == pytest.approx([1 + of_k for of_k in drafting.values()], rel=0.03)


def test_what_a_length_may_cost_at_least_comes_near_its_cost_as_it_is_played() -> None:
    costs = RoundCosts({k: 1 + 0.1 * k for k in range(LONGEST + 1)}, {1: 0.05, LONGEST: 0.8})
    before = costs.least_seconds(0, 1.0)
    assert before[0] == pytest.approx(costs.seconds[0]), "a length is not in doubt beside itself"
    assert 0.3 * costs.seconds[16] < before[16] < 0.8 * costs.seconds[16]
    for _ in range(10):
        costs.note(0, 1.0)
        costs.note(16, 2.6, 0.8)
    after = costs.least_seconds(0, 1.0)
    assert costs.seconds[16] > after[16] > 0.85 * costs.seconds[16]


def test_without_the_share_of_drafting_the_whole_is_put_right() -> None:
    """As on a GPU, where the host does not know when the drafts are there."""
    costs = RoundCosts({k: 1 + 0.3 * k for k in range(LONGEST + 1)}, {1: 0.3, 2: 0.6})
    for i in range(50):
        k = (0, 3, 4, 5)[i % 4]
        costs.note(k, 1 + 0.1 * k)
    assert costs.seconds[4] / costs.seconds[0] == pytest.approx(1.4, rel=0.05)


@given(st.lists(st.tuples(st.integers(0, LONGEST), st.floats(1e-6, 1e6), st.floats(0, 1)), max_size=60))
@settings(max_examples=60, derandomize=True)
def test_no_clock_however_wild_breaks_the_costs(rounds: list[tuple[int, float, float]]) -> None:
    costs = RoundCosts({0: 1.0, 4: 1.5, LONGEST: 3.0}, {4: 0.2, LONGEST: 0.8})
    for drafts, seconds, share in rounds:
        costs.note(drafts, seconds, share * seconds)
    assert all(0 < seconds < float("inf") for seconds in costs.seconds)


def ratio_after_being_held_up(seed: int, rounds: int = 200) -> float:
    """Rounds of two drafts, each sixteenth of four, of which the first two were held up for most of their time again.

    The machine is now faster and now slower, for some tens of rounds. Returns the cost of four by that of two, to the
    true one.
    """
    rng, load = random.Random(seed), 1.0
    drafting = {k: 0.05 * k for k in range(LONGEST + 1)}
    true = {k: 1 + 0.12 * k for k in range(LONGEST + 1)}
    costs = RoundCosts(true, drafting)
    for i in range(rounds):
        if i % 60 == 30:
            load = rng.choice([0.8, 1.0, 1.35, 1.8])
        k = 4 if i % 16 == 15 else 2
        held_up = 1.8 if i in (15, 31) else 1 + rng.expovariate(1) * (rng.random() < 0.05)
        of_drafts, of_rows = (load * held_up * rng.gauss(1, 0.02) * s for s in (drafting[k], true[k] - drafting[k]))
        costs.note(k, of_drafts + of_rows, of_drafts)
    return costs.seconds[4] / costs.seconds[2] / (true[4] / true[2])


def test_a_length_that_was_held_up_when_it_was_tried_is_put_right() -> None:
    """It would never be played again otherwise. After 32 rounds it is believed to cost a sixth too much."""
    assert statistics.fmean(ratio_after_being_held_up(seed, 33) for seed in range(10)) > 1.1, "the control"
    assert statistics.fmean(abs(ratio_after_being_held_up(seed) - 1) for seed in range(10)) < 0.03
