"""One training step's gradient, computed block by block so that memory stays within a bound.

A block is as many sequences of a batch as fit: the target's pass over it, the drafter's unrolled steps, and backward
again, before the next block begins. Logits live for one slab of rows only: the gradient at the drafter's head states is
gathered slab by slab (`losses.slab_loss`), then sent back through the unrolled steps in one go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gemma_mtp.model.drafter import Drafter
from gemma_mtp.model.layers import rope_for, slice_rope
from gemma_mtp.model.target import Target
from gemma_mtp.training.examples import Batch
from gemma_mtp.training.losses import LossKind, choice_at, slab_loss, wanted
from gemma_mtp.training.optim import traceable
from gemma_mtp.training.unroll import TargetRows, query_rope, target_rows, trained_head, unroll

#: logits of a slab: on a CPU a few buffers of so many numbers stay in the cache; a GPU wants larger kernels
SLAB_LOGITS = {"cpu": 1 << 20, "cuda": 1 << 25}

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

    def block(self, block: Batch, counts: list[int], stats: StepStats, backward: bool = True) -> None:
        """One block of a batch in which draft i has `counts[i]` rows. Adds to `stats` and to the gradients."""
        tokens_BT = block.tokens_BT.to(self.device)
        rows = self.compute_rows(tokens_BT) if self.stored_rows is None else self.stored_rows(block, self.compute_rows)
        with torch.set_grad_enabled(backward):
            states = self.unroll(rows, tokens_BT.shape[1])
        gradients = (
            [torch.zeros_like(state, memory_format=torch.contiguous_format) for state in states] if backward else []
        )
        table = trained_head(self.drafter)
        head = torch.zeros_like(table, dtype=_wide(table)) if backward else None
        with torch.no_grad():
            for slab in self._slabs(block, tokens_BT, rows, states):
                slab.run(self.objective, counts, stats, gradients, head)
        if head is not None:
            torch.autograd.backward(states, gradients)
            table.grad = head.to(table.dtype) if table.grad is None else table.grad.add_(head)

    def compute_rows(self, tokens_BT: Tensor) -> TargetRows:
        """The target's pass over tokens [B, T]."""
        tokens_BT = tokens_BT.to(self.device)
        return self._target_rows(self.target, tokens_BT, slice_rope(self.target_rope, 0, tokens_BT.shape[1]))

    def unroll(self, rows: TargetRows, length: int) -> list[Tensor]:
        """The drafter's states of every step."""
        return self._unroll(self.drafter, rows, slice_rope(self.query_rope, 0, length), self.objective.steps)

    def _slabs(self, block: Batch, tokens_BT: Tensor, rows: TargetRows, states: list[Tensor]) -> Iterator[Slab]:
        """Every draft of a block, in slabs of rows that are drafted at one temperature."""
        size = max(1, SLAB_LOGITS[self.device.type] // self.target.config.vocab_size)
        flat = [state.flatten(0, 1) for state in states]
        for temperature, spans in slab_spans(block, tokens_BT.shape[1], size):
            yield Slab(self.target, trained_head(self.drafter), tokens_BT.flatten(), rows.hidden_BTD.flatten(0, 1),
                       flat, SlabRows.of(spans, self.objective.steps, self.device), temperature)  # fmt: skip


@dataclass(frozen=True)
class Span:
    """Rows start to stop - 1 of a sequence whose last token is at `last`, counted through the block's tokens [B * T]:
    row n's draft i is compared with token n + 2 + i, where there is one."""

    start: int
    stop: int
    last: int


def slab_spans(block: Batch, length: int, size: int) -> Iterator[tuple[float, list[Span]]]:
    """The rows of a block with a token to compare with, `size` at most at a time, sequences of one temperature after
    each other: few large slabs, since a GPU takes as long to be told of a small one."""
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
                stop = min(span.stop, start + room)
                slab.append(Span(start, stop, span.last))
                start, room = stop, room - (stop - start)
                if room == 0:
                    yield temperature, slab
                    slab, room = [], size
        if slab:
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
            rows = np.arange(span.start, min(span.stop + steps - 1, span.last - 1))
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

    def run(
        self, objective: Objective, counts: list[int], stats: StepStats, gradients: list[Tensor], head: Tensor | None
    ) -> None:
        steps, index = objective.steps, self.rows.index_N
        choice = choice_at(self.temperature, objective.top_k, objective.top_p)
        aims = wanted(self.target.logits(self.hidden_RD[index + 1]), choice, objective.hard_share)
        reached = torch.ones(len(index), dtype=torch.float32, device=index.device)
        for i, size in enumerate(self.rows.sizes):
            at, compared = index[:size], self.rows.drafts_N[:size] > i
            state, tokens = self.states[i][at], self.tokens_R[(at + (2 + i)).clamp(max=len(self.tokens_R) - 1)]
            result = slab_loss(objective.loss, F.linear(state, self.table_VH), aims.rows(i, i + size), tokens, choice)
            reached = reached[:size] * compared
            weight = (objective.own_tokens * reached + (1 - objective.own_tokens)) * compared
            weight = weight * (objective.step_decay**i / (steps * max(1, counts[i])))
            stats.loss.add_((result.loss_N * weight).sum())
            stats.reached_K[i] += reached.sum()
            reached = reached * result.chance_N
            stats.accepted_K[i] += reached.sum()
            if head is not None:
                gradient = result.grad_NV.mul_(weight.unsqueeze(-1)).to(state.dtype)
                # rows that are not compared add nothing here; they are another slab's, or nobody's
                gradients[i].flatten(0, 1).index_add_(0, at, gradient @ self.table_VH)
                head.add_(gradient.T @ state)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
