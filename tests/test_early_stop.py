"""The stop rule: its arithmetic, native and general alike; no verification is biased by it."""

import itertools
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import agreeing_pair, backends, native_only, play, random_drafter, random_target
from test_verify import VERIFIERS, Tables, Verify, all_drafts, make_tables, next_probs, round_law

from gemma_mtp.backend.base import Backend
from gemma_mtp.backend.native import set_threads
from gemma_mtp.decoding.early_stop import BIAS, SLOPE, Calibration, StopRule, chance, log_odds
from gemma_mtp.decoding.params import SamplingParams
from gemma_mtp.decoding.round_costs import LONGEST
from gemma_mtp.decoding.verify import verify_block, verify_rejection

probabilities = st.floats(0, 1)


@given(probabilities, probabilities)
@settings(max_examples=200)
def test_a_surer_draft_is_likelier_to_be_accepted(a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert 0 < chance(low, BIAS, SLOPE) <= chance(high, BIAS, SLOPE) < 1
    assert log_odds(low) == pytest.approx(-log_odds(1 - low), abs=1e-6)


def test_no_confidence_where_there_is_no_number() -> None:
    assert log_odds(math.nan) == log_odds(0.0) < log_odds(0.5) == 0 < log_odds(1.0)


def test_a_rule_ends_where_its_numbers_do() -> None:
    rule = StopRule((0.0, 0.5), 0.0, 1.0)
    assert rule.goes_on(1, 0.5) and not rule.goes_on(1, 0.4) and not rule.goes_on(2, 1.0)


@pytest.mark.parametrize(("bias", "slope"), [(0.0, 1.0), (2.0, 0.5), (-1.0, 2.0)])
def test_calibration_finds_what_confidence_means(bias: float, slope: float) -> None:
    rng, calibration = random.Random(1), Calibration()
    for _ in range(4000):
        confidences = [rng.uniform(0.05, 0.95) for _ in range(3)]
        hits = [rng.random() < chance(c, bias, slope) for c in confidences]
        calibration.learn(confidences, next((i for i, hit in enumerate(hits) if not hit), 3))
    for confidence in (0.1, 0.5, 0.9):
        learnt = chance(confidence, calibration.bias, calibration.slope)
        assert learnt == pytest.approx(chance(confidence, bias, slope), abs=0.12)


def test_what_was_not_verified_teaches_nothing() -> None:
    one, two = Calibration(), Calibration()
    one.learn([0.9, 0.2, 0.7, 0.1], 1)
    two.learn([0.9, 0.2], 1)
    assert one == two != Calibration()


# ---- in rounds ----

PAIRS: dict[str, Backend] = {
    name + head: backend
    for head, pair in (
        ("", agreeing_pair(3)), (", centroids", (random_target(3), random_drafter(seed=4, centroids=True))),
    )
    for name, backend in backends(*pair).items()
}  # fmt: skip
ALWAYS = StopRule((0.0,) * LONGEST, BIAS, SLOPE)


def tokens_of(name: str) -> int:
    """How many to decode: PyTorch's operators take fifty times as long as the native ones."""
    return 50 if "native" in name else 18


def rule_of(need: float) -> StopRule:
    return StopRule((0.0,) + (need,) * (LONGEST - 1), BIAS, SLOPE)


@pytest.mark.parametrize("name", sorted(PAIRS))
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_exact_output_is_plain_decodings_whatever_the_rule(name: str, temperature: float) -> None:
    params = SamplingParams(max_tokens=tokens_of(name), temperature=temperature, seed=5)
    plain = play(PAIRS[name], [1, 2, 3], params, 0)
    lengths = set()
    for need in (0.0, 0.2, 1.0):
        played = play(PAIRS[name], [1, 2, 3], params, 8, stop=rule_of(need))
        assert played.tokens == plain.tokens
        lengths |= set(played.drafted)
    assert len(lengths) > 2 and max(lengths) == 8


@pytest.mark.parametrize("name", sorted(PAIRS))
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_rounds_stop_where_the_rule_says(name: str, temperature: float) -> None:
    rule, params = rule_of(0.3), SamplingParams(max_tokens=tokens_of(name), temperature=temperature)
    every = play(PAIRS[name], [1, 2, 3], params, 8, stop=ALWAYS)
    stopped = play(PAIRS[name], [1, 2, 3], params, 8, stop=rule)
    assert len(every.confidences[0]) == every.drafted[0] == 8
    left = params.max_tokens - 1
    for confidences, drafted, accepted in zip(stopped.confidences, stopped.drafted, stopped.accepted, strict=True):
        reaches = list(itertools.accumulate((chance(c, BIAS, SLOPE) for c in confidences), lambda a, b: a * b))
        assert len(confidences) == drafted
        assert all(rule.goes_on(i + 1, reach) for i, reach in enumerate(reaches[:-1]))
        assert drafted == min(8, left - 1) or not rule.goes_on(drafted, reaches[-1])
        left -= accepted + 1
    assert stopped.confidences[0] == every.confidences[0][: stopped.drafted[0]]


@native_only
@pytest.mark.parametrize("name", ["native", "native, centroids"])
@pytest.mark.parametrize("threads", [1, 3])
def test_native_drafts_and_confidences_are_the_general_paths(name: str, threads: int) -> None:
    """A bias of nothing leaves the choice as it is, but takes the way through logits and the general choice."""
    general = SamplingParams(max_tokens=40, logit_bias={0: 0.0})
    set_threads(threads)
    native = play(PAIRS[name], [1, 2, 3], SamplingParams(max_tokens=40), 8, stop=rule_of(0.2))
    stepwise = play(PAIRS[name], [1, 2, 3], general, 8, stop=rule_of(0.2))
    assert native.drafted == stepwise.drafted and native.accepted == stepwise.accepted
    ours, theirs = (list(itertools.chain(*played.confidences)) for played in (native, stepwise))
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert 0 < min(ours) < max(ours) < 1


def test_without_a_rule_no_confidences_are_read() -> None:
    for backend in PAIRS.values():
        assert not any(itertools.chain(*play(backend, [1, 2, 3], SamplingParams(max_tokens=20), 4).confidences))


# ---- the law of the output where drafts decide how many are drafted, by summing over all of them ----


def stopped_law(tables: Tables, check: Verify, k: int, need: float, drops: bool = False) -> torch.Tensor:
    """Exact law [V] * (k+1) of the first k+1 tokens: a round that stops by its drafts' probabilities, then plain.

    With `drops`, the draft that was not sure enough is not verified: what no round may do.
    """
    law = torch.zeros([tables.vocab] * (k + 1), dtype=torch.float64)
    for length in range(1, k + 1):  # the first draft is always made, and always verified
        target_probs, draft_probs, drafts, chances = all_drafts(tables, length)
        reach = draft_probs.gather(-1, drafts.unsqueeze(-1)).squeeze(-1).cumprod(-1)
        went_on = (reach[:, 1:] if drops else reach[:, :-1]).ge(need).all(-1)
        ends = (reach[:, -1] < need).double()
        if drops:  # the next draft is drawn, found unsure, and forgotten
            context = torch.cat([torch.zeros(len(drafts), 2, dtype=torch.int64), drafts], -1)
            following = next_probs(tables.draft, context)
            ends = (following * (reach[:, -1:] * following < need)).sum(-1)
        if length == k:
            ends = torch.ones_like(ends)
        law += round_law(tables, check, k, target_probs, draft_probs, drafts, chances * went_on * ends)
    return law


def target_law(tables: Tables, k: int) -> torch.Tensor:
    law = torch.zeros([tables.vocab] * (k + 1), dtype=torch.float64)
    for tokens in itertools.product(range(tables.vocab), repeat=k + 1):
        context = [0, 0, *tokens]
        law[tokens] = math.prod(float(tables.target[tuple(context[i : i + 3])]) for i in range(k + 1))
    return law


@pytest.mark.parametrize("check", VERIFIERS)
@pytest.mark.parametrize("need", [0.0, 0.2, 0.45])
def test_the_law_stays_the_targets_where_drafts_decide_the_length(check: Verify, need: float) -> None:
    tables = make_tables(seed=6, vocab=3, spread=2.0)
    torch.testing.assert_close(stopped_law(tables, check, 3, need), target_law(tables, 3), atol=1e-12, rtol=0)


@pytest.mark.parametrize("check", [verify_rejection, verify_block])
def test_forgetting_a_draft_that_was_drawn_would_bias_the_law(check: Verify) -> None:
    """The negative control: the same sum sees the bias of a rule that looks at a draft before verifying it."""
    tables = make_tables(seed=6, vocab=3, spread=1.0)
    law = stopped_law(tables, check, 3, 0.3, drops=True)
    assert law.sum() == pytest.approx(1)
    assert (law - target_law(tables, 3)).abs().max() > 1e-4
