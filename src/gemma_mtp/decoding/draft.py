"""Propose draft tokens: K chained drafter steps at one constant position."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gemma_mtp.config import LayerType
from gemma_mtp.decoding.noise import STREAM_CHOICE, STREAM_DRAFT, round_counters
from gemma_mtp.decoding.sampling import Candidates, SamplingParams, TokenHistory, choose, process
from gemma_mtp.kv_cache import CommittedKeyValues
from gemma_mtp.model.drafter import Drafter
from gemma_mtp.model.layers import Rope
from gemma_mtp.model.target import Target


@dataclass(frozen=True)
class Drafts:
    """`tokens_K` int64 on the device, and what each was chosen from (one row of `Candidates` a draft)."""

    tokens_K: Tensor
    candidates: list[Candidates]


def draft_noise(coupled: bool, first_position: int, count: int, device: torch.device) -> tuple[Tensor, int]:
    """Noise counters of the drafts and their stream.

    Coupled drafts use the target's own noise at their position, so that they agree with its choice as often as the two
    distributions allow (Daliri, Musco and Suresh 2024); `rejection` and `block` need independent draws.
    """
    if coupled:
        return torch.arange(first_position, first_position + count, device=device), STREAM_CHOICE
    return round_counters(torch.tensor(first_position, device=device), count), STREAM_DRAFT


def draft(
    drafter: Drafter,
    target: Target,
    last_token_11: Tensor,
    hidden_11D: Tensor,
    rope: Mapping[LayerType, Rope],
    kv: CommittedKeyValues,
    params: SamplingParams,
    history: TokenHistory | None,
    noise: tuple[Tensor, int],
) -> Drafts:
    """Draft one token for each noise counter, without a host synchronisation.

    `rope` holds the one position of the last committed token, which every step keeps; `hidden_11D` is the target's
    state that produced that token. Each step feeds back its own token and projected state.
    """
    counters_K, stream = noise
    if params.is_argmax and drafter.native is not None:
        count = counters_K.shape[0]
        return Drafts(drafter.native.greedy(int(last_token_11), hidden_11D[0, 0], rope, kv, count), [])
    token, hidden = last_token_11, hidden_11D
    tokens: list[Tensor] = []
    candidates: list[Candidates] = []
    for step in range(counters_K.shape[0]):
        state, hidden = drafter(target.embed(token), hidden, rope, kv)
        logits, token_ids = drafter.candidates(state[0])
        counts = None if history is None else history.rows(_stack(tokens, token), first=step)
        candidates.append(process(logits, params, token_ids, counts))
        tokens.append(choose(candidates[-1], params, counters_K[step : step + 1], stream))
        token = tokens[-1].unsqueeze(0)
    return Drafts(_stack(tokens, token), candidates)


def _stack(tokens: list[Tensor], like: Tensor) -> Tensor:
    return torch.cat(tokens) if tokens else like.new_zeros(0)
