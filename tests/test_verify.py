"""What each verification promises: `exact` the same tokens, `rejection` and `block` the same distribution."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from gemma_mtp.decoding import verify
from gemma_mtp.decoding.noise import STREAM_ACCEPT, STREAM_DRAFT, round_counters, uniform
from gemma_mtp.decoding.params import SamplingParams
from gemma_mtp.decoding.sampling import Candidates, choose, process
from gemma_mtp.decoding.verify import (
    Verified,
    agreeing,
    block_thresholds,
    block_weights,
    rejection_thresholds,
    residual_probs,
    verify_block,
    verify_exact,
    verify_rejection,
)

Verify = Callable[[Tensor, Tensor, Tensor, int, Tensor], Verified]
VERIFIERS: list[Verify] = [verify_rejection, verify_block]
FALSE_ALARM = 1e-7  # of each statistical test; inputs are fixed, so a pass stays a pass
SAMPLED = SamplingParams(temperature=1.0, seed=2024)


@dataclass(frozen=True)
class Tables:
    """A target and a drafter over a tiny vocabulary: [V, V, V] next-token probabilities given the last two tokens."""

    target: Tensor
    draft: Tensor

    @property
    def vocab(self) -> int:
        return self.target.shape[-1]


def make_tables(seed: int, vocab: int, spread: float = 1.0) -> Tables:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, vocab, vocab, vocab, generator=generator, dtype=torch.float64) * spread
    target, draft = (0.3 * logits[0] + logits).softmax(-1)  # the drafter knows something of the target
    return Tables(target, draft)


def next_probs(table: Tensor, context: Tensor) -> Tensor:
    """[N, V] after `context` [N, at least 2]."""
    return table[context[:, -2], context[:, -1]]


def draft_round(tables: Tables, context: Tensor, first_position: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draft k tokens: target_probs [N, k+1, V], draft_probs [N, k, V], drafts [N, k]."""
    counters = round_counters(first_position, k)
    draft_probs, n_context = [], context.shape[1]
    for slot in range(k):
        draft_probs.append(next_probs(tables.draft, context))
        candidates = Candidates(draft_probs[-1].log(), None)
        token = choose(candidates, SAMPLED, counters[:, slot], STREAM_DRAFT)
        context = torch.cat([context, token.unsqueeze(-1)], dim=-1)
    target_probs = [next_probs(tables.target, context[:, : n_context + i]) for i in range(k + 1)]
    return torch.stack(target_probs, 1), torch.stack(draft_probs, 1), context[:, n_context:]


def last_two(context: Tensor, committed: Tensor) -> Tensor:
    """Each row's last two of `committed` [N] tokens, the starting pair (0, 0) included."""
    index = committed.unsqueeze(-1) + torch.arange(2)
    return context.gather(-1, index)


def simulate(tables: Tables, check: Verify, k: int, n: int, declared_draft: Tensor | None = None) -> Tensor:
    """First three tokens [n, 3] of n sequences decoded in rounds.

    `declared_draft`: what verification is told where that is not the drafter's own table.
    Sequences share one seed; what keeps them apart is the position that each starts from.
    """
    context, committed = torch.zeros(n, 2 + 3 * (k + 1), dtype=torch.int64), torch.zeros(n, dtype=torch.int64)
    starts = torch.arange(n) * 64
    for _ in range(3):
        recent = last_two(context, committed)
        target_probs, draft_probs, drafts = draft_round(tables, recent, starts + committed, k)
        if declared_draft is not None:
            lie = torch.cat([recent, drafts], dim=-1)
            draft_probs = torch.stack([next_probs(declared_draft, lie[:, : 2 + i]) for i in range(k)], 1)
        verified = check(target_probs, draft_probs, drafts, SAMPLED.seed, starts + committed)
        slots = 2 + committed.unsqueeze(-1) + torch.arange(k + 1)
        context.scatter_(-1, slots, verified.tokens)  # what lies beyond n_accepted + 1 is overwritten by the next round
        committed = committed + verified.n_accepted + 1
    return context[:, 2:5]


