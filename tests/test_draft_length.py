"""The draft length that pays: its arithmetic against simulation; good, bad and changing drafters."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_mtp.decoding.draft_length import LONGEST, DraftLength, RoundCosts, best_length, expected_tokens

#: verifying a row more costs a tenth of a step, a draft as much again
CHEAP = RoundCosts({0: 1.0, LONGEST: 1.0 + 0.2 * LONGEST})
#: each row costs a whole step, as with operators that read the weights once a row
DEAR = RoundCosts({0: 1.0, LONGEST: 1.0 + 1.1 * LONGEST})

chances = st.lists(st.floats(0, 1), min_size=1, max_size=LONGEST)


def test_expected_tokens_by_enumeration() -> None:
    a = [0.9, 0.5, 0.2]
    # the number accepted is 0, 1, 2 or 3
    outcomes = {0: 0.1, 1: 0.9 * 0.5, 2: 0.9 * 0.5 * 0.8, 3: 0.9 * 0.5 * 0.2}
    assert sum(outcomes.values()) == pytest.approx(1)
    assert expected_tokens(a) == pytest.approx(sum((n + 1) * p for n, p in outcomes.items()))


@given(chances, st.floats(0.01, 3))
@settings(max_examples=200, derandomize=True)
def test_no_other_length_commits_more_tokens_a_second(acceptance: list[float], step: float) -> None:
    costs = RoundCosts({0: 1.0, LONGEST: 1.0 + step * LONGEST})
    best = best_length(acceptance, costs)
    rate = expected_tokens(acceptance[:best]) / costs.seconds[best]
    for k in range(len(acceptance) + 1):
        assert expected_tokens(acceptance[:k]) / costs.seconds[k] <= rate + 1e-12


@given(st.dictionaries(st.integers(1, LONGEST), st.floats(0.1, 9), max_size=5), st.floats(0.1, 9))
@settings(max_examples=100, derandomize=True)
def test_costs_pass_through_what_was_measured(measured: dict[int, float], none: float) -> None:
    costs = RoundCosts({**measured, 0: none})
    assert all(costs.seconds[k] == s for k, s in {**measured, 0: none}.items())
    assert len(costs.seconds) == LONGEST + 1


def test_costs_follow_the_machine() -> None:
    costs = RoundCosts({0: 1.0, 4: 2.0})
    assert costs.seconds[2] == pytest.approx(1.5)
    assert costs.seconds[8] == pytest.approx(3.0)
    for _ in range(60):
        costs.note(2, 3.0)
    assert costs.seconds[2] == pytest.approx(3.0, rel=0.01)
    costs.note(4, 1000.0)
    assert costs.seconds[4] <= 2.2, "one slow round is no news"


def play(costs: RoundCosts, acceptance: list[float], tokens: int, seed: int = 0) -> tuple[float, list[int]]:
    """Time taken for so many tokens by a simulated drafter, and the lengths chosen."""
    rng, policy = random.Random(seed), DraftLength(costs)
    seconds, committed, lengths = 0.0, 0, []
    while committed < tokens:
        k = policy.choose()
        n = 0
        while n < k and rng.random() < acceptance[n]:
            n += 1
        policy.record(k, n)
        lengths.append(k)
        seconds += costs.seconds[k]
        committed += n + 1
    return seconds, lengths


@pytest.mark.parametrize("costs", [CHEAP, DEAR])
def test_a_useless_drafter_costs_less_than_three_percent(costs: RoundCosts) -> None:
    seconds, lengths = play(costs, [0.0] * LONGEST, 1000)
    assert seconds <= 1.03 * 1000 * costs.seconds[0]
    assert any(lengths[100:]), "it looks again now and then"


@pytest.mark.parametrize("chance", [0.3, 0.6, 0.9])
def test_close_to_the_best_fixed_length(chance: float) -> None:
    acceptance = [chance] * LONGEST
    best = best_length(acceptance, CHEAP)
    fixed = CHEAP.seconds[best] / expected_tokens(acceptance[:best]) * 2000
    assert play(CHEAP, acceptance, 2000)[0] <= 1.05 * fixed


def test_it_never_drafts_where_that_can_not_pay() -> None:
    assert set(play(DEAR, [0.9] * LONGEST, 100)[1]) <= {0, 1}


def test_it_comes_back_to_a_drafter_that_got_better() -> None:
    policy = DraftLength(CHEAP)
    for _ in range(50):
        policy.record(policy.choose(), 0)
    assert policy.choose() == 0
    lengths = []
    for _ in range(200):
        k = policy.choose()
        lengths.append(k)
        policy.record(k, k)
    assert lengths[-1] == LONGEST
