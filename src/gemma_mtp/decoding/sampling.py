"""The choice of a token: a pure function of (logits, sampling parameters, history, seed, position).

The order is: the grammar's mask, repetition penalty, frequency and presence penalties, logit bias, temperature, top-k,
top-p, min-p, then the arg max of log-probability plus Gumbel noise keyed by (seed, position, token id), which draws
from the filtered distribution exactly (the Gumbel-max trick). Temperature 0 is the arg max without noise. Ties go to
the lowest id.

Definitions are those of Hugging Face and vLLM. Penalties: vLLM's. Filters: Hugging Face's order (vLLM applies min-p
before top-k and top-p); top-p counts mass among what top-k left; at a tie for the k-th place the lower id stays, where
both libraries keep all tied tokens and so more than k. The bias comes after the penalties, so that it is the last word;
only in a row where it forbids all that the grammar allows, it is left out. What the grammar forbids has no chance, so
filters count masses and places among what it allows.

No step reduces floating-point numbers across rows or in an order that could depend on the number of rows.

At a low temperature logit / temperature is so large that float32 has no room for the noise beside it. So candidates
keep the logits as they are: the sum with the noise is taken in float64, and what is compared or exponentiated is the
distance to the highest logit, divided by the temperature. `src/native/stack.cpp` takes the same sum.

Shapes: R rows (positions of one sequence), V vocabulary, C candidates (C = V where no subset is given), K drafts.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gemma_mtp.decoding.history import TokenCounts
from gemma_mtp.decoding.noise import STREAM_CHOICE, gumbel
from gemma_mtp.decoding.params import SamplingParams
from gemma_mtp.errors import SamplingError


@dataclass(frozen=True)
class Candidates:
    """What may be chosen in each row, and how likely it is.

    `logits_RC`: penalised and biased logits, -inf where removed. `token_ids_RC`: their ids, or None where column = id.
    `temperature`: what they are still to be divided by; 1 where the choice is greedy, which filters nothing either.
    """

    logits_RC: Tensor
    token_ids_RC: Tensor | None
    temperature: float = 1.0

    def log_probs(self) -> Tensor:
        """Normalised log-probabilities, float32 [R, C]."""
        return _scaled(self.logits_RC.float(), self.temperature).log_softmax(-1)

    def any_possible(self) -> bool:
        """Whether a token is left in the one row there is; reads the device."""
        return bool((self.logits_RC > -math.inf).any())

    def probability(self, token_ids_R: Tensor) -> float:
        """Of a token of the one row there is; reads the device."""
        probs_C = _scaled(self.logits_RC.float(), self.temperature)[0].softmax(-1)
        return float(probs_C[token_ids_R if self.token_ids_RC is None else self.token_ids_RC[0] == token_ids_R])


def _scaled(logits_RC: Tensor, temperature: float) -> Tensor:
    """Log-probabilities up to a constant a row, float32: the highest has 0, so that no other is too large."""
    return (logits_RC - logits_RC.amax(-1, keepdim=True)) / temperature


def process(
    logits_RC: Tensor,
    params: SamplingParams,
    token_ids_RC: Tensor | None = None,
    counts: TokenCounts | None = None,
    allowed_RV: Tensor | None = None,
) -> Candidates:
    """Mask, penalties, bias, temperature and filters. `logits_RC` (any float dtype) is left as it is.

    `token_ids_RC`: int64 ids of the columns, distinct within a row ([R, C] or [1, C]); None where column = id.
    `counts`: R rows from `TokenHistory.rows`, needed if and only if `params.uses_history`.
    `allowed_RV`: R rows from `GrammarState.limits`, which there may be if there is a `params.grammar`.
    Raises SamplingError if a biased token id is beyond the vocabulary.
    """
    assert allowed_RV is None or params.grammar is not None, "a mask is of a grammar"
    if allowed_RV is not None:
        logits_RC = _mask(logits_RC.float(), allowed_RV, token_ids_RC)
    if params.uses_history:
        assert counts is not None, "penalties need a TokenHistory"
        logits_RC = _penalise(logits_RC.float(), params, counts if token_ids_RC is None else counts.at(token_ids_RC))
    if params.logit_bias:
        biased_RC = _add_bias(logits_RC.float(), params, token_ids_RC)
        if allowed_RV is not None:  # the output is of the grammar, whatever the bias
            biased_RC = torch.where(biased_RC.amax(-1, keepdim=True) > -math.inf, biased_RC, logits_RC)
        logits_RC = biased_RC
    if params.greedy:
        return Candidates(logits_RC, token_ids_RC)
    return _filter(logits_RC.float(), params, token_ids_RC)


def _mask(logits_RC: Tensor, allowed_RV: Tensor, token_ids_RC: Tensor | None) -> Tensor:
    if token_ids_RC is not None:
        allowed_RV = allowed_RV.gather(-1, token_ids_RC.expand(allowed_RV.shape[0], -1))
    return logits_RC.masked_fill(~allowed_RV, -math.inf)


def _penalise(logits_RC: Tensor, params: SamplingParams, counts: TokenCounts) -> Tensor:
    penalty = params.repetition_penalty
    if penalty != 1:
        repeated_RC = torch.where(logits_RC > 0, logits_RC / penalty, logits_RC * penalty)
        logits_RC = torch.where(counts.seen_RV, repeated_RC, logits_RC)
    logits_RC = logits_RC - params.frequency_penalty * counts.output_RV
    return logits_RC - params.presence_penalty * (counts.output_RV > 0)


@functools.lru_cache(maxsize=64)
def _bias_tensors(items: tuple[tuple[int, float], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Biased token ids and their biases on the device, copied there once."""
    token_ids, biases = zip(*items, strict=True)
    return torch.tensor(token_ids, device=device), torch.tensor(biases, dtype=torch.float32, device=device)


