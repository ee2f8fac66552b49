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


@given(chances, st.floats(0.01, 3))
@settings(max_examples=200, derandomize=True)
def test_no_other_length_commits_more_tokens_a_second(acceptance: list[float], step: float) -> None:
    costs = RoundCosts({0: 1.0, LONGEST: 1.0 + step * LONGEST}).seconds
    best, rate = best_length(acceptance, costs)
    assert rate == pytest.approx(expected_tokens(acceptance[:best]) / costs[best])
    for k in range(len(acceptance) + 1):
        assert expected_tokens(acceptance[:k]) / costs[k] <= rate + 1e-12


measurements = st.dictionaries(st.integers(1, LONGEST), st.floats(0.1, 9), max_size=5)


@given(measurements, st.floats(0.1, 9), st.floats(0, 0.5))
@settings(max_examples=100, derandomize=True)
def test_costs_pass_through_what_was_measured(measured: dict[int, float], none: float, step: float) -> None:
    measured = {**measured, 0: none}
    step = min([step, *(s / (2 * k) for k, s in measured.items() if k)])
    costs = RoundCosts(measured, step).seconds
    assert min(costs) > 0
    assert len(costs) == LONGEST + 1
    assert all(b - a >= step - 1e-9 for a, b in itertools.pairwise(costs)), "a draft is never free"
    assert all(costs[k] <= s + 1e-9 for k, s in measured.items())
    known = sorted(measured)
    if all(measured[b] - measured[a] >= step * (b - a) for a, b in itertools.pairwise(known)) and len(known) > 1:
        assert [costs[k] for k in known] == pytest.approx([measured[k] for k in known])


def test_costs_between_measured_ones_lie_on_straight_lines() -> None:
    costs = RoundCosts({0: 1.0, 4: 2.0}).seconds
    assert (costs[2], costs[8]) == pytest.approx((1.5, 3.0))


@given(measurements)
@settings(max_examples=100, derandomize=True)
def test_the_next_draft_costs_what_the_lower_hull_rises(measured: dict[int, float]) -> None:
    costs = RoundCosts({**measured, 0: 1.0})
    slopes = costs.next_draft()
    hull = list(itertools.accumulate(slopes, initial=costs.seconds[0]))
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(slopes)), "convex"
    assert all(h <= c + 1e-9 for h, c in zip(hull, costs.seconds, strict=True)), "never above what was measured"
    assert hull[-1] == pytest.approx(costs.seconds[-1])


def test_a_length_measured_wrong_is_put_right_by_playing_it() -> None:
    costs, true = RoundCosts({0: 1.0, 2: 1.2, 4: 9.0}), {0: 1.0, 2: 1.2, 4: 1.4}
    for _ in range(500):
        for k, seconds in true.items():
            costs.note(k, seconds)
    assert [costs.seconds[k] / costs.seconds[0] for k in true] == pytest.approx(list(true.values()), rel=0.02)


def test_the_best_gain_follows_the_costs() -> None:
    costs = RoundCosts({0: 1.0, LONGEST: 2.0})
    assert costs.best_gain() == pytest.approx((LONGEST + 1) / 2)
    slopes = costs.next_draft()
    for _ in range(500):
        costs.note(0, 1.0)
        costs.note(LONGEST, 20.0)
    assert costs.best_gain() == pytest.approx(
        max((k + 1) * costs.seconds[0] / costs.seconds[k] for k in range(LONGEST + 1))
    )
    assert costs.best_gain() < (LONGEST + 1) / 2
    assert sum(costs.next_draft()) == pytest.approx(costs.seconds[LONGEST] - costs.seconds[0])
    assert costs.next_draft() != pytest.approx(slopes)


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


def test_the_best_that_drafting_could_gain() -> None:
    assert RoundCosts({0: 1.0, 4: 2.0}).best_gain() == pytest.approx(17 / 5)  # 16 drafts, at a quarter of a round each
    assert RoundCosts({0: 1.0, 4: 5.5}).best_gain() == 1.0
