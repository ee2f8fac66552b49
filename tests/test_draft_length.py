"""The draft length that pays: its arithmetic against simulation; good, bad and changing drafters."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_mtp.decoding.draft_length import (
    LOSS_ROUNDS,
    LOSS_SHARE,
    STOP_EARLY_AMONG,
    DraftLength,
    Plan,
    best_length,
    expected_tokens,
    least_reach,
)
from gemma_mtp.decoding.early_stop import chance
from gemma_mtp.decoding.round_costs import LONGEST, RoundCosts

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


@given(chances, st.floats(0.01, 1), st.lists(st.floats(0.01, 2), min_size=LONGEST, max_size=LONGEST))
@settings(max_examples=100, derandomize=True)
def test_a_draft_is_made_where_some_number_more_pays(acceptance: list[float], rate: float, steps: list[float]) -> None:
    costs = list(itertools.accumulate(steps, initial=1.0))
    least = least_reach(acceptance, costs, rate)
    assert len(least) == len(acceptance)
    for made, need in enumerate(least):
        if not 1e-3 < need < 1e3:  # free drafts, or such that are never accepted
            continue
        for reach, pays in ((0.99 * need, False), (1.01 * need, True)):
            gains = [
                reach * (expected_tokens(acceptance[made:k]) - 1) - rate * (costs[k] - costs[made])
                for k in range(made + 1, len(acceptance) + 1)
            ]
            assert (max(gains) > 0) == pays


@given(chances, st.floats(0.01, 3))
@settings(max_examples=200, derandomize=True)
def test_no_other_length_commits_more_tokens_a_second(acceptance: list[float], step: float) -> None:
    costs = RoundCosts({0: 1.0, LONGEST: 1.0 + step * LONGEST}).seconds
    best, rate = best_length(acceptance, costs)
    assert rate == pytest.approx(expected_tokens(acceptance[:best]) / costs[best])
    for k in range(len(acceptance) + 1):
        assert expected_tokens(acceptance[:k]) / costs[k] <= rate + 1e-12


def play(
    costs: RoundCosts, acceptance: list[float], tokens: int, seed: int = 0, early_stop: bool = True
) -> tuple[float, list[int]]:
    """Time taken for so many tokens by a simulated drafter that is never sure, and the drafts made."""
    rng, policy = random.Random(seed), DraftLength(costs, early_stop)
    seconds, committed, lengths = 0.0, 0, []
    while committed < tokens:
        k = policy.choose().longest
        n = 0
        while n < k and rng.random() < acceptance[n]:
            n += 1
        policy.record(k, n)
        lengths.append(k)
        seconds += costs.seconds[k]
        committed += n + 1
    return seconds, lengths


@pytest.mark.parametrize("costs", [CHEAP, DEAR, RoundCosts({0: 1.0, LONGEST: 1.2})])
@pytest.mark.parametrize("tokens", [50, 100, 300, 1000, 5000])
def test_a_useless_drafter_costs_less_than_three_percent(costs: RoundCosts, tokens: int) -> None:
    seconds, lengths = play(costs, [0.0] * LONGEST, tokens)
    assert seconds <= (1 + LOSS_SHARE + LOSS_ROUNDS / tokens) * tokens * costs.seconds[0] + 1e-9
    assert LOSS_SHARE + LOSS_ROUNDS / 50 < 0.03
    assert any(lengths[200:]) or tokens <= 300, "it looks again now and then"


@given(st.lists(st.integers(0, LONGEST), min_size=1, max_size=300), st.floats(0.01, 2.0), st.integers(1, 5))
@settings(max_examples=200, derandomize=True)
def test_no_drafter_however_hostile_costs_more(accepts: list[int], step: float, sequences: int) -> None:
    """The bound holds after every round, whatever was accepted before; for a sequence and for several together."""
    costs = RoundCosts({0: 1.0, LONGEST: 1.0 + step * LONGEST})
    policy, seconds, committed = DraftLength(costs), 0.0, 0.0
    for accept in accepts:
        drafted = policy.choose().longest
        for i in range(sequences):
            accepted = min(drafted, (accept + 5 * i) % (LONGEST + 1))
            policy.record(drafted, accepted, share=1 / sequences)
            committed += (accepted + 1) / sequences
        seconds += costs.seconds[drafted]
        assert seconds <= committed * (1 + LOSS_SHARE) + LOSS_ROUNDS + 1e-9


def test_several_sequences_count_as_one_that_does_as_they_do() -> None:
    """In what they may lose and how fast they forget; what is known of a position comes of all their rounds."""
    lone, together = DraftLength(CHEAP), DraftLength(CHEAP)
    for drafted, accepted in [(2, 1), (0, 0), (4, 3), (1, 0), (16, 16), (7, 2)] * 40:
        lone.record(drafted, accepted)
        for _ in range(4):
            together.record(drafted, accepted, share=0.25)
    assert together.allowance == pytest.approx(lone.allowance) and together.rounds == lone.rounds
    assert together.reached == pytest.approx([4 * reached for reached in lone.reached], rel=0.02)


def test_the_bound_is_kept_in_measured_time() -> None:
    """Drafts that take four times what was measured: the first rounds are overspent, what is seen at looks is not."""
    costs = RoundCosts({0: 1.0, LONGEST: 1.0 + 0.2 * LONGEST})
    policy, seconds = DraftLength(costs), 0.0
    for tokens in range(1, 1001):
        drafted = policy.choose().longest
        took = 1.0 + 0.8 * drafted
        policy.record(drafted, 0, seconds=took)
        costs.note(drafted, took)
        seconds += took
        assert seconds <= tokens * (1 + LOSS_SHARE) + LOSS_ROUNDS + 4.0
    assert seconds <= 1.02 * 1000


@pytest.mark.parametrize("chance", [0.3, 0.6, 0.9])
def test_close_to_the_best_fixed_length(chance: float) -> None:
    acceptance = [chance] * LONGEST
    _, rate = best_length(acceptance, CHEAP.seconds)
    assert play(CHEAP, acceptance, 4000, early_stop=False)[0] <= 1.05 * 4000 / rate


def test_it_never_drafts_where_that_can_not_pay() -> None:
    assert set(play(DEAR, [0.9] * LONGEST, 100)[1]) <= {0, 1}


def test_it_comes_back_to_a_drafter_that_got_better() -> None:
    policy = DraftLength(CHEAP)
    for _ in range(50):
        policy.record(policy.choose().longest, 0)
    assert policy.choose().longest == 0
    lengths = []
    for _ in range(300):
        k = policy.choose().longest
        lengths.append(k)
        policy.record(k, k)
    assert lengths[-1] == LONGEST


def test_it_looks_again_at_once_where_costs_have_changed() -> None:
    """As where many sequences ran together, and few are left: it was resting for the costs of many."""
    policy = DraftLength(DEAR)
    for _ in range(5):
        policy.record(policy.choose().longest, 0)
    assert policy.pause > 50
    policy.use(CHEAP, 1)
    assert policy.choose().longest > 0


def test_many_together_draft_equally_many() -> None:
    """One that ended early would wait for the others all the same."""
    policy = DraftLength(CHEAP)
    for _ in range(20):
        policy.record(4, 3)
    few, many = RoundCosts({0: 1.0, LONGEST: 4.0}), RoundCosts({0: 1.0, LONGEST: 4.0})
    policy.use(few, STOP_EARLY_AMONG)
    policy.tried = policy.rounds  # no length is due for a trial
    plan = policy.choose()
    assert plan.longest == LONGEST and plan.stop is not None
    policy.use(many, STOP_EARLY_AMONG + 1)
    assert policy.choose() == Plan(best_length(policy.acceptance(), many.seconds)[0])
    assert 0 < policy.choose().longest < LONGEST


def informed(costs: RoundCosts, tokens: int, early_stop: bool, confusion: float, seed: int = 0) -> float:
    """Tokens for the time of a plain round, by a drafter that is sure of some drafts and unsure of others.

    A draft's true chance of acceptance is drawn; its confidence is that chance distorted by `confusion` in log-odds.
    """
    rng, policy = random.Random(seed), DraftLength(costs, early_stop)
    seconds, committed = 0.0, 0
    while committed < tokens:
        plan, made, reach, accepted, confidences = policy.choose(), 0, 1.0, 0, []
        while made < plan.longest and (made == 0 or plan.stop is None or plan.stop.goes_on(made, reach)):
            true = rng.choice([0.98, 0.98, 0.95, 0.4])
            confidences.append(chance(true, confusion, 1.0))
            if plan.stop is not None:
                reach *= chance(confidences[-1], plan.stop.bias, plan.stop.slope)
            accepted += accepted == made and rng.random() < true
            made += 1
        policy.record(made, accepted, confidences if plan.stop else [])
        seconds += costs.seconds[made]
        committed += accepted + 1
    return committed / seconds * costs.seconds[0]


@pytest.mark.parametrize("confusion", [-2.0, 0.0, 2.0])
def test_stopping_early_gains_where_confidence_says_something(confusion: float) -> None:
    """Also where confidence is far too low or too high: the sequence's own record puts it right."""
    with_stop, without = (informed(CHEAP, 20_000, early_stop, confusion) for early_stop in (True, False))
    assert with_stop > 1.08 * without
