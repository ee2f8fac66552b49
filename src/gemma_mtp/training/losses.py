"""Losses between the drafter's distribution q and the target's p, with their gradients written out.

A vocabulary's worth of logits is by far the largest thing in training, so the losses work on slabs of N rows that fit
into a cache, and return the gradient at the logits at once instead of leaving N x V intermediates for autograd.

    kl      KL(p || q)
    ce      cross-entropy to the sequence's own token
    tv      total variation, 1 - alpha, with alpha = sum min(p, q): the chance that rejection sampling accepts
    lk-log  -log(alpha)
    lk      lambda KL + (1 - lambda) TV with lambda = exp(-3 alpha): KL while p and q are far apart, then TV

Both `lk` are from "LK Losses: Direct Acceptance Rate Optimization for Speculative Decoding" (arXiv:2602.23881), with
its eta = 3; alpha in lambda is not differentiated. Gradients at the logits z, with m = 1 where q < p, else 0:

    d KL / dz = q - p        d CE / dz = q - onehot        d TV / dz = q (sum(q m) - m)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from gemma_mtp.decoding.params import SamplingParams
from gemma_mtp.decoding.sampling import probabilities, process

LossKind = Literal["kl", "ce", "tv", "lk", "lk-log"]
LOSSES: tuple[LossKind, ...] = get_args(LossKind)
LK_ETA = 3.0


@dataclass(frozen=True)
class SlabLoss:
    """Of N rows: the loss [N], its gradient at the drafter's logits [N, V], and the chance [N] that `exact`
    verification accepts the draft where the target chooses the sequence's token."""

    loss_N: Tensor
    grad_NV: Tensor
    chance_N: Tensor


@dataclass(frozen=True)
class Wanted:
    """The distribution that the drafter is to have in N rows [N, V], and its entropy [N] in nats."""

    probs_NV: Tensor
    entropy_N: Tensor

    def rows(self, start: int, stop: int) -> Wanted:
        return Wanted(self.probs_NV[start:stop], self.entropy_N[start:stop])


def wanted(logits_NV: Tensor, choice: SamplingParams, hard_share: float) -> Wanted:
    """What decoding with `choice` draws the target's tokens from, given the target's logits.

    Greedy decoding draws from a single point, of which little is learned: only `hard_share` of the mass is moved there,
    the rest stays as the target spreads it.
    """
    probs = _wanted_probs(logits_NV, choice, hard_share)
    tiny = torch.finfo(probs.dtype).tiny
    return Wanted(probs, -(probs.clamp(min=tiny).log_().mul_(probs)).sum(-1))


def _wanted_probs(logits_NV: Tensor, choice: SamplingParams, hard_share: float) -> Tensor:
    if not choice.greedy or hard_share == 1:
        return probabilities(process(logits_NV, choice), choice, logits_NV.shape[-1])
    spread = _wide(logits_NV).softmax(-1).mul_(1 - hard_share)
    top = logits_NV.argmax(-1, keepdim=True)
    return spread.scatter_add_(-1, top, torch.full_like(top, 1, dtype=spread.dtype).mul_(hard_share))


def choice_at(temperature: float, top_k: int = 0, top_p: float = 1.0) -> SamplingParams:
    """How tokens are chosen at a temperature."""
    return replace(SamplingParams(), temperature=temperature, top_k=top_k, top_p=top_p)


def slab_loss(kind: LossKind, logits_NV: Tensor, aim: Wanted, tokens_N: Tensor, choice: SamplingParams) -> SlabLoss:
    """Loss of N rows of drafter logits. `aim` is the target's distribution for the same slots, `tokens_N` what stands
    there in the sequence. At a temperature, q is the drafter's distribution at it too."""
    scale = 1.0 if choice.greedy else 1.0 / choice.temperature
    log_q = _wide(logits_NV) if scale == 1.0 else _wide(logits_NV) * scale
    log_q = log_q.log_softmax(-1)
    q = log_q.exp()
    p, columns = aim.probs_NV.to(q.dtype), tokens_N.unsqueeze(-1)
    chance = (logits_NV.argmax(-1) == tokens_N).to(q.dtype) if choice.greedy else coupled_chance(p, q, columns)
    loss, grad = _loss_and_gradient(kind, log_q, q, p, aim.entropy_N, columns)
    return SlabLoss(loss, grad if scale == 1.0 else grad.mul_(scale), chance)


def coupled_chance(p_NV: Tensor, q_NV: Tensor, columns_N1: Tensor) -> Tensor:
    """The chance [N] that a draft drawn from q with the target's own Gumbel noise is the token x, given that the target
    draws x from p: 1 / sum_y max(p_y, q_y p_x / q_x) (Daliri, Musco and Suresh 2024, section 3)."""
    p, q = p_NV.gather(-1, columns_N1), q_NV.gather(-1, columns_N1)
    ratio = p / q.clamp(min=torch.finfo(q.dtype).tiny)
    chance = torch.maximum(p_NV, q_NV * ratio).sum(-1).reciprocal()
    return torch.where(p.squeeze(-1) > 0, chance, 0.0)


def _loss_and_gradient(
    kind: LossKind, log_q: Tensor, q: Tensor, p: Tensor, entropy_N: Tensor, columns_N1: Tensor
) -> tuple[Tensor, Tensor]:
    """`q` is used up."""
    if kind == "ce":
        loss = -log_q.gather(-1, columns_N1).squeeze(-1)
        return loss, q.scatter_add_(-1, columns_N1, torch.full_like(columns_N1, -1, dtype=q.dtype))
    if kind == "kl":
        return _crossed(p, log_q) - entropy_N, q.sub_(p)
    alpha = torch.minimum(p, q).sum(-1)
    total_variation = _total_variation_gradient(p, q)
    if kind == "tv":
        return 1 - alpha, total_variation
    if kind == "lk-log":
        alpha = alpha.clamp(min=torch.finfo(alpha.dtype).tiny)
        return -alpha.log(), total_variation / alpha.unsqueeze(-1)
    share = (-LK_ETA * alpha).exp()
    loss = share * (_crossed(p, log_q) - entropy_N) + (1 - share) * (1 - alpha)
    return loss, torch.lerp(total_variation, q.sub_(p), share.unsqueeze(-1))


def _crossed(p: Tensor, log_q: Tensor) -> Tensor:
    """-sum(p log q) of each row."""
    return -(p * log_q).sum(-1)


def _total_variation_gradient(p: Tensor, q: Tensor) -> Tensor:
    # q where q < p, else 0: by signs, because `where` takes three times as long on a CPU
    below = torch.sub(p, q).sign_().clamp_(min=0).mul_(q)
    return (q * below.sum(-1, keepdim=True)).sub_(below)


def wide(dtype: torch.dtype) -> torch.dtype:
    """What losses of such numbers are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _wide(x: Tensor) -> Tensor:
    return x.to(wide(x.dtype))
