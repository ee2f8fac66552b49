"""One round: draft K tokens, verify K+1 positions in one target call, commit what agrees, discard the rest.

Between rounds a sequence of L committed tokens has L-1 rows in its cache (the last token has not been through the
target yet) and the target's state that produced the last token. A round with K = 0 is plain decoding.

Several sequences may play a round together, each as it would alone: the native operators take all of their rows in
one call, and no row's result depends on the rows beside it. PyTorch's operators, which do not promise that, take the
sequences one after another.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma_mtp.config import LayerType
from gemma_mtp.decoding.draft import Drafting, Drafts, draft
from gemma_mtp.decoding.early_stop import StopRule
from gemma_mtp.decoding.grammar import GrammarState
from gemma_mtp.decoding.noise import STREAM_CHOICE, row_key
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
from gemma_mtp.kv_cache import KVCache, KVPool
from gemma_mtp.model.drafter import Drafter
from gemma_mtp.model.layers import Rope, rope_for, slice_rope
from gemma_mtp.model.target import Target

#: prompt rows of one target call, at most: enough to use the hardware, few enough to bound activations
CHUNK_ROWS, NATIVE_CHUNK_ROWS = 512, 128
NO_DRAFTS = Drafts([])


@dataclass
class Sequence:
    """A sequence being decoded. `states_RD`: the last call's states, of which row `state` produced the last token."""

    params: SamplingParams
    cache: KVCache
    rope: Mapping[LayerType, Rope]
    history: TokenHistory | None
    grammar: GrammarState | None = None
    length: int = 0  # committed tokens
    last_token: int = -1
    states_RD: Tensor = field(default_factory=lambda: torch.empty(1, 0))
    state: int = 0

    @property
    def last_state(self) -> Tensor:
        """The target's state that produced the last token, [D]."""
        return self.states_RD[self.state]


class RoundOutput(NamedTuple):
    """What a round committed: `accepted` drafts and one token of the target's own."""

    token_ids: list[int]
    drafted: int
    accepted: int
    logprobs: TopLogprobs | None
    confidences: Items[float] = ()  # in each draft, where a stop rule asked for them
    complete_after: int | None = None  # so many tokens end the output: the grammar allows none after them


class Turn(NamedTuple):
    """A sequence's part in a round: `draft_tokens` drafts, or fewer where `stop` says so; 0 without a drafter."""

    sequence: Sequence
    draft_tokens: int
    verification: Verification = "exact"
    stop: StopRule | None = None

    def is_plain(self, rows: int) -> bool:
        """Whether `rows` tokens are chosen by logits and noise alone."""
        choice = self.sequence.params.choice
        return choice == "argmax" or (choice == "drawn" and (self.verification == "exact" or rows == 1))


class Rows(NamedTuple):
    """Rows of a sequence for the target, int64 [T] or still on the host, of whose hidden states the last `keep` are
    wanted."""

    sequence: Sequence
    tokens: Tensor | list[int]
    keep: int


class Scores(NamedTuple):
    """What a turn's tokens follow from, and the first of its rows among the call's states: logits [T, V] of its T rows,
    or natively, where nothing else of them is wanted, the T tokens themselves."""

    begin: int
    of_rows: Tensor | list[int]


def open_sequence(
    target: Target,
    prompt_length: int,
    max_tokens: int,
    max_drafts: int,
    params: SamplingParams,
    pool: KVPool | None = None,
    rope: Mapping[LayerType, Rope] | None = None,
    grammar: GrammarState | None = None,
) -> Sequence:
    """A sequence of room for a prompt, its output and one round's drafts: with blocks of `pool`, or of its own.

    `rope`: tables of as many positions, where there are some already. `grammar`: the state to start from, needed if and
    only if there is a `params.grammar`.
    """
    assert (grammar is None) == (params.grammar is None), "a grammar needs a GrammarState"
    table = target.embed_tokens.weight
    max_length = prompt_length + max_tokens + max_drafts
    chunk_rows = min(prompt_length, CHUNK_ROWS if target.native is None else NATIVE_CHUNK_ROWS)
    cache = KVCache(target.config, max_length, max_drafts + 1, target.compute_dtype, table.device, chunk_rows, pool)
    if rope is None:
        rope = rope_for(target.config, torch.arange(max_length, device=table.device), target.compute_dtype)
    return Sequence(params, cache, rope, None, grammar)


