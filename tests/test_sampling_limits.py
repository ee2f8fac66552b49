"""Every sampling parameter at its limits: choices and distributions against float64, greedy where float32 ends."""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from models import agreeing_pair, backends, play, random_drafter, random_target, slow_decode
from scipy import stats

from gemma_mtp.backend.reference import ReferenceBackend
from gemma_mtp.backend.select import make_backend
from gemma_mtp.decoding.history import TokenHistory
from gemma_mtp.decoding.noise import STREAM_CHOICE, row_key, uniform
from gemma_mtp.decoding.params import HIGHEST_TEMPERATURE, LOWEST_TEMPERATURE, SamplingParams
from gemma_mtp.decoding.sampling import Candidates, choose, probabilities, process
from gemma_mtp.decoding.verify import VERIFICATIONS, Verification, verify_block, verify_rejection

VOCAB = 12
BELOW_ONE = math.nextafter(1.0, 0.0)
TINIEST = 5e-324
TOO_LOW = (TINIEST, 1e-45, 1e-40, 1e-38, 1.2e-38, 1e-10, math.nextafter(LOWEST_TEMPERATURE, 0.0))
#: neither float32 sums of noise nor its rounding move a total by more
NOISE_ROUNDING = 4e-6
FILTERED: list[dict[str, Any]] = [{}, {"top_k": 5, "top_p": 0.9, "min_p": 0.01}]

logit = st.one_of(
    st.integers(-40, 40).map(lambda n: n / 8),  # ties in plenty
    st.floats(-100, 100, width=32),
    st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 30.0, 30.000002, -1e4, 1e4]),
)
tokens = st.integers(0, VOCAB - 1)
temperatures = st.one_of(
    st.floats(0, sys.float_info.max),
    st.floats(0, 3),
    st.sampled_from([0.0, -0.0, *TOO_LOW, LOWEST_TEMPERATURE, 2e-5, 1e-4, 1e-3, 3.4e38, 1e39, 1e308]),
)
shares = st.one_of(st.floats(0, 1, exclude_min=True), st.sampled_from([TINIEST, 1e-45, 1e-30, 1e-7, BELOW_ONE, 1.0]))
filters = st.fixed_dictionaries(
    {
        "temperature": temperatures,
        "top_k": st.sampled_from([0, 1, 2, VOCAB - 1, VOCAB, VOCAB + 1, 2**31, 10**400]),
        "top_p": shares,
        "min_p": st.one_of(st.just(0.0), shares),
        "seed": st.one_of(st.integers(0, 2**63 - 1), st.sampled_from([0, 2**32 - 1, 2**32, 2**63 - 1])),
    }
)
sums = st.one_of(st.floats(-2, 2), st.sampled_from([-2.0, -TINIEST, 0.0, TINIEST, 2.0]))
biases = st.one_of(st.floats(-100, 100), st.sampled_from([-100.0, 100.0, TINIEST, -math.inf]))
penalties = st.fixed_dictionaries(
    {
        "repetition_penalty": st.one_of(st.floats(0.01, 100), st.sampled_from([0.01, BELOW_ONE, 1.0, 100.0])),
        "presence_penalty": sums,
        "frequency_penalty": sums,
        "logit_bias": st.dictionaries(tokens, biases, max_size=4),
    }
)


# ---- the slow, obvious reference: one row, float64, loops ----


def shifted(logits: list[float], params: SamplingParams, prompt: list[int], output: list[int]) -> list[float]:
    """Logits after penalties and bias."""
    counts, found = Counter(output), []
    for token, value in enumerate(logits):
        if token in counts or token in prompt:
            factor = params.repetition_penalty
            value = value / factor if value > 0 else value * factor
        value -= params.frequency_penalty * counts[token] + params.presence_penalty * (counts[token] > 0)
        found.append(value + params.logit_bias.get(token, 0.0))
    return found


def kept_tokens(values: list[float], params: SamplingParams, rounding: float) -> tuple[set[int], set[int]]:
    """Tokens that the filters must keep, and those that they may: what float32's rounding decides."""
    order = sorted((t for t, x in enumerate(values) if x > -math.inf), key=lambda token: (-values[token], token))
    if params.top_k:
        order = order[: params.top_k]
    scaled = {token: (values[token] - values[order[0]]) / params.temperature for token in order}
    total = math.fsum(math.exp(x) for x in scaled.values())
    must, may, mass = set[int](), set[int](), 0.0
    for token in order:
        before, least = mass - params.top_p * total, math.log(params.min_p) if params.min_p else -math.inf
        unsure = rounding * (1 + abs(scaled[token])) + rounding * abs(least if params.min_p else 0)
        top_p = token == order[0] or params.top_p == 1 or before < -total * (1e-6 + rounding)
        top_p_may = top_p or before < total * (1e-6 + rounding)
        above = scaled[token] - least
        if top_p and (token == order[0] or above >= unsure or above == 0):
            must.add(token)
        if top_p_may and above >= -unsure:
            may.add(token)
        mass += math.exp(scaled[token])
    return must, may


