"""What a drafter is trained on: drafts unrolled from every row of whole sequences at once.

Row t holds the target's hidden state after token t. Its drafts start from token t + 1, at query position t + 1 in every
step, and step i (from 0) predicts token t + 2 + i. Step i > 0 is fed token t + 1 + i of the sequence and the drafter's
own projected state of step i - 1. Decoding reaches step i only where the earlier drafts were accepted, that is where
they equal the sequence's tokens, so feeding the sequence's tokens is feeding the drafter's own.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    """What a frozen target says about rows of tokens [B, T]: embeddings and hidden states [B, T, D], and the donor
    layers' keys and values, each [B, T, G, d]."""

    embeds_BTD: Tensor
    hidden_BTD: Tensor
    donor_kv: dict[LayerType, tuple[Tensor, Tensor]]

    @property
    def nbytes(self) -> int:
        kept = [self.embeds_BTD, self.hidden_BTD, *(x for pair in self.donor_kv.values() for x in pair)]
        return sum(x.nbytes for x in kept)


@torch.no_grad()
def target_rows(target: Target, tokens_BT: Tensor, rope: Mapping[LayerType, Rope]) -> TargetRows:
    """One pass of the target over whole rows; `rope` holds positions 0 to T - 1."""
    kv = TrainingKeyValues(target.config, tokens_BT.shape[1])
    hidden = target(tokens_BT, rope, kv)
    return TargetRows(target.embed(tokens_BT), hidden, kv.donor_kv())


def query_rope(drafter: Drafter, length: int, dtype: torch.dtype) -> dict[LayerType, Rope]:
    """Rotary tables of the query positions of rows 0 to length - 1: one after each row."""
    positions = torch.arange(1, length + 1, device=drafter.norm.weight.device)
    return rope_for(drafter.config.text, positions, dtype)


def unroll(drafter: Drafter, rows: TargetRows, rope: Mapping[LayerType, Rope], steps: int) -> list[Tensor]:
    """The drafter's head states of each step, [B, T, H]. Row t of step i means something for t < T - 1 - i."""
    kv = TrainingDonorKeyValues(drafter.config.text, rows.donor_kv)
    hidden, states = rows.hidden_BTD, []
    for i in range(steps):
        state, hidden = drafter(shifted(rows.embeds_BTD, 1 + i), hidden, rope, kv)
        states.append(state)
    return states


def shifted(x_BTX: Tensor, by: int) -> Tensor:
    """Row t takes row t + `by`; zeros at the end."""
    return F.pad(x_BTX[:, by:], (0, 0, 0, by))


def trained_head(drafter: Drafter) -> Tensor:
    """The table [V, H] that the drafter's head multiplies with; a drafter in training is not quantised."""
    return drafter.head.weight
