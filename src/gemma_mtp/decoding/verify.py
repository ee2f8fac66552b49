"""How many drafts of a round are kept, and which token follows them. Pure functions without host synchronisation.

`exact` keeps a draft while it equals the target's own choice, so the output is plain decoding's, token for token.
`rejection` (Leviathan et al. 2023, arXiv:2211.17192) and `block` (Sun et al. 2024, arXiv:2403.10444, Algorithm 2) keep
the distribution: they compare the probability that the target gives to a draft with the one it was drawn with.

Shapes: `...` any leading dimensions (sequences), K drafts, V vocabulary. Target row i follows the first i drafts, so
row i of `target_probs` and of `draft_probs` are both about the token in slot i of the round, and target row K is about
the token after the last draft. Probabilities are taken to float64: the residual is a difference of near-equal numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma_mtp.decoding.noise import STREAM_ACCEPT, STREAM_RESIDUAL, gumbel, round_counters, uniform

Verification = Literal["exact", "rejection", "block"]
VERIFICATIONS: tuple[Verification, ...] = get_args(Verification)


@dataclass(frozen=True)
class Verified:
    """`n_accepted` int64 [...]: drafts kept. `tokens` int64 [..., K+1]: the first n_accepted + 1 are committed."""

    n_accepted: Tensor
    tokens: Tensor


def verify_exact(choices: Tensor, drafts: Tensor) -> Verified:
    """Keep drafts while they equal the target's choices. `choices` int64 [..., K+1], `drafts` int64 [..., K]."""
    matches = choices[..., :-1] == drafts
    return Verified(matches.cumprod(-1).sum(-1), choices)


def agreeing(choices: Sequence[int], drafts: Sequence[int]) -> int:
    """`verify_exact` of one sequence on the host: how many drafts equal the choices, up to the first that does not."""
    return next((i for i, draft in enumerate(drafts) if choices[i] != draft), len(drafts))


def verify_rejection(
    target_probs: Tensor, draft_probs: Tensor, drafts: Tensor, seed: int, first_position: Tensor
) -> Verified:
    """Keep each draft with chance min(1, target/draft probability), stop at the first that fails.

    `target_probs` [..., K+1, V]; `draft_probs` [..., K, V], which `drafts` int64 [..., K] must have been drawn from
    with numbers independent of `STREAM_ACCEPT` and `STREAM_RESIDUAL`; `first_position` int64 [...]: position of slot 0.
    """
    target_probs, draft_probs = target_probs.double(), draft_probs.double()
    tests = _accept_tests(seed, first_position, drafts.shape[-1])
    n_accepted = (tests < rejection_thresholds(target_probs, draft_probs, drafts)).cumprod(-1).sum(-1)
    residual = residual_probs(target_probs, draft_probs, torch.ones_like(target_probs[..., 0]), n_accepted)
    return _append(drafts, n_accepted, residual, seed, first_position)


def verify_block(
    target_probs: Tensor, draft_probs: Tensor, drafts: Tensor, seed: int, first_position: Tensor
) -> Verified:
    """Test every draft on the whole block up to it and keep up to the last that passes; never fewer than `rejection`
    on average. Arguments as in `verify_rejection`."""
    target_probs, draft_probs = target_probs.double(), draft_probs.double()
    weights = block_weights(target_probs, draft_probs, drafts)
    tests = _accept_tests(seed, first_position, drafts.shape[-1])
    passed = tests < block_thresholds(target_probs, draft_probs, weights)
    lengths = torch.arange(1, drafts.shape[-1] + 1, device=drafts.device)
    n_accepted = F.pad(passed * lengths, (1, 0)).amax(-1)  # padded: the longest may be none
    residual = residual_probs(target_probs, draft_probs, weights, n_accepted)
    return _append(drafts, n_accepted, residual, seed, first_position)


def rejection_thresholds(target_probs: Tensor, draft_probs: Tensor, drafts: Tensor) -> Tensor:
    """[..., K]: chance that draft i is kept if those before it were."""
    return _ratios(target_probs, draft_probs, drafts).clamp(max=1.0)


def block_weights(target_probs: Tensor, draft_probs: Tensor, drafts: Tensor) -> Tensor:
    """[..., K+1], the paper's p_i: 1 at first, then min(1, the one before * target/draft probability of draft i)."""
    ratios = _ratios(target_probs, draft_probs, drafts)
    weights = [torch.ones_like(target_probs[..., 0, 0])]
    for ratio in ratios.unbind(-1):
        weights.append((weights[-1] * ratio).clamp(max=1.0))
    return torch.stack(weights, dim=-1)


def block_thresholds(target_probs: Tensor, draft_probs: Tensor, weights: Tensor) -> Tensor:
    """[..., K], the paper's h_i: chance that the test after draft i passes. The last one's is its weight."""
    inner = weights[..., 1:-1]
    excess = (inner.unsqueeze(-1) * target_probs[..., 1:-1, :] - draft_probs[..., 1:, :]).clamp(min=0).sum(-1)
    total = excess + (1 - inner)
    # 0 / 0 only where weight is 1 and both distributions agree: the next draft then passes for certain
    thresholds = torch.where(total > 0, excess / total, torch.ones_like(total))
    return torch.cat([thresholds, weights[..., -1:]], dim=-1)


def residual_probs(target_probs: Tensor, draft_probs: Tensor, weights: Tensor, n_accepted: Tensor) -> Tensor:
    """[..., V], not normalised: what the token in slot n_accepted is drawn from.

    The part of weight * target that exceeds the draft distribution; in slot K, where nothing was drafted, the target.
    """
    draft_probs = F.pad(draft_probs, (0, 0, 0, 1))
    target = _row(target_probs, n_accepted)
    weight = weights.gather(-1, n_accepted.unsqueeze(-1))
    residual = (weight * target - _row(draft_probs, n_accepted)).clamp(min=0)
    # empty only by rounding, where both distributions agree
    return torch.where(residual.sum(-1, keepdim=True) > 0, residual, target)


def _ratios(target_probs: Tensor, draft_probs: Tensor, drafts: Tensor) -> Tensor:
    columns = drafts.unsqueeze(-1)
    target = target_probs[..., :-1, :].gather(-1, columns).squeeze(-1)
    draft = draft_probs.gather(-1, columns).squeeze(-1)
    return target / draft.clamp(min=torch.finfo(draft.dtype).tiny)


def _row(probs: Tensor, index: Tensor) -> Tensor:
    """Row `index` [...] of `probs` [..., rows, V]: [..., V]."""
    columns = index[..., None, None].expand(*index.shape, 1, probs.shape[-1])
    return probs.gather(-2, columns).squeeze(-2)


def _accept_tests(seed: int, first_position: Tensor, n_drafts: int) -> Tensor:
    counters = round_counters(first_position, n_drafts)
    return uniform(seed, counters, counters.new_zeros(1), STREAM_ACCEPT).squeeze(-1)


def _append(drafts: Tensor, n_accepted: Tensor, residual: Tensor, seed: int, first_position: Tensor) -> Verified:
    """Draw the token of slot n_accepted from `residual` and put it behind the accepted drafts."""
    token_ids = torch.arange(residual.shape[-1], device=residual.device)
    slot = n_accepted.unsqueeze(-1)
    counter = round_counters(first_position, drafts.shape[-1] + 1).gather(-1, slot).squeeze(-1)
    token = (residual.log() + gumbel(seed, counter, token_ids, STREAM_RESIDUAL)).argmax(-1, keepdim=True)
    return Verified(n_accepted, F.pad(drafts, (0, 1)).scatter(-1, slot, token))
