"""One training step's gradient, computed block by block so that memory stays within a bound.

A block is as many sequences of a batch as fit: the target's pass over it, the drafter's unrolled steps, and backward
again, before the next block begins. Logits live for one slab of rows only: the gradient at the drafter's head states is
gathered slab by slab, then sent back through the unrolled steps in one go.

A slab has many rows, since each product with a table of V rows reads that table once. What is computed of its logits
(`losses.slab_loss`) goes tile by tile, a tile being a few whole rows that fit into a processor's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gemma_mtp.decoding.params import SamplingParams
from gemma_mtp.model.drafter import Drafter
from gemma_mtp.model.layers import rope_for, slice_rope
from gemma_mtp.model.target import Target
from gemma_mtp.ops.reference import softcap
from gemma_mtp.training.examples import Batch
from gemma_mtp.training.losses import LossKind, Wanted, choice_at, slab_loss, wanted, wide
from gemma_mtp.training.optim import traceable
from gemma_mtp.training.unroll import TargetRows, query_rope, target_rows, trained_head, unroll

#: logits of a tile: on a CPU a few buffers of so many numbers stay in the cache; a GPU wants larger kernels
TILE_LOGITS = {"cpu": 1 << 20, "cuda": 1 << 25}
#: from so many rows on, products with a table spend their time on sums, not on reading the table
SLAB_ROWS = 128
#: values of a piece of the table's gradient that are computed at once in bf16
PRODUCT_VALUES = 1 << 22

#: gives a block's rows from where they were kept, or lets the function given compute them
StoredRows = Callable[[Batch, Callable[[Tensor], TargetRows]], TargetRows]


@dataclass(frozen=True)
class Objective:
    """What is made small. `steps` drafts from every row; draft i's loss counts `step_decay` ** i.

    `own_tokens` is the chance that a row's drafts are fed the drafter's own tokens, so that its loss ends where they
    first part from the sequence, as decoding does; else they are fed the sequence's. Where own tokens agree with the
    sequence the two are the same, so instead of drawing, each later draft is weighted by the chance that it is reached.
    """

    loss: LossKind = "lk"
    steps: int = 5
    step_decay: float = 0.9
    own_tokens: float = 0.9
    top_k: int = 0
    top_p: float = 1.0
    hard_share: float = 0.5


@dataclass(frozen=True)
class StepStats:
    """Sums over rows: the loss, and for each draft the chance that it was reached, and reached and accepted."""

    loss: Tensor
    reached_K: Tensor
    accepted_K: Tensor

    @staticmethod
    def zeros(steps: int, device: torch.device) -> StepStats:
        return StepStats(*(torch.zeros(n, dtype=torch.float64, device=device) for n in (1, steps, steps)))


class DraftStep:
    """Adds a batch's gradient to the drafter's parameters. The target is only read."""

    def __init__(self, target: Target, drafter: Drafter, objective: Objective, length: int, compile: bool = False,
                 stored_rows: StoredRows | None = None) -> None:  # fmt: skip
        weight = drafter.norm.weight
        self.target, self.drafter, self.objective, self.device = target, drafter, objective, weight.device
        self.target_rope = rope_for(target.config, torch.arange(length, device=self.device), weight.dtype)
        self.query_rope = query_rope(drafter, length, weight.dtype)
        self.stored_rows = stored_rows
        self._target_rows: Callable[..., TargetRows] = target_rows
        self._unroll: Callable[..., list[Tensor]] = unroll
        if compile:
            traceable()
            self._target_rows = torch.compile(target_rows, dynamic=False)
            self._unroll = torch.compile(unroll, dynamic=False)

    @property
    def tile_rows(self) -> int:
        """Rows whose logits make a tile."""
        return max(1, TILE_LOGITS[self.device.type] // self.target.config.vocab_size)

    @property
    def best_slab_rows(self) -> int:
        """Rows of a slab where memory does not matter; more would not be faster."""
        return max(self.tile_rows, SLAB_ROWS)

    def block(
        self, block: Batch, counts: list[int], stats: StepStats, table_gradient: Tensor | None,
        slab_rows: int | None = None,
    ) -> None:  # fmt: skip
        """One block of a batch in which draft i has `counts[i]` rows. Adds to `stats` and to the gradients; that of the
        drafter's output table [V, H] is added to `table_gradient`, of fp32 (fp64 of fp64), so that it is there once for
        all blocks. With None for it, no gradient is computed. A slab has `slab_rows` rows, by default the
        `best_slab_rows`."""
        tokens_BT = block.tokens_BT.to(self.device)
        rows = self.compute_rows(tokens_BT) if self.stored_rows is None else self.stored_rows(block, self.compute_rows)
        with torch.set_grad_enabled(table_gradient is not None):
            states = self.unroll(rows, tokens_BT.shape[1])
        gradients = [torch.zeros_like(state, memory_format=torch.contiguous_format) for state in states]
        with torch.no_grad():
            for slab in self._slabs(block, tokens_BT, rows, states, slab_rows or self.best_slab_rows):
                slab.run(self.objective, counts, stats, gradients, table_gradient)
        if table_gradient is not None:
            torch.autograd.backward(states, gradients)

    def compute_rows(self, tokens_BT: Tensor) -> TargetRows:
        """The target's pass over tokens [B, T]."""
        tokens_BT = tokens_BT.to(self.device)
        return self._target_rows(self.target, tokens_BT, slice_rope(self.target_rope, 0, tokens_BT.shape[1]))

    def unroll(self, rows: TargetRows, length: int) -> list[Tensor]:
        """The drafter's states of every step."""
        return self._unroll(self.drafter, rows, slice_rope(self.query_rope, 0, length), self.objective.steps)

    def _slabs(
        self, block: Batch, tokens_BT: Tensor, rows: TargetRows, states: list[Tensor], size: int
    ) -> Iterator[Slab]:
        """Every draft of a block, in slabs of up to `size` rows that are drafted at one temperature."""
        flat, steps = [state.flatten(0, 1) for state in states], self.objective.steps
        for temperature, spans in slab_spans(block, tokens_BT.shape[1], size, steps):
            yield Slab(self.target, trained_head(self.drafter), tokens_BT.flatten(), rows.hidden_BTD.flatten(0, 1),
                       flat, SlabRows.of(spans, steps, self.device), temperature, self.tile_rows)  # fmt: skip