def joint_of_three(table: Tensor) -> Tensor:
    """Exact probabilities [V, V, V] of the first three tokens after (0, 0)."""
    return table[0, 0][:, None, None] * table[0][:, :, None] * table


def p_value(tokens: Tensor, expected: Tensor) -> float:
    vocab = expected.shape[0]
    cells = (tokens[:, 0] * vocab + tokens[:, 1]) * vocab + tokens[:, 2]
    counts = torch.bincount(cells, minlength=vocab**3)
    expected_counts = len(tokens) * expected.flatten()
    # rare cells would break the chi-square approximation: they count as one
    bins = torch.where(expected_counts < 20, 0, torch.arange(1, vocab**3 + 1))
    pooled, expected_pooled = (
        torch.zeros(vocab**3 + 1, dtype=torch.float64).index_add(0, bins, x) for x in (counts.double(), expected_counts)
    )
    used = expected_pooled > 5
    statistic = ((pooled - expected_pooled) ** 2 / expected_pooled)[used].sum().item()
    return float(stats.chi2.sf(statistic, int(used.sum()) - 1))


# ---- distribution: chi-square over many simulated sequences ----


@pytest.mark.parametrize("check", VERIFIERS)
@pytest.mark.parametrize(("vocab", "k"), [(4, 1), (4, 2), (4, 4), (6, 3)])
def test_three_tokens_have_the_targets_joint_distribution(check: Verify, vocab: int, k: int) -> None:
    tables = make_tables(seed=10 * vocab + k, vocab=vocab)
    tokens = simulate(tables, check, k, n=80_000)
    assert p_value(tokens, joint_of_three(tables.target)) > FALSE_ALARM


@pytest.mark.parametrize("check", VERIFIERS)
def test_misdeclared_draft_probabilities_are_caught(check: Verify) -> None:
    """The negative control: drafts come from one table, verification is told a slightly different one."""
    tables = make_tables(seed=3, vocab=4)
    declared = tables.draft.pow(0.8)
    declared = declared / declared.sum(-1, keepdim=True)
    assert p_value(simulate(tables, check, 3, 80_000), joint_of_three(tables.target)) > FALSE_ALARM
    lied = simulate(tables, check, 3, 80_000, declared_draft=declared)
    assert p_value(lied, joint_of_three(tables.target)) < FALSE_ALARM


def test_block_needs_noise_of_its_own_in_each_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise keyed by position alone is used twice after a rejection: the reason for `round_counters`."""

    def by_position(first_position: Tensor, count: int) -> Tensor:
        return first_position.unsqueeze(-1) + torch.arange(count)

    monkeypatch.setattr(verify, "round_counters", by_position)
    monkeypatch.setitem(globals(), "round_counters", by_position)
    tables = make_tables(seed=5, vocab=4)
    biased = simulate(tables, verify_block, 3, 160_000)
    assert p_value(biased, joint_of_three(tables.target)) < FALSE_ALARM
    monkeypatch.undo()
    assert p_value(simulate(tables, verify_block, 3, 160_000), joint_of_three(tables.target)) > FALSE_ALARM


# ---- distribution: exact, by integrating over the tests' uniforms and summing over all drafts ----


def length_law(check: Verify, target_probs: Tensor, draft_probs: Tensor, drafts: Tensor) -> Tensor:
    """[M, K+1]: chance that n drafts are accepted, given the drafts."""
    if check is verify_rejection:
        passes = rejection_thresholds(target_probs, draft_probs, drafts)
        reached = torch.cat([torch.ones_like(passes[:, :1]), passes.cumprod(-1)], -1)
        stops = torch.cat([1 - passes, torch.ones_like(passes[:, :1])], -1)
        return reached * stops
    weights = block_weights(target_probs, draft_probs, drafts)
    passes = torch.cat([torch.ones_like(weights[:, :1]), block_thresholds(target_probs, draft_probs, weights)], -1)
    longer_fail = torch.cat([(1 - passes[:, 1:]).flip(-1).cumprod(-1).flip(-1), torch.ones_like(passes[:, :1])], -1)
    return passes * longer_fail


def all_drafts(tables: Tables, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Every draft sequence after (0, 0): target_probs, draft_probs, drafts [V**k, k] and their chances."""
    drafts = torch.tensor(list(itertools.product(range(tables.vocab), repeat=k)), dtype=torch.int64)
    context = torch.cat([torch.zeros(len(drafts), 2, dtype=torch.int64), drafts], -1)
    target_probs = torch.stack([next_probs(tables.target, context[:, : 2 + i]) for i in range(k + 1)], 1)
    draft_probs = torch.stack([next_probs(tables.draft, context[:, : 2 + i]) for i in range(k)], 1)
    chances = draft_probs.gather(-1, drafts.unsqueeze(-1)).squeeze(-1).prod(-1)
    return target_probs, draft_probs, drafts, chances


