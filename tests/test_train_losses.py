"""Losses and their written-out gradients, against autograd, finite differences in float64, and enumeration."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import TINY, random_drafter, random_target
from torch import Tensor

from gemma_mtp.decoding.params import SamplingParams
from gemma_mtp.decoding.sampling import choose, process
from gemma_mtp.model.drafter import Drafter
from gemma_mtp.training import step as step_module
from gemma_mtp.training.examples import Batch
from gemma_mtp.training.losses import LK_ETA, LOSSES, LossKind, choice_at, coupled_chance, slab_loss, wanted, wide
from gemma_mtp.training.step import TILE_LOGITS, DraftStep, Objective, SlabRows, StepStats, slab_spans

N, V = 5, 11


def logits(seed: int, rows: int = N, spread: float = 2.0) -> Tensor:
    return spread * torch.randn(rows, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def obvious_loss(kind: LossKind, z: Tensor, p: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """The loss of each row, written for autograd."""
    log_q = (z / temperature).log_softmax(-1)
    kl = (p * (p.clamp(min=1e-300).log() - log_q)).sum(-1)
    alpha = torch.minimum(p, log_q.exp()).sum(-1)
    if kind == "lk":
        share = (-LK_ETA * alpha).exp().detach()
        return share * kl + (1 - share) * (1 - alpha)
    ce = -log_q.gather(-1, tokens[:, None])[:, 0]
    return {"kl": kl, "ce": ce, "tv": 1 - alpha, "lk-log": -alpha.log()}[kind]


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000), spread=st.floats(0.1, 6.0))
def test_loss_and_gradient_are_autograds(kind: LossKind, temperature: float, seed: int, spread: float) -> None:
    z, choice = logits(seed, spread=spread).requires_grad_(), choice_at(temperature)
    aim = wanted(logits(seed + 1, spread=spread), choice, 0.5)
    tokens = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(seed))
    expected = obvious_loss(kind, z, aim.probs_NV.double(), tokens, temperature or 1.0)
    (gradient,) = torch.autograd.grad(expected.sum(), z)
    result = slab_loss(kind, z.detach(), aim, tokens, choice)
    torch.testing.assert_close(result.loss_N, expected.detach(), rtol=1e-5, atol=1e-5)  # p comes in float32
    torch.testing.assert_close(result.grad_NV, gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("choice", [choice_at(0.7), choice_at(1.0, top_k=4), choice_at(1.0, top_p=0.8)])
def test_wanted_is_what_decoding_draws_from(choice: SamplingParams) -> None:
    """20,000 tokens drawn by the engine's own rule: each share within 5 standard deviations (false alarm below 1e-4
    over all cells); removed tokens never."""
    z = logits(3, rows=1).float()
    p = wanted(z, choice, 0.5).probs_NV[0].double()
    count = 20_000
    rows = process(z, choice)
    ids = None if rows.token_ids_RC is None else rows.token_ids_RC.expand(count, -1)
    rows = replace(rows, logits_RC=rows.logits_RC.expand(count, -1), token_ids_RC=ids)
    drawn = choose(rows, choice, torch.arange(count)).bincount(minlength=V) / count
    assert (drawn - p).abs().le(5 * (p * (1 - p) / count).sqrt() + 1e-9).all()
    assert p.sum() == pytest.approx(1, abs=1e-5)


def test_greedy_wants_the_argmax_and_a_share_of_the_rest() -> None:
    z = logits(5)
    hard, half = (wanted(z, choice_at(0.0), share).probs_NV for share in (1.0, 0.5))
    assert torch.equal(hard, torch.nn.functional.one_hot(z.argmax(-1), V).float())
    torch.testing.assert_close(half, 0.5 * hard.double() + 0.5 * z.softmax(-1))


def test_the_coupled_chance_is_that_of_the_engine() -> None:
    """Target and drafter choose with the same noise; given the target's token, the share of equal drafts is the
    formula's, within 5 standard deviations for every token seen 200 times or more (false alarm below 1e-4)."""
    p_logits, q_logits, count = logits(1, 1).float(), logits(2, 1).float(), 40_000
    choice, positions = choice_at(1.0), torch.arange(40_000)
    of_target, of_drafter = (
        choose(process(z.expand(count, -1), choice), choice, positions) for z in (p_logits, q_logits)
    )
    p, q = p_logits.softmax(-1), q_logits.softmax(-1)
    checked = 0
    for token in range(V):
        drawn = of_drafter[of_target == token]
        if len(drawn) < 200:
            continue
        chance = coupled_chance(p, q, torch.tensor([[token]])).item()
        share = (drawn == token).double().mean().item()
        assert abs(share - chance) < 5 * math.sqrt(chance * (1 - chance) / len(drawn)) + 1e-3
        checked += 1
    assert checked >= 4


