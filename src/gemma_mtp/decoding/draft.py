"""Propose draft tokens: K chained drafter steps at one constant position."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gemma_mtp.config import LayerType
from gemma_mtp.decoding.early_stop import StopRule, chance
from gemma_mtp.decoding.grammar import GrammarState
from gemma_mtp.decoding.noise import STREAM_CHOICE, STREAM_DRAFT, round_counters
from gemma_mtp.decoding.sampling import Candidates, SamplingParams, TokenHistory, choose, process
from gemma_mtp.kv_cache import CommittedKeyValues
from gemma_mtp.model.drafter import Drafter
from gemma_mtp.model.layers import Rope
from gemma_mtp.model.native import NativeDrafter
from gemma_mtp.model.target import Target


@dataclass(frozen=True)
class Drafts:
    """`tokens_K` int64 on the device, and what each was chosen from (one row of `Candidates` a draft).

    `confidences`: the probability that the drafter gave to each, where a stop rule asked for it.
    """

    tokens_K: Tensor
    candidates: list[Candidates] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)


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
    stop: StopRule | None = None,
    grammar: GrammarState | None = None,
) -> Drafts:
    """Draft one token for each noise counter, or fewer where `stop` says so or `grammar` allows no more.

    Without a stop rule and a grammar there is no host synchronisation; with one there is one a draft.
    `rope` holds the one position of the last committed token, which every step keeps; `hidden_11D` is the target's
    state that produced that token. Each step feeds back its own token and projected state.
    """
    counters_K, stream = noise
    if params.is_argmax and drafter.native is not None:
        return _native_drafts(drafter.native, int(last_token_11), hidden_11D[0, 0], rope, kv, counters_K.shape[0], stop)
    token, hidden = last_token_11, hidden_11D
    tokens: list[Tensor] = []
    candidates: list[Candidates] = []
    confidences: list[float] = []
    ids: list[int] = []  # on the host, for the grammar
    reach = 1.0
    for step in range(counters_K.shape[0]):
        if stop is not None and step > 0 and not stop.goes_on(step, reach):
            break
        if grammar is not None and grammar.ended_after(ids):
            break
        state, hidden = drafter(target.embed(token), hidden, rope, kv)
        logits, token_ids = drafter.candidates(state[0])
        counts = None if history is None else history.rows(_stack(tokens, token), first=step)
        allowed = None if grammar is None else grammar.allowed(ids, first=step)
        possible = process(logits, params, token_ids, counts, allowed)
        if grammar is not None and not possible.any_possible():
            break  # a centroid head scores a part of the vocabulary, in which there may be nothing allowed
        candidates.append(possible)
        tokens.append(choose(candidates[-1], params, counters_K[step : step + 1], stream))
        token = tokens[-1].unsqueeze(0)
        if grammar is not None:
            ids.append(int(token))
        if stop is not None:
            confidences.append(candidates[-1].probability(tokens[-1]))
            reach *= chance(confidences[-1], stop.bias, stop.slope)
    return Drafts(_stack(tokens, token), candidates, confidences)


def _native_drafts(
    drafter: NativeDrafter,
    token: int,
    hidden_D: Tensor,
    rope: Mapping[LayerType, Rope],
    kv: CommittedKeyValues,
    count: int,
    stop: StopRule | None,
) -> Drafts:
    """Greedy drafts, all in one call, which knows the same stop rule."""
    if stop is None:
        return Drafts(drafter.greedy(token, hidden_D, rope, kv, count)[0])
    tokens_K, confidences_K = drafter.greedy(token, hidden_D, rope, kv, count, stop.least, stop.bias, stop.slope)
    return Drafts(tokens_K, [], confidences_K.tolist())


def _stack(tokens: list[Tensor], like: Tensor) -> Tensor:
    return torch.cat(tokens) if tokens else like.new_zeros(0)