def _add_bias(logits_RC: Tensor, params: SamplingParams, token_ids_RC: Tensor | None) -> Tensor:
    if token_ids_RC is None:
        highest, vocab_size = max(params.logit_bias), logits_RC.shape[-1]
        if highest >= vocab_size:
            raise SamplingError(
                f"a token id in logit_bias is {highest}, but must be below the vocabulary size, {vocab_size}."
            )
    token_ids_B, biases_B = _bias_tensors(tuple(params.logit_bias.items()), logits_RC.device)
    if token_ids_RC is None:
        return logits_RC.index_add(-1, token_ids_B, biases_B.expand(*logits_RC.shape[:-1], -1))
    matches_RCB = token_ids_RC.unsqueeze(-1) == token_ids_B
    return logits_RC + torch.where(matches_RCB, biases_B, 0.0).sum(-1)  # at most one term is not zero


def _filter(logits_RC: Tensor, params: SamplingParams, token_ids_RC: Tensor | None) -> Candidates:
    if 0 < params.top_k < logits_RC.shape[-1]:
        logits_RC, token_ids_RC = _keep_top_k(logits_RC, params.top_k, token_ids_RC)
    elif params.top_p < 1:
        logits_RC, token_ids_RC = _sort(logits_RC, token_ids_RC)
    if params.top_p < 1:
        logits_RC = _mask_top_p(logits_RC, params)
    if params.min_p > 0:
        unlikely_RC = _scaled(logits_RC, params.temperature) < math.log(params.min_p)
        logits_RC = logits_RC.masked_fill(unlikely_RC, -math.inf)
    return Candidates(logits_RC, token_ids_RC, params.temperature)


def _order_keys(logits_RC: Tensor, token_ids_RC: Tensor | None) -> Tensor:
    """Distinct int64 keys that order by logit, then by lower id.

    torch.topk may take any of several equal scores, and on CUDA which ones depends on the number of rows.
    """
    bits_RC = (logits_RC + 0.0).contiguous().view(torch.int32)  # the sum has no -0.0, which would come below 0.0
    ordered_RC = bits_RC ^ ((bits_RC >> 31) & 0x7FFFFFFF)  # float32 bits as integers that compare as the floats do
    if token_ids_RC is None:
        token_ids_RC = torch.arange(logits_RC.shape[-1], device=logits_RC.device)
    return torch.add(-token_ids_RC, ordered_RC, alpha=1 << 32)


def _take(logits_RC: Tensor, columns_RC: Tensor, token_ids_RC: Tensor | None) -> tuple[Tensor, Tensor]:
    if token_ids_RC is None:
        return logits_RC.gather(-1, columns_RC), columns_RC
    return logits_RC.gather(-1, columns_RC), token_ids_RC.expand_as(logits_RC).gather(-1, columns_RC)


def _keep_top_k(logits_RC: Tensor, top_k: int, token_ids_RC: Tensor | None) -> tuple[Tensor, Tensor]:
    """The top_k likeliest of each row and their ids, in descending order."""
    columns_RC = _order_keys(logits_RC, token_ids_RC).topk(top_k, dim=-1, sorted=True).indices
    return _take(logits_RC, columns_RC, token_ids_RC)