@dataclass(frozen=True)
class Span:
    """Rows start to stop - 1 of a sequence whose last token is at `last`, counted through the block's tokens [B * T]:
    row n's draft i is compared with token n + 2 + i, where there is one."""

    start: int
    stop: int
    last: int

    def rows(self, steps: int) -> int:
        """Rows that hold what the target says of all drafts that begin in the span, `steps` from each row."""
        return min(self.stop + steps - 1, self.last - 1) - self.start


def slab_spans(block: Batch, length: int, size: int, steps: int) -> Iterator[tuple[float, list[Span]]]:
    """The rows of a block with a token to compare with, in slabs of up to `size` rows, those behind the spans included
    that `SlabRows` adds for `steps` drafts; `size` is at least `steps`. Sequences of one temperature come after each
    other: few large slabs, since a GPU takes as long to be told of a small one."""
    by_temperature: dict[float, list[Span]] = {}
    for b, (first, count, temperature) in enumerate(zip(block.firsts, block.lengths, block.temperatures, strict=True)):
        start, last = b * length + first, b * length + count - 1
        if start < last - 1:
            by_temperature.setdefault(temperature, []).append(Span(start, last - 1, last))
    for temperature, spans in by_temperature.items():
        slab: list[Span] = []
        room = size
        for span in spans:
            start = span.start
            while start < span.stop:
                # rows to the sequence's end need none behind them
                stop = span.stop if span.stop - start <= room else start + room - (steps - 1)
                if stop <= start:
                    yield temperature, slab
                    slab, room = [], size
                    continue
                part = Span(start, stop, span.last)
                slab.append(part)
                start, room = stop, room - part.rows(steps)
        yield temperature, slab


@dataclass(frozen=True)
class SlabRows:
    """A slab's rows: their places `index_N` among a block's, and how many drafts of each are compared with a token.

    After each span stand the rows behind it that hold what the target says of the span's later drafts, so that draft i
    of every row takes it i rows further on; no draft of theirs is compared. `sizes[i]` rows have all that compare their
    draft i among them.
    """

    index_N: Tensor
    drafts_N: Tensor
    sizes: list[int]

    @staticmethod
    def of(spans: list[Span], steps: int, device: torch.device) -> SlabRows:
        index, drafts = [], []
        for span in spans:
            rows = np.arange(span.start, span.start + span.rows(steps))
            index.append(rows)
            drafts.append(np.where(rows < span.stop, np.minimum(span.last - 1 - rows, steps), 0))
        index_N, drafts_N = np.concatenate(index), np.concatenate(drafts)
        sizes = [int(np.flatnonzero(drafts_N > i)[-1]) + 1 for i in range(drafts_N.max())]
        return SlabRows(torch.from_numpy(index_N).to(device), torch.from_numpy(drafts_N).to(device), sizes)