def loss_of(step: DraftStep, batch: Batch, counts: list[int]) -> float:
    stats = StepStats.zeros(step.objective.steps, torch.device("cpu"))
    step.block(batch, counts, stats, None)
    return stats.loss.item()


def gradients_of(
    step: DraftStep, drafter: Drafter, blocks: list[Batch], counts: list[int], stats: StepStats, rows: int | None = None
) -> dict[str, Tensor]:
    """Each parameter's gradient by its name, of no other step; the output table's is of fp32, or of fp64."""
    table = drafter.embed_tokens.weight
    of_table = torch.zeros_like(table, dtype=wide(table.dtype))
    for block in blocks:
        step.block(block, counts, stats, of_table, rows)
    assert table.grad is None
    found = {name: p.grad for name, p in drafter.named_parameters() if p.grad is not None}
    assert len(found) == len(list(drafter.parameters())) - 1
    drafter.zero_grad()
    return {**found, "embed_tokens.weight": of_table}


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Sequences of two temperatures by turns, of which one ends at its padding and one has a single row."""
    tokens = torch.randint(0, TINY.vocab_size, (4, 24), generator=torch.Generator().manual_seed(0))
    return Batch(tokens, (24, 19, 13, 9), (0, 6, 3, 6), (1.0, 0.0, 1.0, 0.0), (0, 1, 2, 3))


def doubled_step(objective: Objective) -> tuple[DraftStep, Drafter]:
    drafter = random_drafter().double().requires_grad_(True)
    return DraftStep(random_target().double(), drafter, objective, 24), drafter


@pytest.mark.parametrize("kind", ["kl", "ce", "tv", "lk-log"])
def test_gradients_are_finite_differences(kind: LossKind, batch: Batch) -> None:
    """Every parameter along a random direction, central differences in float64, through three unrolled steps; of all
    losses but one every fourth, for what is below the loss is the same.

    With the sequence's tokens fed and weights that do not depend on the drafter (`own_tokens` 0), the loss's value is
    what its gradient is of; `lk` and `own_tokens` above 0 hold some of it constant, see the next test.
    """
    step, drafter = doubled_step(Objective(kind, steps=3, own_tokens=0.0))
    counts = batch.reached(3)
    stats = StepStats.zeros(3, torch.device("cpu"))
    rows = step.compute_rows(batch.tokens_BT)  # the target's, which no parameter of the drafter's changes
    step.stored_rows = lambda *_: rows
    gradients = gradients_of(step, drafter, [batch], counts, stats)
    generator, h = torch.Generator().manual_seed(1), 5e-7
    for name, parameter in list(drafter.named_parameters())[:: 1 if kind == "kl" else 4]:
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        slope = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * h * direction)
                slope.append(loss_of(step, batch, counts))
                parameter.sub_(sign * h * direction)
        numeric = (slope[0] - slope[1]) / (2 * h)
        assert (gradients[name] * direction).sum().item() == pytest.approx(numeric, rel=2e-5, abs=2e-8), name


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("own_tokens", [0.0, 0.7, 1.0])
def test_a_step_is_its_obvious_form(kind: LossKind, own_tokens: float, batch: Batch) -> None:
    """Loss, counts and gradients against whole-vocabulary autograd over the same rows, weights detached."""
    objective = Objective(kind, steps=3, own_tokens=own_tokens)
    step, drafter = doubled_step(objective)
    stats, counts = StepStats.zeros(3, torch.device("cpu")), batch.reached(3)
    gradients = gradients_of(step, drafter, [batch], counts, stats)
    loss, reached_K, accepted_K = obvious_step(step, batch, counts)
    loss.backward()
    assert stats.loss.item() == pytest.approx(loss.item(), rel=1e-6)
    assert stats.reached_K.tolist() == pytest.approx(reached_K, rel=1e-6)
    assert stats.accepted_K.tolist() == pytest.approx(accepted_K, rel=1e-6)
    for name, parameter in drafter.named_parameters():
        assert parameter.grad is not None, name
        largest = parameter.grad.abs().max().item()  # the target's probabilities are float32
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-5, atol=1e-6 * largest)


def obvious_step(step: DraftStep, batch: Batch, counts: list[int]) -> tuple[Tensor, list[float], list[float]]:
    objective, K = step.objective, step.objective.steps
    rows = step.compute_rows(batch.tokens_BT)
    states, logits_BTV = step.unroll(rows, batch.tokens_BT.shape[1]), step.target.logits(rows.hidden_BTD)
    total, reached_K, accepted_K = torch.zeros((), dtype=torch.float64), [0.0] * K, [0.0] * K
    for b in range(len(batch.lengths)):
        choice = choice_at(batch.temperatures[b])
        for t in range(batch.firsts[b], batch.lengths[b] - 2):
            reached = 1.0
            for i in range(min(K, batch.lengths[b] - 2 - t)):
                z, token = step.drafter.logits(states[i][b, t])[None], batch.tokens_BT[b, t + 2 + i].view(1)
                p = wanted(logits_BTV[b, t + 1 + i][None], choice, objective.hard_share).probs_NV.double()
                weight = objective.own_tokens * reached + 1 - objective.own_tokens
                cost = obvious_loss(objective.loss, z, p, token, batch.temperatures[b] or 1.0)[0]
                total = total + objective.step_decay**i * weight * cost / (K * counts[i])
                q = (z / (batch.temperatures[b] or 1.0)).softmax(-1)
                greedy = float(z.argmax() == token)
                chance = greedy if choice.greedy else coupled_chance(p, q, token[:, None]).item()
                reached_K[i] += reached
                reached *= chance
                accepted_K[i] += reached
    return total, reached_K, accepted_K


@pytest.mark.parametrize(("slab_rows", "tile_rows"), [(3, 1), (4, 9), (7, 2), (1000, 5), (1000, 1000)])
def test_blocks_slabs_and_tiles_of_any_size_give_the_same_gradient(
    slab_rows: int, tile_rows: int, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, drafter = doubled_step(Objective(steps=3))
    counts, found = batch.reached(3), []
    for block, rows, tile in ((4, 1000, 1000), (1, slab_rows, tile_rows), (3, slab_rows, tile_rows),
                              (4, slab_rows, tile_rows)):  # fmt: skip
        monkeypatch.setitem(TILE_LOGITS, "cpu", tile * TINY.vocab_size)
        assert step.tile_rows == tile
        stats = StepStats.zeros(3, torch.device("cpu"))
        blocks = [batch.rows(first, first + block) for first in range(0, 4, block)]
        gradients = gradients_of(step, drafter, blocks, counts, stats, rows)
        found.append([stats.loss, stats.reached_K, stats.accepted_K, *gradients.values()])
    for each in found[1:]:
        for one, other in zip(found[0], each, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_tables_gradient_goes_where_it_is_wanted(
    dtype: torch.dtype, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Added to what is there, in pieces or whole, and not to the parameter's own gradient."""
    step, drafter = doubled_step(Objective(steps=3))
    step.target.to(dtype), drafter.to(dtype)
    step = DraftStep(step.target, drafter, step.objective, 24)
    counts, stats = batch.reached(3), StepStats.zeros(3, torch.device("cpu"))
    table = drafter.embed_tokens.weight
    own = gradients_of(step, drafter, [batch], counts, stats)["embed_tokens.weight"]
    added = torch.ones_like(own)
    monkeypatch.setattr(step_module, "PRODUCT_VALUES", 7 * table.shape[1])
    step.block(batch, counts, stats, added)
    assert table.grad is None
    tolerance = 1e-12 if dtype == torch.float64 else 1e-2
    torch.testing.assert_close(added - 1, own, rtol=tolerance, atol=tolerance * own.abs().max().item())


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("size", [3, 4, 7, 1000])
def test_slabs_hold_every_row_once_and_stay_small(size: int, steps: int, batch: Batch) -> None:
    """Small with the rows behind each span, which the target's probabilities are kept of, too."""
    held: dict[float, list[int]] = {1.0: [], 0.0: []}
    slabs = 0
    for temperature, spans in slab_spans(batch, 24, size, steps):
        rows = [row for span in spans for row in range(span.start, span.stop)]
        assert 0 < len(rows) <= size
        assert len(SlabRows.of(spans, steps, torch.device("cpu")).index_N) <= size
        held[temperature] += rows
        slabs += 1
    expected = {
        wanted_temperature: [24 * b + t for b in range(4) if batch.temperatures[b] == wanted_temperature
                             for t in range(batch.firsts[b], batch.lengths[b] - 2)]
        for wanted_temperature in (1.0, 0.0)
    }  # fmt: skip
    assert held == expected
    if steps == 1 or size == 1000:
        assert slabs == sum(-(-len(rows) // size) for rows in expected.values())
