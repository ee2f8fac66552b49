"""One round: draft K tokens, verify K+1 positions in one target call, commit what agrees, discard the rest.

Between rounds a sequence of L committed tokens has L-1 rows in its cache (the last token has not been through the
target yet) and the target's state that produced the last token. A round with K = 0 is plain decoding.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from gemma_mtp.config import LayerType
from gemma_mtp.decoding.draft import Drafts, draft, draft_noise
from gemma_mtp.decoding.early_stop import StopRule
from gemma_mtp.decoding.grammar import GrammarState
from gemma_mtp.decoding.sampling import (
    SamplingParams,
    TokenHistory,
    TopLogprobs,
    choose,
    probabilities,
    process,
    top_logprobs,
)
from gemma_mtp.decoding.verify import Verification, Verified, agreeing, verify_block, verify_exact, verify_rejection
from gemma_mtp.kv_cache import SLACK_ROWS, CommittedKeyValues, KVCache
from gemma_mtp.model.drafter import Drafter
from gemma_mtp.model.layers import Rope, rope_for, slice_rope
from gemma_mtp.model.target import Target


@dataclass
class Sequence:
    """A sequence being decoded: all of its state on the device, and its length."""

    params: SamplingParams
    cache: KVCache
    rope: dict[LayerType, Rope]
    history: TokenHistory | None
    grammar: GrammarState | None = None
    length: int = 0  # committed tokens
    last_token_11: Tensor = field(default_factory=lambda: torch.empty(0))
    hidden_11D: Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass(frozen=True)
class RoundOutput:
    """What a round committed: `accepted` drafts and one token of the target's own."""

    token_ids: list[int]
    drafted: int
    accepted: int
    logprobs: TopLogprobs | None
    confidences: list[float] = field(default_factory=list)  # in each draft, where a stop rule asked for them
    complete_after: int | None = None  # so many tokens end the output: the grammar allows none after them


def open_sequence(
    target: Target,
    prompt_length: int,
    max_tokens: int,
    max_drafts: int,
    params: SamplingParams,
    grammar: GrammarState | None = None,
) -> Sequence:
    """Allocate the cache and rotary tables for a prompt, its output and one round's drafts.

    `grammar`: the state to start from, needed if and only if there is a `params.grammar`.
    """
    assert (grammar is None) == (params.grammar is None), "a grammar needs a GrammarState"
    table = target.embed_tokens.weight
    max_length = prompt_length + max_tokens + max_drafts
    cache = KVCache(target.config, max_length, max_drafts + 1, target.compute_dtype, table.device)
    rope = rope_for(target.config, torch.arange(max_length, device=table.device), target.compute_dtype)
    return Sequence(params, cache, rope, None, grammar)


def prefill(target: Target, sequence: Sequence, prompt_ids: Tensor, chunk_rows: int) -> RoundOutput:
    """Run the prompt [P] through the target in chunks and commit the first output token."""
    if sequence.params.uses_history:
        sequence.history = TokenHistory(prompt_ids, target.config.vocab_size, prompt_ids.device)
    if target.native is not None:
        chunk_rows = min(chunk_rows, SLACK_ROWS)  # the room that sliding buffers have beside the window
    for chunk in prompt_ids.unsqueeze(0).split(chunk_rows, dim=1):
        hidden_11D = _forward(target, sequence, chunk, last_only=True)
        sequence.cache.commit(chunk.shape[1])
    sequence.length = prompt_ids.shape[0]
    drafts = Drafts(prompt_ids.new_zeros(0))
    return _commit(target, sequence, drafts, hidden_11D, "exact")


def play_round(
    target: Target,
    drafter: Drafter | None,
    sequence: Sequence,
    draft_tokens: int,
    verification: Verification,
    stop: StopRule | None = None,
) -> RoundOutput:
    """Draft, verify, commit. `draft_tokens` may be 0, and must be without a drafter; `stop` may make it fewer."""
    drafts = propose(target, drafter, sequence, draft_tokens, verification, stop)
    return verify_round(target, sequence, drafts, verification)


def propose(
    target: Target,
    drafter: Drafter | None,
    sequence: Sequence,
    draft_tokens: int,
    verification: Verification,
    stop: StopRule | None = None,
) -> Drafts:
    """The first half of a round: its drafts. The sequence is left as it is."""
    if drafter is None or draft_tokens == 0:
        return Drafts(sequence.last_token_11.new_zeros(0))
    return _draft(target, drafter, sequence, draft_tokens, verification == "exact", stop)


