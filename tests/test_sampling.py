"""Filters, penalties and choice against slow float64 loops and Hugging Face; quality of the counter-based noise."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from transformers.generation import logits_process as hf

from gemma_mtp.decoding.history import TokenHistory
from gemma_mtp.decoding.noise import STREAM_ACCEPT, STREAM_CHOICE, STREAM_DRAFT, gumbel, round_counters, uniform
from gemma_mtp.decoding.params import SamplingParams
from gemma_mtp.decoding.sampling import Candidates, choose, probabilities, process, top_logprobs
from gemma_mtp.errors import SamplingError

VOCAB = 12
Values = dict[str, Any]
KNOWN_UNIFORMS = [[0.5484489975104715, 0.7819692077129942], [0.47224701903892863, 0.6149647083075233]]
FALSE_ALARM = 1e-7  # of each statistical test; inputs are fixed, so a pass stays a pass


# ---- the slow, obvious reference: one row, float64, loops ----


def reference_scores(
    logits: Sequence[float], params: SamplingParams, prompt: Sequence[int], output: Sequence[int]
) -> list[float]:
    """Scaled log-probabilities up to a constant, -inf where removed."""
    scores = [float(x) for x in logits]
    counts = Counter(output)
    for token in range(len(scores)):
        if token in counts or token in prompt:
            factor = params.repetition_penalty
            scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
        scores[token] -= params.frequency_penalty * counts[token]
        scores[token] -= params.presence_penalty * (counts[token] > 0)
        scores[token] += params.logit_bias.get(token, 0.0)
    if params.temperature == 0:
        return scores
    scores = [x / params.temperature for x in scores]
    order = sorted(range(len(scores)), key=lambda token: (-scores[token], token))
    if params.top_k:
        order = order[: params.top_k]
    weights = [math.exp(scores[token] - scores[order[0]]) for token in order]
    kept, mass = [], 0.0
    for token, weight in zip(order, weights, strict=True):
        assume(abs(mass - params.top_p * sum(weights)) > 1e-5)  # float32 may round it to either side
        if mass < params.top_p * sum(weights):
            kept.append(token)
        mass += weight
    for token in kept:
        ratio = math.exp(scores[token] - scores[order[0]])
        assume(token == order[0] or params.min_p == 0 or abs(ratio - params.min_p) > 1e-5)
    kept = [token for token in kept if math.exp(scores[token] - scores[order[0]]) >= params.min_p - 1e-6]
    return [scores[token] if token in kept else -math.inf for token in range(len(scores))]


def reference_choice(scores: list[float], params: SamplingParams, position: int) -> int:
    noise = [0.0] * len(scores)
    if params.temperature > 0:
        ids = torch.arange(len(scores))
        noise = (-torch.log(-torch.log(uniform(params.seed, torch.tensor(position), ids, STREAM_CHOICE)))).tolist()
    totals = [score + x for score, x in zip(scores, noise, strict=True)]
    best = max(range(len(totals)), key=lambda token: (totals[token], -token))
    if params.temperature > 0:
        assume(all(totals[best] - total > 1e-4 for token, total in enumerate(totals) if token != best))
    return best


def dense_scores(candidates: Candidates) -> Tensor:
    """Scores by token id, as the reference has them."""
    scores_RC = candidates.logits_RC / candidates.temperature
    if candidates.token_ids_RC is None:
        return scores_RC
    ids = candidates.token_ids_RC.expand_as(scores_RC)
    return torch.full((scores_RC.shape[0], VOCAB), -math.inf).scatter(-1, ids, scores_RC)


# eighths make ties common and keep greedy sums exact
logit_rows = st.lists(st.integers(-40, 40).map(lambda n: n / 8), min_size=VOCAB, max_size=VOCAB)
tokens = st.integers(0, VOCAB - 1)
filters = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.25, 0.7, 1.0, 2.0]),
        "top_k": st.integers(0, VOCAB + 2),
        "top_p": st.sampled_from([0.01, 0.3, 0.77, 0.95, 1.0]),
        "min_p": st.sampled_from([0.0, 0.03, 0.2, 1.0]),
        "seed": st.integers(0, 2**63 - 1),
    }
)
penalties = st.fixed_dictionaries(
    {
        "repetition_penalty": st.sampled_from([0.5, 1.0, 1.25, 2.0]),
        "presence_penalty": st.sampled_from([-1.0, 0.0, 0.5]),
        "frequency_penalty": st.sampled_from([-0.5, 0.0, 0.25]),
        "logit_bias": st.dictionaries(tokens, st.sampled_from([-100.0, -1.5, 3.0, -math.inf]), max_size=3),
    }
)


@settings(deadline=None, max_examples=250)
@given(
    filter_values=filters,
    penalty_values=penalties,
    rows=st.lists(logit_rows, min_size=3, max_size=3),
    prompt=st.lists(tokens, min_size=1, max_size=6),
    output=st.lists(tokens, max_size=6),
    drafts=st.lists(tokens, min_size=2, max_size=2),
    first=st.integers(0, 200_000),
)
def test_choice_equals_the_slow_reference(
    filter_values: Values, penalty_values: Values, rows: list[list[float]], prompt: list[int], output: list[int],
    drafts: list[int], first: int,
) -> None:  # fmt: skip
    params = SamplingParams(**filter_values, **penalty_values)
    history = TokenHistory(prompt, VOCAB, "cpu")
    history.commit(torch.tensor(output, dtype=torch.int64))
    counts = history.rows(torch.tensor(drafts))
    candidates = process(torch.tensor(rows), params, counts=counts)
    chosen = choose(candidates, params, torch.arange(first, first + 3))
    for r, logits in enumerate(rows):
        expected = reference_scores(logits, params, prompt, output + drafts[:r])
        assume(expected.count(-math.inf) < VOCAB)
        scores = dense_scores(candidates)[r].double()
        torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64), atol=1e-4, rtol=1e-5)
        assert chosen[r] == reference_choice(expected, params, first + r)


@settings(deadline=None, max_examples=100)
@given(
    filter_values=filters,
    penalty_values=penalties,
    rows=st.lists(logit_rows, min_size=2, max_size=5),
    order=st.permutations(range(VOCAB)),
    size=st.integers(1, VOCAB),
    drafts=st.lists(tokens, min_size=1, max_size=1),
)
def test_a_subset_of_candidates_equals_the_vocabulary_without_the_rest(
    filter_values: Values, penalty_values: Values, rows: list[list[float]], order: list[int], size: int,
    drafts: list[int],
) -> None:  # fmt: skip
    params = SamplingParams(**filter_values, **penalty_values)
    logits, ids = torch.tensor(rows[:2]), torch.tensor([order[:size], order[-size:]])
    assume(all(not set(row).issubset(params.logit_bias) for row in ids.tolist()))
    positions = torch.tensor([5, 6])
    counts = TokenHistory([1, 2], VOCAB, "cpu").rows(torch.tensor(drafts))
    masked = torch.full_like(logits, -math.inf).scatter(-1, ids, logits.gather(-1, ids))
    full, part = process(masked, params, None, counts), process(logits.gather(-1, ids), params, ids, counts)
    assert torch.equal(choose(full, params, positions), choose(part, params, positions))
    full_probs, part_probs = (probabilities(x, params, VOCAB) for x in (full, part))
    torch.testing.assert_close(full_probs, part_probs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("vocab", [7, 1000, 33_003])
@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0.0},
        {"temperature": 0.8},
        {"temperature": 1.0, "top_k": 64, "top_p": 0.95},
        {"temperature": 1.3, "top_p": 0.9, "min_p": 0.01},
        {"temperature": 1.0, "top_k": 40, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_alone_equals_the_row_among_others_bit_for_bit(vocab: int, values: Values, dtype: torch.dtype) -> None:
    params = SamplingParams(**values, seed=3)
    generator = torch.Generator().manual_seed(vocab)
    logits = (torch.randn(9, vocab, generator=generator) * 4).to(dtype)  # bfloat16: ties in plenty
    drafts = torch.randint(0, vocab, (8,), generator=generator)
    counts = TokenHistory([1, 2, 3], vocab, "cpu").rows(drafts)
    positions = torch.arange(100, 109)
    together = process(logits, params, counts=counts)
    chosen = choose(together, params, positions)
    for r in range(9):
        row_counts = TokenHistory([1, 2, 3], vocab, "cpu").rows(drafts[:r], first=r)
        alone = process(logits[r : r + 1].clone(), params, counts=row_counts)
        assert torch.equal(alone.logits_RC[0], together.logits_RC[r])
        assert choose(alone, params, positions[r : r + 1]) == chosen[r]
        assert torch.equal(probabilities(alone, params, vocab)[0], probabilities(together, params, vocab)[r])


def test_logits_are_left_as_they_are() -> None:
    logits = torch.randn(2, VOCAB)
    before = logits.clone()
    params = SamplingParams(temperature=0.5, top_k=3, top_p=0.5, min_p=0.1, repetition_penalty=2, logit_bias={1: 5.0})
    process(logits, params, counts=TokenHistory([1], VOCAB, "cpu").rows(torch.tensor([2])))
    assert torch.equal(logits, before)


def test_ties_go_to_the_lowest_id() -> None:
    greedy, positions = SamplingParams(), torch.zeros(1, dtype=torch.int64)
    tied = torch.tensor([[0.0, 3.0, 3.0, 1.0]])
    assert choose(process(tied, greedy), greedy, positions).tolist() == [1]
    assert choose(process(tied, greedy, torch.tensor([[2, 9, 5, 1]])), greedy, positions).tolist() == [5]
    top_two = SamplingParams(temperature=1.0, top_k=2)
    ids = torch.tensor([[8, 3, 9, 5]])
    for kept, best in (
        (process(torch.zeros(1, 5_000), top_two), [0, 1]),
        (process(torch.zeros(1, 4), top_two, ids), [3, 5]),
    ):
        assert kept.token_ids_RC is not None and kept.token_ids_RC.tolist() == [best]
    half = SamplingParams(temperature=1.0, top_p=0.5)
    assert (probabilities(process(torch.zeros(1, 4), half), half, 4) > 0).tolist() == [[True, True, False, False]]


def test_greedy_is_one_argmax_whatever_the_filters() -> None:
    logits = torch.randn(3, 50, dtype=torch.bfloat16)
    params = SamplingParams(top_k=2, top_p=0.1, min_p=0.9)
    candidates = process(logits, params)
    assert candidates.logits_RC is logits
    assert torch.equal(choose(candidates, params, torch.zeros(3, dtype=torch.int64)), logits.argmax(-1))


# ---- Hugging Face's processors, where the definitions agree (no ties at the k-th place) ----

HF_FILTERS = [
    ({"temperature": 0.7}, [hf.TemperatureLogitsWarper(0.7)]),
    ({"temperature": 1.0, "top_k": 5}, [hf.TopKLogitsWarper(5)]),
    ({"temperature": 1.0, "top_p": 0.8}, [hf.TopPLogitsWarper(0.8)]),
    ({"temperature": 1.0, "min_p": 0.1}, [hf.MinPLogitsWarper(0.1)]),
    (
        {"temperature": 1.4, "top_k": 64, "top_p": 0.95, "min_p": 0.02},
        [
            hf.TemperatureLogitsWarper(1.4),
            hf.TopKLogitsWarper(64),
            hf.TopPLogitsWarper(0.95),
            hf.MinPLogitsWarper(0.02),
        ],
    ),
    (
        {"temperature": 1.0, "repetition_penalty": 1.3, "top_k": 20},
        [hf.RepetitionPenaltyLogitsProcessor(1.3), hf.TopKLogitsWarper(20)],
    ),
]


@pytest.mark.parametrize(("values", "processors"), HF_FILTERS)
def test_filters_equal_hugging_face(values: Values, processors: Any) -> None:
    vocab, params = 300, SamplingParams(**values)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        logits = torch.randn(1, vocab, generator=generator) * 3
        prompt, output = torch.randint(0, vocab, (2, 10), generator=generator)
        history = TokenHistory(prompt, vocab, "cpu")
        history.commit(output)
        expected = logits
        for processor in processors:
            expected = processor(torch.cat([prompt, output]).unsqueeze(0), expected)
        counts = history.rows(torch.empty(0, dtype=torch.int64))
        probs = probabilities(process(logits, params, counts=counts), params, vocab)
        assert torch.equal(probs > 0, expected.softmax(-1) > 0)
        torch.testing.assert_close(probs, expected.softmax(-1))


# ---- history, reporting, parameters ----


@settings(deadline=None, max_examples=50)
@given(
    prompt=st.lists(tokens, min_size=1, max_size=5),
    rounds=st.lists(st.tuples(st.lists(tokens, min_size=1, max_size=5), st.integers(0, 5)), max_size=4),
    drafts=st.lists(tokens, max_size=5),
)
def test_history_counts_what_each_row_may_see(
    prompt: list[int], rounds: list[tuple[list[int], int]], drafts: list[int]
) -> None:
    history, output = TokenHistory(prompt, VOCAB, "cpu"), []
    for proposed, count in rounds:
        history.commit(torch.tensor(proposed), torch.tensor(count))
        output += proposed[:count]
    drafts_K = torch.tensor(drafts, dtype=torch.int64)
    counts = history.rows(drafts_K)
    for r in range(len(drafts) + 1):
        seen = Counter(output + drafts[:r])
        assert counts.output_RV[r].tolist() == [seen[token] for token in range(VOCAB)]
        assert counts.seen_RV[r].tolist() == [token in seen or token in prompt for token in range(VOCAB)]
    assert torch.equal(history.rows(drafts_K, first=len(drafts)).output_RV[0], counts.output_RV[-1])


def test_top_logprobs_report_the_models_own_distribution() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0]], dtype=torch.bfloat16)
    report = top_logprobs(logits, torch.tensor([3]), 3)
    expected = np.log(np.exp([1, 3, 3, 0]) / np.exp([1, 3, 3, 0]).sum())
    assert report.token_ids_RN.tolist() == [[1, 2, 0]]
    np.testing.assert_allclose(report.top_RN[0], expected[[1, 2, 0]], rtol=1e-6)
    np.testing.assert_allclose(report.chosen_R, expected[[3]], rtol=1e-6)
    assert top_logprobs(logits, torch.tensor([3]), 0).token_ids_RN.shape == (1, 0)
    assert top_logprobs(logits, torch.tensor([3]), 20).token_ids_RN.shape == (1, 4)


BAD_VALUES = [
    {"temperature": -0.1},
    {"temperature": math.nan},
    {"temperature": math.inf},
    {"temperature": "1"},
    {"temperature": 10**400},
    {"top_p": 10**400},
    {"top_k": -1},
    {"top_k": 1.5},
    {"top_p": 0.0},
    {"top_p": 1.01},
    {"top_p": math.nan},
    {"min_p": -0.1},
    {"min_p": 1.1},
    {"repetition_penalty": 0.0},
    {"repetition_penalty": math.inf},
    {"presence_penalty": 2.1},
    {"frequency_penalty": -2.1},
    {"logit_bias": {3: 101.0}},
    {"logit_bias": {3: math.inf}},
    {"logit_bias": {3: math.nan}},
    {"logit_bias": {-1: 1.0}},
    {"logit_bias": {"3": 1.0}},
    {"seed": -1},
    {"seed": 2**63},
    {"seed": True},
    {"max_tokens": 0},
    {"stop": ""},
    {"stop": ["a", ""]},
    {"stop": ["a\ud83d"]},
    {"stop": 3},
    {"stop": None},
    {"stop": [3]},
    {"stop": b"abc"},
    {"stop_token_ids": 5},
    {"stop_token_ids": "5"},
    {"logit_bias": [(3, 1.0)]},
    {"logit_bias": 5},
    {"logit_bias": {3: 10**400}},
    {"stop_token_ids": [-1]},
    {"logprobs": -1},
    {"logprobs": 21},
]


@pytest.mark.parametrize("values", BAD_VALUES, ids=str)
def test_a_bad_value_is_one_clear_sentence(values: Values) -> None:
    with pytest.raises(SamplingError, match=r"^[^\n]*, but must be [^\n]*\.$") as error:
        SamplingParams(**values)
    assert next(iter(values)).removesuffix("_ids").replace("_", " ").split()[0] in str(error.value)


def test_parameters_are_normalised() -> None:
    params = SamplingParams(stop="\n\n", stop_token_ids=[4, 5], logit_bias={7: -math.inf})
    assert params.stop == ("\n\n",) and params.stop_token_ids == (4, 5)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert dataclasses.replace(params, seed=2**63 - 1).seed == 2**63 - 1
    assert params.greedy and not params.uses_history and SamplingParams(presence_penalty=1).uses_history


def test_a_bias_beyond_the_vocabulary_is_refused() -> None:
    with pytest.raises(SamplingError, match="below the vocabulary size, 12"):
        process(torch.zeros(1, VOCAB), SamplingParams(logit_bias={VOCAB: 1.0}))


# ---- noise ----


def p_value_of_counts(counts: Tensor, expected: Tensor) -> float:
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    return float(stats.chi2.sf(statistic, counts.numel() - 1))


def test_uniforms_are_known_numbers() -> None:
    """A change of the generator changes every seeded output: it must be deliberate."""
    numbers = uniform(7, torch.tensor([0, 1_000_000]), torch.tensor([0, 262_143]), STREAM_CHOICE)
    assert numbers.tolist() == KNOWN_UNIFORMS


def test_uniforms_do_not_depend_on_the_shape_of_the_call() -> None:
    positions, ids = torch.arange(50, 60), torch.randint(0, 262_144, (10, 33))
    together = uniform(5, positions, ids, STREAM_CHOICE)
    for r in range(10):
        for c in (0, 17, 32):
            assert uniform(5, positions[r], ids[r, c : c + 1], STREAM_CHOICE) == together[r, c]
    noise = gumbel(5, positions, ids, STREAM_CHOICE)
    assert torch.equal(noise[3:4, 5:6], gumbel(5, positions[3:4], ids[3:4, 5:6], STREAM_CHOICE))


@pytest.mark.parametrize("vary", ["seed", "position", "token", "stream", "slot"])
def test_uniforms_are_uniform_and_neighbours_independent(vary: str) -> None:
    """Chi-square over a 16 x 16 grid of neighbouring pairs, 200k of them, for each argument that can vary."""
    n = 200_000
    zero, ids = torch.zeros(1, dtype=torch.int64), torch.arange(n + 1)
    match vary:
        case "seed":
            blocks = [uniform(seed, torch.arange(100), torch.arange(10), 0).flatten() for seed in range(201)]
            left, right = torch.cat(blocks[:-1]), torch.cat(blocks[1:])
        case "position":
            numbers = uniform(11, ids, zero, STREAM_CHOICE).squeeze(-1)
            left, right = numbers[:-1], numbers[1:]
        case "token":
            numbers = uniform(11, zero, ids, STREAM_CHOICE).squeeze(0)
            left, right = numbers[:-1], numbers[1:]
        case "stream":
            left, right = (uniform(11, ids[:n], zero, stream).squeeze(-1) for stream in (STREAM_DRAFT, STREAM_ACCEPT))
        case _:
            slots = uniform(11, round_counters(torch.arange(n), 2), zero, STREAM_ACCEPT).squeeze(-1)
            left, right = slots[:, 0], slots[:, 1]
    assert 0 < left.min() and left.max() < 1
    for bits in (left, right):  # low bits too: fractional part after a shift by 20 bits
        fraction = (bits * 2**20) % 1
        histogram = torch.histc(fraction.float(), bins=64, min=0, max=1)
        assert p_value_of_counts(histogram, torch.full((64,), len(left) / 64)) > FALSE_ALARM
    cells = torch.bincount((left * 16).long() * 16 + (right * 16).long(), minlength=256)
    assert p_value_of_counts(cells, torch.full((256,), len(left) / 256)) > FALSE_ALARM


@pytest.mark.parametrize("vary", ["position", "seed"])
def test_choices_follow_the_softmax(vary: str) -> None:
    logits, n = torch.linspace(-3, 2, 40).roll(7), 100_000
    params = SamplingParams(temperature=0.8, seed=42)
    candidates = process(logits.unsqueeze(0), params)
    if vary == "position":
        repeated = dataclasses.replace(candidates, logits_RC=candidates.logits_RC.expand(n, -1))
        chosen = choose(repeated, params, torch.arange(n))
    else:
        rows = dataclasses.replace(candidates, logits_RC=candidates.logits_RC.expand(100, -1))
        chosen = torch.cat(
            [choose(rows, dataclasses.replace(params, seed=s), torch.arange(100)) for s in range(n // 100)]
        )
    counts = torch.bincount(chosen, minlength=40)
    assert p_value_of_counts(counts, n * (logits / 0.8).softmax(-1)) > FALSE_ALARM
    assert p_value_of_counts(counts, n * (logits / 0.9).softmax(-1)) < FALSE_ALARM  # the test can tell


def test_rare_tokens_are_drawn_as_often_as_they_should() -> None:
    """Half the mass on one token, half spread evenly over the rest of a large vocabulary."""
    vocab, n = 50_000, 200
    logits = torch.zeros(1, vocab)
    logits[0, 123] = math.log(vocab - 1)
    chosen = choose(Candidates(logits.expand(n, -1), None), SamplingParams(temperature=1.0), torch.arange(n))
    assert stats.binomtest(int((chosen == 123).sum()), n, 0.5).pvalue > FALSE_ALARM
    assert len(set(chosen.tolist())) > n * 0.45