@dataclass(frozen=True)
class Slab:
    """Every draft that begins at one of `rows`; tokens and states are a block's, its sequences end to end [B * T]."""

    target: Target
    table_VH: Tensor
    tokens_R: Tensor
    hidden_RD: Tensor
    states: list[Tensor]
    rows: SlabRows
    temperature: float
    tile_rows: int

    def run(
        self, objective: Objective, counts: list[int], stats: StepStats, gradients: list[Tensor], head: Tensor | None
    ) -> None:
        steps, index = objective.steps, self.rows.index_N
        choice = choice_at(self.temperature, objective.top_k, objective.top_p)
        aims = self._aims(choice, objective.hard_share)
        reached = torch.ones(len(index), dtype=torch.float32, device=index.device)
        for i, size in enumerate(self.rows.sizes):
            at, compared = index[:size], self.rows.drafts_N[:size] > i
            state, tokens = self.states[i][at], self.tokens_R[(at + (2 + i)).clamp(max=len(self.tokens_R) - 1)]
            reached = reached[:size] * compared
            weight = (objective.own_tokens * reached + (1 - objective.own_tokens)) * compared
            weight = weight * (objective.step_decay**i / (steps * max(1, counts[i])))
            logits = F.linear(state, self.table_VH)
            loss, chance = self._losses(objective.loss, logits, aims.rows(i, i + size), tokens, choice, weight)
            stats.loss.add_((loss * weight).sum())
            stats.reached_K[i] += reached.sum()
            reached = reached * chance
            stats.accepted_K[i] += reached.sum()
            if head is not None:
                # rows that are not compared add nothing here; they are another slab's, or nobody's
                gradients[i].flatten(0, 1).index_add_(0, at, logits @ self.table_VH)
                _add_product(head, logits, state)
            del logits  # before those of the next draft are made

    def _aims(self, choice: SamplingParams, hard_share: float) -> Wanted:
        """What the drafter's logits are compared with, of every row."""
        scores = self.target.scores(self.hidden_RD[self.rows.index_N + 1])
        cap = self.target.config.final_logit_softcapping
        probs = torch.empty(scores.shape, dtype=wide(scores.dtype), device=scores.device)
        entropy = probs.new_empty(len(probs))
        for tile in self._tiles(len(probs)):
            aim = wanted(softcap(scores[tile], cap), choice, hard_share)
            probs[tile], entropy[tile] = aim.probs_NV, aim.entropy_N
        return Wanted(probs, entropy)

    def _losses(
        self, kind: LossKind, logits: Tensor, aims: Wanted, tokens: Tensor, choice: SamplingParams, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The loss and the chance of acceptance of each row [N]. The gradient takes the logits' place, each row's times
        its `weight`."""
        loss, chance = (torch.empty(len(logits), dtype=wide(logits.dtype), device=logits.device) for _ in range(2))
        for tile in self._tiles(len(logits)):
            result = slab_loss(kind, logits[tile], aims.rows(tile.start, tile.stop), tokens[tile], choice)
            loss[tile], chance[tile] = result.loss_N, result.chance_N
            logits[tile] = result.grad_NV.mul_(weight[tile].unsqueeze(-1))
        return loss, chance

    def _tiles(self, rows: int) -> Iterator[slice]:
        yield from (slice(start, min(rows, start + self.tile_rows)) for start in range(0, rows, self.tile_rows))


def _add_product(sums_VH: Tensor, gradient_NV: Tensor, state_NH: Tensor) -> None:
    """Add the products' sum over rows. Where the sums are of a wider type, piece by piece, because a product and its
    wider copy are held beside them."""
    if sums_VH.dtype == state_NH.dtype:
        sums_VH.addmm_(gradient_NV.T, state_NH)
        return
    at_once = PRODUCT_VALUES // sums_VH.shape[1]
    for sums, gradient in zip(sums_VH.split(at_once), gradient_NV.split(at_once, dim=1), strict=True):
        sums.add_(gradient.T @ state_NH)