def prefill(target: Target, sequence: Sequence, prompt_ids: Tensor, chunk_rows: int = CHUNK_ROWS) -> RoundOutput:
    """Run the prompt [P] through the target in chunks and commit the first output token."""
    begin_prompt(target, sequence, prompt_ids)
    for chunk in prompt_ids.split(min(chunk_rows, sequence.cache.chunk_rows)):
        hidden_1D = forward_rows(target, [Rows(sequence, chunk, keep=1)])
        sequence.cache.commit(chunk.shape[0])
    return end_prompt(target, sequence, hidden_1D, 0)


def begin_prompt(target: Target, sequence: Sequence, prompt_ids: Tensor) -> None:
    """Before the first rows of a prompt."""
    if sequence.params.uses_history:
        sequence.history = TokenHistory(prompt_ids, target.config.vocab_size, prompt_ids.device)
    sequence.length = prompt_ids.shape[0]


def end_prompt(target: Target, sequence: Sequence, hidden_RD: Tensor, row: int) -> RoundOutput:
    """After the last one, whose hidden state is that row: commit the first output token."""
    turn = Turn(sequence, 0)
    (scores,) = score_rows(target, [turn], [1], hidden_RD, first=row)
    return _outcome(turn, NO_DRAFTS, hidden_RD, scores)


def play_round(
    target: Target,
    drafter: Drafter | None,
    sequence: Sequence,
    draft_tokens: int,
    verification: Verification,
    stop: StopRule | None = None,
) -> RoundOutput:
    """Draft, verify, commit."""
    turns = [Turn(sequence, draft_tokens, verification, stop)]
    return verify_round(target, turns, propose(target, drafter, turns))[0]


def propose(target: Target, drafter: Drafter | None, turns: Items[Turn]) -> list[Drafts]:
    """The first half of a round: every sequence's drafts. The sequences are left as they are."""
    drafts = [NO_DRAFTS] * len(turns)
    drafting = [i for i, turn in enumerate(turns) if turn.draft_tokens]
    if drafter is not None and drafting:
        made = draft(drafter, target, [_drafting(turns[i]) for i in drafting])
        for i, of_one in zip(drafting, made, strict=True):
            drafts[i] = of_one
    return drafts


def verify_round(target: Target, turns: Items[Turn], drafts: Items[Drafts]) -> list[RoundOutput]:
    """The second half: one target call over each sequence's last token and drafts, and what follows from it."""
    calls = [verify_rows(turn, of_one) for turn, of_one in zip(turns, drafts, strict=True)]
    hidden_RD = forward_rows(target, calls)
    scores = score_rows(target, turns, [call.keep for call in calls], hidden_RD)
    return [conclude(turn, of_one, hidden_RD, of_turn)
            for turn, of_one, of_turn in zip(turns, drafts, scores, strict=True)]  # fmt: skip


def verify_rows(turn: Turn, drafts: Drafts) -> Rows:
    """What a sequence sends through the target in a round."""
    sequence, tokens = turn.sequence, drafts.tokens
    if isinstance(tokens, list):
        return Rows(sequence, [sequence.last_token, *tokens], len(tokens) + 1)
    return Rows(sequence, F.pad(tokens, (1, 0), value=sequence.last_token), len(tokens) + 1)


def forward_rows(target: Target, calls: Items[Rows]) -> Tensor:
    """Begin the caches' calls; hidden states after the final norm of each sequence's wanted rows, one after the other,
    [sum of keep, D]."""
    for call in calls:
        call.sequence.cache.begin(len(call.tokens))
    if target.native is None:
        parts = [_forward(target, call) for call in calls]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
    tokens: list[int] = []
    for call in calls:
        tokens += call.tokens if isinstance(call.tokens, list) else call.tokens.tolist()
    return target.native.forward(tokens, [call.sequence for call in calls], [call.keep for call in calls])


def _forward(target: Target, call: Rows) -> Tensor:
    cache = call.sequence.cache
    tokens_T = torch.as_tensor(call.tokens, device=cache.device)
    rope = slice_rope(call.sequence.rope, cache.length, cache.length + len(tokens_T))
    hidden: Tensor = target(tokens_T[None], rope, cache, last_only=call.keep == 1)
    return hidden[0, -call.keep :]


def _drafting(turn: Turn) -> Drafting:
    return Drafting(turn.sequence, turn.draft_tokens, turn.verification == "exact", turn.stop)