def output_law(tables: Tables, check: Verify, k: int) -> Tensor:
    """Exact law [V] * (k+1) of the first k+1 tokens: one round, then plain decoding."""
    return round_law(tables, check, k, *all_drafts(tables, k))


def round_law(
    tables: Tables, check: Verify, k: int, target_probs: Tensor, draft_probs: Tensor, drafts: Tensor, chances: Tensor
) -> Tensor:
    """Of rounds with these drafts, each with its chance, continued by plain decoding to k+1 tokens."""
    lengths = length_law(check, target_probs, draft_probs, drafts)
    weights = block_weights(target_probs, draft_probs, drafts)
    if check is verify_rejection:
        weights = torch.ones_like(weights)
    law = torch.zeros([tables.vocab] * (k + 1), dtype=torch.float64)
    for n in range(drafts.shape[1] + 1):
        residual = residual_probs(target_probs, draft_probs, weights, torch.full((len(drafts),), n))
        residual = residual / residual.sum(-1, keepdim=True)
        for m, prefix in enumerate(drafts[:, :n].tolist()):
            for tail in itertools.product(range(tables.vocab), repeat=k + 1 - n):
                tokens = [0, 0, *prefix, *tail]
                weight = chances[m] * lengths[m, n] * residual[m, tail[0]]
                for i in range(n + 3, len(tokens)):
                    weight = weight * tables.target[tokens[i - 2], tokens[i - 1], tokens[i]]
                law[tuple(tokens[2:])] += weight
    return law


