"""What a drafter is trained on: unrolled steps over whole rows, and the loss on the steps that decoding would reach.

Row t holds the target's hidden state after token t. Its drafts start from token t + 1, at query position t + 1 in every
step, and step i (from 0) predicts token t + 2 + i. Step i > 0 is fed token t + 1 + i of the row and the drafter's own
projected state of step i - 1. Decoding reaches step i only where the earlier drafts were accepted, that is where they
equal the row's tokens, so feeding the row's tokens is feeding the drafter's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma_mtp.config import LayerType
from gemma_mtp.model.drafter import Drafter
from gemma_mtp.model.layers import Rope, rope_for
from gemma_mtp.model.target import Target
from gemma_mtp.training.attention import TrainingDonorKeyValues, TrainingKeyValues


@dataclass(frozen=True)
class TargetRows:
    """What a frozen target says about rows of tokens. Logits are soft-capped."""

    tokens_BT: Tensor
    embeds_BTD: Tensor
    hidden_BTD: Tensor
    logits_BTV: Tensor
    donor_kv: dict[LayerType, tuple[Tensor, Tensor]]


@torch.no_grad()
def target_rows(target: Target, tokens_BT: Tensor, rope: Mapping[LayerType, Rope]) -> TargetRows:
    """One pass of the target over whole rows; `rope` holds positions 0 to T - 1."""
    kv = TrainingKeyValues(target.config, tokens_BT.shape[1])
    hidden = target(tokens_BT, rope, kv)
    return TargetRows(tokens_BT, target.embed(tokens_BT), hidden, target.logits(hidden), kv.donor_kv())


def query_rope(drafter: Drafter, length: int, dtype: torch.dtype) -> dict[LayerType, Rope]:
    """Rotary tables of the query positions of rows 0 to length - 1: one after each row."""
    return rope_for(drafter.config.text, torch.arange(1, length + 1), dtype)


def unroll(drafter: Drafter, rows: TargetRows, rope: Mapping[LayerType, Rope], steps: int) -> Iterator[Tensor]:
    """The drafter's head states of each step, [B, T, H]. Row t of step i means something for t < T - 1 - i."""
    kv = TrainingDonorKeyValues(drafter.config.text, rows.donor_kv)
    hidden = rows.hidden_BTD
    for i in range(steps):
        state, hidden = drafter(shifted(rows.embeds_BTD, 1 + i), hidden, rope, kv)
        yield state


def shifted(x_BTX: Tensor, by: int) -> Tensor:
    """Row t takes row t + `by`; zeros at the end."""
    return F.pad(x_BTX[:, by:], (0, 0, 0, by))


@dataclass(frozen=True)
class DraftLoss:
    """The loss to differentiate, and per step how often a draft equalled the row's next token given the ones before."""

    loss: Tensor
    hits: Tensor
    reached: Tensor


def draft_loss(
    drafter: Drafter,
    rows: TargetRows,
    rope: Mapping[LayerType, Rope],
    steps: int,
    hard_share: float = 0.5,
    step_decay: float = 0.9,
    unreached_weight: float = 0.05,
) -> DraftLoss:
    """Cross-entropy to a mix of the target's distribution and its argmax, over the rows and steps decoding reaches.

    `unreached_weight` keeps a little of the rows whose earlier drafts missed: early in training they are nearly all.
    """
    T = rows.tokens_BT.shape[1]
    wanted = soft_and_hard(rows.logits_BTV, hard_share)
    reached = torch.ones(rows.tokens_BT.shape, dtype=torch.bool, device=rows.tokens_BT.device)
    loss = rows.hidden_BTD.new_zeros((), dtype=torch.float32)
    hits, counts = [], []
    for i, state in enumerate(unroll(drafter, rows, rope, steps)):
        valid = T - 2 - i
        logits = drafter.logits(state[:, :valid])
        cost = soft_cross_entropy(logits, wanted[:, 1 + i : 1 + i + valid])
        reached = reached[:, :valid]
        weight = torch.where(reached, 1.0, unreached_weight)
        loss = loss + step_decay**i * (cost * weight).sum() / weight.sum()
        hit = logits.detach().argmax(-1) == rows.tokens_BT[:, 2 + i :]
        counts.append(reached.sum())
        reached = reached & hit
        hits.append(reached.sum())
    return DraftLoss(loss / steps, torch.stack(hits), torch.stack(counts))


def soft_and_hard(logits_BTV: Tensor, hard_share: float) -> Tensor:
    """The target's distribution, `hard_share` of its mass moved onto its argmax."""
    wanted = logits_BTV.softmax(-1) * (1 - hard_share)
    return wanted.scatter_add(-1, logits_BTV.argmax(-1, keepdim=True), torch.full_like(wanted[..., :1], hard_share))


def soft_cross_entropy(logits: Tensor, wanted: Tensor) -> Tensor:
    """-sum(wanted * log softmax(logits)) over the last dimension, in fp32."""
    return logits.float().logsumexp(-1) - (wanted * logits).sum(-1, dtype=torch.float32)