def _sort(logits_RC: Tensor, token_ids_RC: Tensor | None) -> tuple[Tensor, Tensor]:
    columns_RC = _order_keys(logits_RC, token_ids_RC).argsort(dim=-1, descending=True)
    return _take(logits_RC, columns_RC, token_ids_RC)


def _mask_top_p(logits_RC: Tensor, params: SamplingParams) -> Tensor:
    """Remove what comes, in descending order, after a mass of top_p. The first is always kept.

    Masses are fixed-point integers, because a parallel floating-point sum may depend on the number of rows.
    """
    weights_RC = _scaled(logits_RC, params.temperature).exp()
    masses_RC = (weights_RC * float(1 << 40)).to(torch.int64)  # the sum stays below 2**63 up to 2**22 candidates
    sums_RC = masses_RC.cumsum(-1)
    before_RC = (sums_RC - masses_RC).to(torch.float64)
    return logits_RC.masked_fill(before_RC >= params.top_p * sums_RC[..., -1:].to(torch.float64), -math.inf)


def choose(candidates: Candidates, params: SamplingParams, positions_R: Tensor, stream: int = STREAM_CHOICE) -> Tensor:
    """The token ids chosen, int64 [R]. `positions_R` int64: index in the sequence of the token that each row chooses.

    Plain decoding, `exact` verification and its drafter all use this with the default stream. Drafts for `rejection`
    and `block` are drawn with `STREAM_DRAFT` at `noise.round_counters` in place of positions.
    """
    scores_RC, token_ids_RC = candidates.logits_RC, candidates.token_ids_RC
    if not params.greedy:
        ids = torch.arange(scores_RC.shape[-1], device=scores_RC.device) if token_ids_RC is None else token_ids_RC
        noise_RC = gumbel(params.seed, positions_R, ids, stream)
        scores_RC = scores_RC.double() / candidates.temperature + noise_RC
    columns_R1 = scores_RC.argmax(-1, keepdim=True)  # documented to return the first of several maxima
    if token_ids_RC is None:
        return columns_R1.squeeze(-1)
    token_ids_RC = token_ids_RC.expand_as(scores_RC)
    tied_RC = scores_RC == scores_RC.gather(-1, columns_R1)
    return torch.where(tied_RC, token_ids_RC, token_ids_RC.gather(-1, columns_R1)).amin(-1)


def probabilities(candidates: Candidates, params: SamplingParams, vocab_size: int) -> Tensor:
    """The distribution that `choose` draws from, over the whole vocabulary: float32 [R, V], one-hot at temperature 0.

    What `rejection` and `block` verification compare.
    """
    logits_RC, ids = candidates.logits_RC, candidates.token_ids_RC
    probs_RV = torch.zeros(*logits_RC.shape[:-1], vocab_size, device=logits_RC.device)
    if params.greedy:
        unused_positions = torch.zeros(logits_RC.shape[:-1], dtype=torch.int64, device=logits_RC.device)
        return probs_RV.scatter_(-1, choose(candidates, params, unused_positions).unsqueeze(-1), 1.0)
    if ids is None:
        return candidates.log_probs().exp()
    return probs_RV.scatter_(-1, ids.expand_as(logits_RC), candidates.log_probs().exp())


@dataclass(frozen=True)
class TopLogprobs:
    """`chosen_R` float32 of the chosen tokens; the n likeliest tokens: `token_ids_RN` int64 and `top_RN` float32."""

    chosen_R: Tensor
    token_ids_RN: Tensor
    top_RN: Tensor


def top_logprobs(logits_RV: Tensor, chosen_ids_R: Tensor, n: int) -> TopLogprobs:
    """Log-probabilities to report: of the model's own distribution, before penalties, bias, temperature and filters.

    So they mean the same whatever the sampling parameters (vLLM's default, `logprobs_mode="raw_logprobs"`).
    """
    log_probs_RV = logits_RV.float().log_softmax(-1)
    columns_RN = _order_keys(log_probs_RV, None).topk(min(n, log_probs_RV.shape[-1]), dim=-1).indices
    chosen_R = log_probs_RV.gather(-1, chosen_ids_R.unsqueeze(-1)).squeeze(-1)
    return TopLogprobs(chosen_R, columns_RN, log_probs_RV.gather(-1, columns_RN))


def ranks(logits_RV: Tensor, token_ids_R: Tensor) -> Tensor:
    """The place of a token in each row by its logit, int64 [R], from 1; of equals the lower id comes first."""
    keys_RV = _order_keys(logits_RV.float(), None)
    return (keys_RV > keys_RV.gather(-1, token_ids_R.unsqueeze(-1))).sum(-1) + 1