def totals(values: list[float], params: SamplingParams, position: int) -> list[float]:
    ids = torch.arange(len(values))
    noise = -torch.log(-torch.log(uniform(params.seed, torch.tensor(position), ids, STREAM_CHOICE)))
    return [value / params.temperature + x for value, x in zip(values, noise.tolist(), strict=True)]


def check_row(
    logits: list[float], params: SamplingParams, prompt: list[int], output: list[int], position: int,
    candidates: Candidates, r: int, chosen: int,
) -> None:  # fmt: skip
    values = shifted(logits, params, prompt, output)
    assume(max(values) > -math.inf)
    plain = not params.uses_history and not params.logit_bias
    rounding = 0.0 if plain else 2e-6 * max(abs(x) for x in (*logits, *values, 100.0) if abs(x) < math.inf)
    ranked = sorted(set(values), reverse=True)
    assume(plain or all(a - b > 2 * rounding for a, b in itertools.pairwise(ranked)))
    if params.greedy:
        assert chosen == values.index(max(values))
        assert probabilities(candidates, params, VOCAB)[r].tolist() == [float(t == chosen) for t in range(VOCAB)]
        return
    must, may = kept_tokens(values, params, 1e-6 + 2 * rounding / params.temperature)
    probs = probabilities(candidates, params, VOCAB)[r].double()
    assert probs.isfinite().all() and probs.sum() == pytest.approx(1, abs=1e-5)
    assert {t for t in range(VOCAB) if probs[t] > 0} <= may
    sure = totals(values, params, position)
    best, best_possible = (max(some, key=lambda token: (sure[token], -token)) for some in (must, may))
    slack = NOISE_ROUNDING + 2 * rounding / params.temperature
    if best == best_possible and all(sure[best] - sure[t] > slack for t in may - {best}):
        assert chosen == best
    assert chosen in may
    if must == may and slack < 1e-3:
        top = max(values)
        weights = {t: math.exp((values[t] - top) / params.temperature) for t in must}
        expected = [weights.get(t, 0.0) / math.fsum(weights.values()) for t in range(VOCAB)]
        torch.testing.assert_close(probs, torch.tensor(expected).double(), atol=1e-5 + slack, rtol=0)


@settings(deadline=None, max_examples=180)
@given(
    filter_values=filters,
    penalty_values=st.one_of(st.just({}), penalties),
    rows=st.lists(st.lists(logit, min_size=VOCAB, max_size=VOCAB), min_size=2, max_size=2),
    prompt=st.lists(tokens, min_size=1, max_size=4),
    output=st.lists(tokens, max_size=4),
    draft=tokens,
    first=st.sampled_from([0, 1, 131_071, 2**31, 2**53]),
)
def test_choices_and_distributions_are_those_of_float64(
    filter_values: dict[str, Any], penalty_values: dict[str, Any], rows: list[list[float]], prompt: list[int],
    output: list[int], draft: int, first: int,
) -> None:  # fmt: skip
    params = SamplingParams(**filter_values, **penalty_values)
    history = TokenHistory(prompt, VOCAB, "cpu")
    history.commit(torch.tensor(output, dtype=torch.int64))
    candidates = process(torch.tensor(rows), params, counts=history.rows(torch.tensor([draft])))
    chosen = choose(candidates, params, torch.arange(first, first + 2)).tolist()
    for r, logits in enumerate(torch.tensor(rows).tolist()):
        check_row(logits, params, prompt, output + [draft][:r], first + r, candidates, r, chosen[r])


@settings(deadline=None, max_examples=100)
@given(
    filter_values=filters,
    rows=st.lists(st.lists(logit, min_size=VOCAB, max_size=VOCAB), min_size=5, max_size=5),
    first=st.integers(0, 2**31),
)
def test_verification_commits_what_the_target_may_say(
    filter_values: dict[str, Any], rows: list[list[float]], first: int
) -> None:
    """At any limit: a committed token has a chance by the target, and one that is sure is committed."""
    params = SamplingParams(**filter_values)
    target = probabilities(process(torch.tensor(rows[:3]), params), params, VOCAB)
    drafted = process(torch.tensor(rows[3:]), params)
    draft_probs = probabilities(drafted, params, VOCAB)
    drawn = choose(drafted, params, torch.arange(first, first + 2))
    assert (draft_probs.gather(-1, drawn[:, None]) > 0).all()
    for verify in (verify_rejection, verify_block):
        verified = verify(target, draft_probs, drawn, params.seed, torch.tensor(first))
        committed = verified.tokens[: int(verified.n_accepted) + 1]
        for row, token in zip(target, committed.tolist(), strict=False):
            assert row[token] > 0
        if params.greedy:
            assert committed.tolist() == target.argmax(-1)[: len(committed)].tolist()