def verify_round(target: Target, sequence: Sequence, drafts: Drafts, verification: Verification) -> RoundOutput:
    """The second half: the target's call over the last token and the drafts, and what follows from it."""
    rows = torch.cat((sequence.last_token_11, drafts.tokens_K.unsqueeze(0)), dim=1)
    hidden_1TD = _forward(target, sequence, rows, last_only=False)
    output = _commit(target, sequence, drafts, hidden_1TD, verification)
    sequence.cache.commit(output.accepted + 1)
    return output


def _forward(target: Target, sequence: Sequence, token_ids_1T: Tensor, last_only: bool) -> Tensor:
    cache, rows = sequence.cache, token_ids_1T.shape[1]
    cache.begin(rows)
    rope = slice_rope(sequence.rope, cache.length, cache.length + rows)
    hidden: Tensor = target(token_ids_1T, rope, cache, last_only)
    return hidden


def _draft(
    target: Target, drafter: Drafter, sequence: Sequence, count: int, coupled: bool, stop: StopRule | None
) -> Drafts:
    position = sequence.length - 1
    return draft(
        drafter,
        target,
        sequence.last_token_11,
        sequence.hidden_11D,
        slice_rope(sequence.rope, position, position + 1),
        CommittedKeyValues(sequence.cache, drafter.config.text.layer_types),
        sequence.params,
        sequence.history,
        draft_noise(coupled, sequence.length, count, sequence.last_token_11.device),
        stop,
        sequence.grammar,
    )


def _commit(
    target: Target, sequence: Sequence, drafts: Drafts, hidden_1TD: Tensor, verification: Verification
) -> RoundOutput:
    """Choose at every row, count the accepted drafts, and move the sequence on; reads the device once."""
    params, drafted = sequence.params, drafts.tokens_K.shape[0]
    if params.is_argmax and target.native is not None:
        tokens_T = target.native.greedy(hidden_1TD[0])
        tokens = tokens_T.tolist()
        accepted = agreeing(tokens, drafts.tokens_K.tolist())
    else:
        logits_TV = target.logits(hidden_1TD[0])
        verified = _verify(logits_TV, sequence, drafts, verification)
        tokens_T = verified.tokens
        accepted, *tokens = torch.cat((verified.n_accepted.view(1), tokens_T)).tolist()
    committed = tokens[: accepted + 1]
    if sequence.history is not None:
        sequence.history.commit(tokens_T[: accepted + 1])
    complete_after = None if sequence.grammar is None else sequence.grammar.commit(committed)
    logprobs = None
    if params.logprobs is not None:
        logprobs = top_logprobs(logits_TV[: accepted + 1], tokens_T[: accepted + 1], params.logprobs)
    sequence.length += len(committed)
    sequence.last_token_11 = tokens_T[accepted : accepted + 1].unsqueeze(0)
    sequence.hidden_11D = hidden_1TD[:, accepted : accepted + 1]
    return RoundOutput(committed, drafted, accepted, logprobs, drafts.confidences, complete_after)


def _verify(logits_TV: Tensor, sequence: Sequence, drafts: Drafts, verification: Verification) -> Verified:
    params, drafted, device = sequence.params, drafts.tokens_K.shape[0], logits_TV.device
    counts = None if sequence.history is None else sequence.history.rows(drafts.tokens_K)
    allowed = None if sequence.grammar is None else sequence.grammar.allowed(drafts.tokens_K.tolist())
    candidates = process(logits_TV, params, counts=counts, allowed_RV=allowed)
    if verification == "exact" or drafted == 0:
        positions = torch.arange(sequence.length, sequence.length + drafted + 1, device=device)
        return verify_exact(choose(candidates, params, positions), drafts.tokens_K)
    vocab = logits_TV.shape[-1]
    verify = verify_rejection if verification == "rejection" else verify_block
    draft_probs = torch.cat([probabilities(c, params, vocab) for c in drafts.candidates])
    first_position = torch.tensor(sequence.length, device=device)
    return verify(probabilities(candidates, params, vocab), draft_probs, drafts.tokens_K, params.seed, first_position)