@pytest.mark.parametrize("check", VERIFIERS)
@pytest.mark.parametrize(("vocab", "k"), [(3, 1), (4, 2), (3, 3)])
def test_the_output_law_is_the_targets_exactly(check: Verify, vocab: int, k: int) -> None:
    tables = make_tables(seed=vocab + k, vocab=vocab, spread=2.0)
    expected = next_probs(tables.target, torch.zeros(1, 2, dtype=torch.int64))[0]
    for length in range(1, k + 1):
        prefixes = itertools.product(range(vocab), repeat=length)
        rows = [tables.target[tuple([0, 0, *prefix][-2:])] for prefix in prefixes]
        expected = expected.unsqueeze(-1) * torch.stack(rows).view([vocab] * (length + 1))
    torch.testing.assert_close(output_law(tables, check, k), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_block_accepts_at_least_as_many_as_rejection_on_average(k: int) -> None:
    gains = []
    for seed in range(20):
        tables = make_tables(seed, vocab=4, spread=1.5)
        target_probs, draft_probs, drafts, chances = all_drafts(tables, k)
        lengths = torch.arange(k + 1, dtype=torch.float64)
        means = [
            (chances @ length_law(check, target_probs, draft_probs, drafts) @ lengths).item() for check in VERIFIERS
        ]
        gains.append(means[1] - means[0])
    assert min(gains) >= -1e-12
    assert k == 1 or min(gains) > 1e-4


def test_block_accepts_more_in_paired_rounds() -> None:
    tables, n = make_tables(seed=8, vocab=6), 50_000
    context, first_position = torch.zeros(n, 2, dtype=torch.int64), torch.arange(n) * 64
    target_probs, draft_probs, drafts = draft_round(tables, context, first_position, 4)
    accepted = [
        check(target_probs, draft_probs, drafts, SAMPLED.seed, first_position).n_accepted.double().mean().item()
        for check in VERIFIERS
    ]
    assert accepted[1] > accepted[0]


# ---- each function against literal loops ----


def loop_length(check: Verify, target: Tensor, draft: Tensor, drafts: Tensor, tests: list[float]) -> int:
    """The papers' loops, one sequence, Python floats."""
    n, weight = 0, 1.0
    for i, token in enumerate(drafts.tolist()):
        ratio = float(target[i, token] / draft[i, token])
        if check is verify_rejection:
            if tests[i] >= min(1.0, ratio):
                break
            n = i + 1
            continue
        weight = min(1.0, weight * ratio)
        threshold = weight
        if i + 1 < len(drafts):
            excess = sum(
                max(weight * float(t) - float(d), 0.0) for t, d in zip(target[i + 1], draft[i + 1], strict=True)
            )
            threshold = excess / (excess + 1 - weight) if excess + 1 - weight > 0 else 1.0
        if tests[i] < threshold:
            n = i + 1
    return n


@settings(max_examples=300)
@given(
    check=st.sampled_from(VERIFIERS),
    table_seed=st.integers(0, 10_000),
    k=st.integers(0, 8),
    spread=st.sampled_from([0.1, 1.0, 3.0]),
    position=st.integers(0, 262_143),
)
def test_verification_equals_the_papers_loops(
    check: Verify, table_seed: int, k: int, spread: float, position: int
) -> None:
    generator = torch.Generator().manual_seed(table_seed)
    target = (torch.randn(k + 1, 7, generator=generator) * spread).softmax(-1)
    draft = (torch.randn(k, 7, generator=generator) * spread).softmax(-1)
    drafts = torch.multinomial(draft, 1, generator=generator).squeeze(-1) if k else torch.empty(0, dtype=torch.int64)
    verified = check(target, draft, drafts, 99, torch.tensor(position))
    counters = round_counters(torch.tensor(position), k)
    tests = uniform(99, counters, torch.zeros(1, dtype=torch.int64), STREAM_ACCEPT).squeeze(-1).tolist()
    n = loop_length(check, target.double(), draft.double(), drafts, tests)
    assert verified.n_accepted == n
    assert verified.tokens.shape == (k + 1,) and torch.equal(verified.tokens[:n], drafts[:n])
    if check is verify_rejection and n < k:
        assert target[n, verified.tokens[n]] > draft[n, verified.tokens[n]]  # a correction comes from the excess


@settings(max_examples=200)
@given(choices=st.lists(st.integers(0, 2), min_size=1, max_size=9), data=st.data())
def test_exact_keeps_drafts_until_the_first_that_differs(choices: list[int], data: st.DataObject) -> None:
    drafts = data.draw(st.lists(st.integers(0, 2), min_size=len(choices) - 1, max_size=len(choices) - 1))
    n = 0
    while n < len(drafts) and drafts[n] == choices[n]:
        n += 1
    verified = verify_exact(torch.tensor(choices), torch.tensor(drafts, dtype=torch.int64))
    assert verified.n_accepted == n
    assert verified.tokens[: n + 1].tolist() == drafts[:n] + choices[n : n + 1]


@settings(max_examples=100)
@given(choices=st.lists(st.integers(0, 4), min_size=1, max_size=7), data=st.data())
def test_greedy_rejection_and_block_equal_exact(choices: list[int], data: st.DataObject) -> None:
    drafts = torch.tensor(data.draw(st.lists(st.integers(0, 4), min_size=len(choices) - 1, max_size=len(choices) - 1)))
    drafts = drafts.to(torch.int64)
    target = torch.nn.functional.one_hot(torch.tensor(choices), 5).float()
    draft = torch.nn.functional.one_hot(drafts, 5).float()
    exact = verify_exact(torch.tensor(choices), drafts)
    for check in VERIFIERS:
        verified = check(target, draft, drafts, 0, torch.tensor(3))
        n = int(verified.n_accepted)
        assert n == exact.n_accepted
        assert torch.equal(verified.tokens[: n + 1], exact.tokens[: n + 1])


@pytest.mark.parametrize("check", VERIFIERS)
def test_a_drafter_equal_to_the_target_is_always_accepted(check: Verify) -> None:
    tables = make_tables(seed=1, vocab=5)
    same = Tables(tables.target, tables.target)
    starts = torch.arange(5_000) * 64
    drafted = draft_round(same, torch.zeros(5_000, 2, dtype=torch.int64), starts, 4)
    assert (check(*drafted, SAMPLED.seed, starts).n_accepted == 4).all()


@pytest.mark.parametrize("check", VERIFIERS)
def test_rows_of_a_batch_do_not_touch_each_other(check: Verify) -> None:
    tables, starts = make_tables(seed=2, vocab=5), torch.arange(40) * 64
    drafted = draft_round(tables, torch.zeros(40, 2, dtype=torch.int64), starts, 3)
    together = check(*drafted, SAMPLED.seed, starts)
    for i in range(40):
        a, b, c = (x[i] for x in drafted)
        alone = check(a, b, c, SAMPLED.seed, starts[i])
        n = int(alone.n_accepted)
        assert n == together.n_accepted[i] and torch.equal(alone.tokens[: n + 1], together.tokens[i, : n + 1])


# ---- exact verification over choices: any drafter, the same tokens ----


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.5])
@pytest.mark.parametrize("k", [1, 2, 5, 8])
@pytest.mark.parametrize("drafter", ["same", "other", "always wrong"])
def test_exact_gives_what_plain_decoding_gives(temperature: float, k: int, drafter: str) -> None:
    tables, length = make_tables(seed=7, vocab=6), 42
    params = SamplingParams(temperature=temperature, seed=31)

    def pick(table: Tensor, tokens: list[int], position: int) -> int:
        logits = table[tokens[-2], tokens[-1]].log().float().unsqueeze(0)
        return int(choose(process(logits, params), params, torch.tensor([position])))

    plain = [0, 0]
    while len(plain) < length:
        plain.append(pick(tables.target, plain, len(plain)))

    drafted, rounds = [0, 0], 0
    while len(drafted) < length:
        rounds, guess = rounds + 1, list(drafted)
        for _ in range(k):
            token = pick(tables.draft if drafter == "other" else tables.target, guess, len(guess))
            guess.append((token + 1) % 6 if drafter == "always wrong" else token)
        drafts = guess[len(drafted) :]
        rows = [(drafted + drafts[:i])[-2:] for i in range(k + 1)]
        logits = torch.stack([tables.target[a, b].log().float() for a, b in rows])
        positions = torch.arange(len(drafted), len(drafted) + k + 1)
        verified = verify_exact(choose(process(logits, params), params, positions), torch.tensor(drafts))
        drafted += verified.tokens[: int(verified.n_accepted) + 1].tolist()
    assert drafted[:length] == plain
    if drafter == "same":  # the same noise on both sides: a perfect drafter is never turned down
        assert rounds == math.ceil((length - 2) / (k + 1))


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=8), st.integers(0, 2))
def test_counting_on_the_host_is_verify_exact(pairs: list[tuple[int, int]], last: int) -> None:
    choices, drafts = [*(choice for choice, _ in pairs), last], [draft for _, draft in pairs]
    verified = verify_exact(torch.tensor(choices), torch.tensor(drafts, dtype=torch.int64))
    assert agreeing(choices, drafts) == int(verified.n_accepted)