# ---- greedy where float32 ends ----


@pytest.mark.parametrize("temperature", [*TOO_LOW, -0.0])
def test_a_temperature_that_is_too_low_is_greedy(temperature: float) -> None:
    params = SamplingParams(temperature=temperature)
    assert params.greedy and params == SamplingParams() and params.choice == "argmax"
    assert not SamplingParams(temperature=LOWEST_TEMPERATURE).greedy
    assert SamplingParams(temperature=1e308).temperature == HIGHEST_TEMPERATURE


@pytest.mark.parametrize("centroids", [False, True])
@pytest.mark.parametrize("name", ["reference", "native"])
def test_output_at_low_temperatures_is_greedy_output(name: str, centroids: bool) -> None:
    """By both ways to decode and all verifications. At the lowest temperature that is not greedy, float32 logits that
    differ at all are so far apart that nothing but the highest is drawn."""
    target = random_target()
    found = backends(target, random_drafter(centroids=centroids))
    if name not in found:
        pytest.skip("the native operators were not built")
    backend = found[name]
    greedy = play(backend, [5, 6, 7], SamplingParams(max_tokens=8), 0).tokens
    assert greedy == slow_decode(target, [5, 6, 7], SamplingParams(), 8)
    for temperature in (1e-38, LOWEST_TEMPERATURE):  # all that are too low are one
        for filtered in FILTERED:
            params = SamplingParams(max_tokens=8, temperature=temperature, seed=3, **filtered)
            for verification in VERIFICATIONS:
                assert play(backend, [5, 6, 7], params, 3, verification).tokens[:8] == greedy


def keys_of(seed: int, positions: range) -> list[int]:
    return [row_key(seed, position, STREAM_CHOICE) for position in positions]


@pytest.mark.parametrize("temperature", [LOWEST_TEMPERATURE, 1e-4, 1e-3, 0.5, 1e30])
@torch.inference_mode()
def test_native_draws_are_those_of_the_reference_even_between_equals(temperature: float) -> None:
    """Every token has a twin of the same logit. Noise decides between them at any temperature, evenly."""
    target = random_target()
    target.embed_tokens.weight[1::2] = target.embed_tokens.weight[:-1:2]
    backend = make_backend(target)
    count = 2000
    hidden = torch.randn(1, target.config.hidden_size, generator=torch.Generator().manual_seed(1))
    params, positions = SamplingParams(temperature=temperature, seed=11), range(5, 5 + count)
    logits = backend.logits(hidden)
    assert torch.equal(logits[0, 1::2], logits[0, :-1:2])
    candidates = process(logits, params)
    repeated = dataclasses.replace(candidates, logits_RC=candidates.logits_RC.expand(count, -1))
    expected = choose(repeated, params, torch.tensor(positions)).tolist()
    drawn = backend.choose(hidden, [0] * count, [params.temperature] * count, keys_of(11, positions))
    assert drawn == expected
    odd = sum(token % 2 for token in drawn if token < 60)  # the last of 61 has no twin
    assert stats.binomtest(odd, sum(token < 60 for token in drawn), 0.5).pvalue > 1e-6


def test_a_high_temperature_forbids_what_is_forbidden() -> None:
    """-inf divided by what float32 takes for infinite would be no number."""
    params = SamplingParams(temperature=1e308, logit_bias=dict.fromkeys(range(VOCAB - 2), -math.inf), top_p=0.9)
    candidates = process(torch.zeros(50, VOCAB), params)
    assert set(choose(candidates, params, torch.arange(50)).tolist()) == {VOCAB - 2, VOCAB - 1}
    assert probabilities(candidates, params, VOCAB)[0, -2:].tolist() == [0.5, 0.5]


def test_both_zeros_are_one_score() -> None:
    params = SamplingParams(temperature=1.0, top_k=1)
    logits = torch.tensor([[-1.0, -0.0, 0.0, -0.0]])
    assert choose(process(logits, params), params, torch.zeros(1, dtype=torch.int64)).tolist() == [1]


@pytest.mark.parametrize("verification", VERIFICATIONS)
def test_a_drafter_whose_candidates_are_all_forbidden_drafts_no_more(verification: Verification) -> None:
    """A centroid head scores a part of the vocabulary. With no chance at all there would be no distribution to
    compare, and `block` would take what stands before for certain."""
    target, drafter = agreeing_pair()
    drafter = random_drafter(centroids=True)
    forbidden = {token: -math.inf for token in range(0, 61) if token not in (17, 40)}
    tried: list[dict[str, Any]] = [{}, {"top_p": 0.9}]
    for filtered in tried:
        params = SamplingParams(max_tokens=20, temperature=1.0, seed=2, logit_bias=forbidden, **filtered)
        played = play(ReferenceBackend(target, drafter), [5, 6, 7], params, 4, verification)
        assert set(played.tokens) <= {17, 40}
        assert min(played.drafted) < 4