def score_rows(target: Target, turns: Items[Turn], rows: Items[int], hidden_RD: Tensor, first: int = 0) -> list[Scores]:
    """What each turn's tokens follow from. All turns of a kind share one pass over the head.

    `rows`: how many each turn has; they lie one after the other from row `first` of `hidden_RD` on.
    """
    native = target.native
    scores: list[Scores | None] = []
    plain: list[int] = []  # turns
    places: list[int] = []  # their rows
    temperatures: list[float] = []
    keys: list[int] = []
    begins, begin = [], first
    for i, (turn, count) in enumerate(zip(turns, rows, strict=True)):
        begins.append(begin)
        scores.append(None)
        if native is not None and turn.is_plain(count):
            plain.append(i)
            places += range(begin, begin + count)
            temperatures += [turn.sequence.params.temperature] * count
            keys += _keys(turn.sequence, count)
        begin += count
    if native is not None and plain:
        tokens, at = native.choose(hidden_RD, places, temperatures, keys), 0
        for i in plain:
            scores[i] = Scores(begins[i], tokens[at : at + rows[i]])
            at += rows[i]
    others = [i for i, of_one in enumerate(scores) if of_one is None]
    if others:
        states = [hidden_RD[begins[i] : begins[i] + rows[i]] for i in others] if plain else [hidden_RD[first:begin]]
        logits_RV = target.logits(states[0] if len(states) == 1 else torch.cat(states))
        for i, logits_TV in zip(others, logits_RV.split([rows[i] for i in others]), strict=True):
            scores[i] = Scores(begins[i], logits_TV)
    return [of_one for of_one in scores if of_one is not None]


def _keys(sequence: Sequence, rows: int) -> list[int]:
    """Noise keys of a sequence's next positions; 0 where none are used."""
    if sequence.params.temperature == 0:
        return [0] * rows
    return [row_key(sequence.params.seed, sequence.length + i, STREAM_CHOICE) for i in range(rows)]


def conclude(turn: Turn, drafts: Drafts, hidden_RD: Tensor, scores: Scores) -> RoundOutput:
    """Choose at every row, count the accepted drafts, and move the sequence on. `scores` are of `score_rows`."""
    output = _outcome(turn, drafts, hidden_RD, scores)
    turn.sequence.cache.commit(output.accepted + 1)
    return output


def _outcome(turn: Turn, drafts: Drafts, hidden_RD: Tensor, scores: Scores) -> RoundOutput:
    """Reads the device once."""
    sequence, params, (begin, of_rows) = turn.sequence, turn.sequence.params, scores
    if isinstance(of_rows, list):
        accepted = agreeing(of_rows, drafts.on_host()) if len(drafts) else 0
        return _commit(sequence, drafts, hidden_RD, begin, of_rows[: accepted + 1], None)
    verified = _verify(of_rows, sequence, drafts, turn.verification)
    accepted, *tokens = torch.cat((verified.n_accepted.view(1), verified.tokens)).tolist()
    logprobs = None
    if params.logprobs is not None:
        logprobs = top_logprobs(of_rows[: accepted + 1], verified.tokens[: accepted + 1], params.logprobs)
    if sequence.history is not None:
        sequence.history.commit(verified.tokens[: accepted + 1])
    return _commit(sequence, drafts, hidden_RD, begin, tokens[: accepted + 1], logprobs)


def _commit(
    sequence: Sequence, drafts: Drafts, hidden_RD: Tensor, begin: int, committed: list[int],
    logprobs: TopLogprobs | None,
) -> RoundOutput:  # fmt: skip
    """Move the sequence on by the tokens of a round."""
    accepted = len(committed) - 1
    complete_after = None if sequence.grammar is None else sequence.grammar.commit(committed)
    sequence.length += len(committed)
    sequence.last_token, sequence.states_RD, sequence.state = committed[-1], hidden_RD, begin + accepted
    return RoundOutput(committed, len(drafts), accepted, logprobs, drafts.confidences, complete_after)


def _verify(logits_TV: Tensor, sequence: Sequence, drafts: Drafts, verification: Verification) -> Verified:
    params, drafted, device = sequence.params, len(drafts), logits_TV.device
    tokens_K = drafts.on_device(device)
    counts = None if sequence.history is None else sequence.history.rows(tokens_K)
    allowed = None if sequence.grammar is None else sequence.grammar.allowed(drafts.on_host())
    candidates = process(logits_TV, params, counts=counts, allowed_RV=allowed)
    if verification == "exact" or drafted == 0:
        positions = torch.arange(sequence.length, sequence.length + drafted + 1, device=device)
        return verify_exact(choose(candidates, params, positions), tokens_K)
    vocab = logits_TV.shape[-1]
    verify = verify_rejection if verification == "rejection" else verify_block
    draft_probs = torch.cat([probabilities(c, params, vocab) for c in drafts.candidates])
    first_position = torch.tensor(sequence.length, device=device)
    return verify(probabilities(candidates, params, vocab), draft_probs, tokens_K, params.seed, first_position)
