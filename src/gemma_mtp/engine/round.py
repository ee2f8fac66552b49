"""One round: draft K tokens, verify K+1 positions in one target call, commit what agrees, discard the rest.

A round with K = 0 is plain decoding, and so is the end of a prompt, whose last row chooses the first token. Several
sequences play a round together, each as it would alone, because no row's result depends on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import NamedTuple

import torch
from torch import Tensor

from gemma_mtp.backend.base import Backend, Rows
from gemma_mtp.decoding.params import Filters
from gemma_mtp.decoding.sampling import TopLogprobs, choose, probabilities, process, top_logprobs
from gemma_mtp.decoding.verify import Verified, agreeing, verify_block, verify_exact, verify_rejection
from gemma_mtp.engine.draft import NO_DRAFTS, Drafts
from gemma_mtp.engine.sequence import Sequence, Turn


class RoundOutput(NamedTuple):
    """What a round committed: `accepted` drafts and one token of the target's own."""

    token_ids: list[int]
    drafted: int
    accepted: int
    logprobs: TopLogprobs | None
    confidences: Items[float] = ()  # in each draft, where a stop rule asked for them
    complete_after: int | None = None  # so many tokens end the output: the grammar allows none after them


class Scored(NamedTuple):
    """A turn with its drafts, and the first of its rows among the hidden states of the call."""

    turn: Turn
    drafts: Drafts
    begin: int


def verify_rows(turn: Turn, drafts: Drafts) -> Rows:
    """Returns what a sequence sends through the target in a round: its last token, then its drafts."""
    sequence, tokens = turn.sequence, drafts.token_ids
    return Rows(sequence.cache, [sequence.last_token, *tokens], len(tokens) + 1)


def forward(backend: Backend, calls: Items[Rows]) -> Tensor:
    """Take the blocks for the calls' rows and run them. Returns the wanted hidden states, [sum of keep, D]."""
    for cache, token_ids, _ in calls:
        cache.table.reserve(len(token_ids))
    return backend.forward(calls)


def verify_round(backend: Backend, turns: Items[Turn], drafts: Items[Drafts]) -> list[RoundOutput]:
    """The second half of a round, after `propose`: one target call over each sequence's last token and drafts, and what
    follows. Raises what the first turn that fails raised."""
    hidden_RD = forward(backend, [verify_rows(turn, of_one) for turn, of_one in zip(turns, drafts, strict=True)])
    scored, begin = [], 0
    for turn, of_one in zip(turns, drafts, strict=True):
        scored.append(Scored(turn, of_one, begin))
        begin += len(of_one) + 1
    return _or_raise(settle(backend, scored, hidden_RD))


def prefill(backend: Backend, sequence: Sequence, prompt_ids: Items[int], chunk_rows: int | None = None) -> RoundOutput:
    """Run a prompt through the target in chunks and commit the first output token."""
    rows = min(chunk_rows or backend.chunk_rows, backend.chunk_rows)
    hidden_1D = torch.empty(0)
    for start in range(sequence.cache.table.length, len(prompt_ids), rows):
        chunk = list(prompt_ids[start : start + rows])
        hidden_1D = forward(backend, [Rows(sequence.cache, chunk, keep=1)])
        sequence.cache.table.commit(len(chunk))
    (output,) = _or_raise(settle(backend, [Scored(Turn(sequence, 0), NO_DRAFTS, 0)], hidden_1D))
    return output


def settle(backend: Backend, scored: Items[Scored], hidden_RD: Tensor) -> list[RoundOutput | Exception]:
    """Choose at every row, count the accepted drafts, and move the sequences on.

    Returns each turn's output, or the exception that it ended in: a turn that fails does not touch the others. All
    turns of a kind share one pass over the head, and the host reads the device once for each kind.
    """
    plain = [i for i, (turn, drafts, _) in enumerate(scored) if turn.backend_chooses(len(drafts.token_ids))]
    committed: dict[int, list[int]] = {}
    if plain:
        committed.update(zip(plain, _choose_plain(backend, [scored[i] for i in plain], hidden_RD), strict=True))
    logprobs: dict[int, TopLogprobs] = {}
    outputs: dict[int, RoundOutput | Exception] = {}
    if len(plain) < len(scored):
        others = [i for i in range(len(scored)) if i not in committed]
        _choose_processed(backend, scored, others, hidden_RD, committed, logprobs, outputs)
    caches, rows = [], []
    for i, tokens in committed.items():
        try:
            outputs[i] = _commit(scored[i], tokens, logprobs.get(i))
        except Exception as error:
            outputs[i] = error
        else:
            caches.append(scored[i].turn.sequence.cache)
            rows.append(scored[i].begin + len(tokens) - 1)
    if caches:
        backend.keep_states(caches, hidden_RD, rows)
    return [outputs[i] for i in range(len(scored))]


def _choose_plain(backend: Backend, scored: Items[Scored], hidden_RD: Tensor) -> list[list[int]]:
    """Returns the committed tokens of turns whose choices the backend makes."""
    rows: list[int] = []
    drawn = False
    for turn, drafts, begin in scored:
        rows += range(begin, begin + len(drafts.token_ids) + 1)
        drawn = drawn or turn.sequence.choice != "argmax"
    tokens = backend.choose(hidden_RD, rows, *(_draws(backend, scored) if drawn else ()))
    committed, at = [], 0
    for _, drafts, _ in scored:
        count = len(drafts.token_ids) + 1
        choices = tokens[at : at + count]
        at += count
        committed.append(choices[: agreeing(choices, drafts.token_ids) + 1] if count > 1 else choices)
    return committed


def _draws(backend: Backend, scored: Items[Scored]) -> tuple[list[float], list[int], list[Filters]]:
    """Returns the temperature, noise key and, where the backend knows them, filters of every row."""
    temperatures: list[float] = []
    keys: list[int] = []
    filters: list[Filters] = []
    for (sequence, *_), drafts, _ in scored:
        count = len(drafts.token_ids) + 1
        temperatures += [sequence.params.temperature] * count
        keys += sequence.keys(count)
        filters += [sequence.params.filters] * count
    return temperatures, keys, filters if "filtered" in backend.chooses else []


def _choose_processed(
    backend: Backend, scored: Items[Scored], others: Items[int], hidden_RD: Tensor, committed: dict[int, list[int]],
    logprobs: dict[int, TopLogprobs], outputs: dict[int, RoundOutput | Exception],
) -> None:  # fmt: skip
    """Fill in the committed tokens and log-probabilities of turns that need logits, or the exceptions."""
    states = [hidden_RD[one.begin : one.begin + len(one.drafts) + 1] for one in (scored[i] for i in others)]
    logits_RV = backend.logits(states[0] if len(states) == 1 else torch.cat(states))
    found: list[tuple[int, Tensor, Verified]] = []
    for i, logits_TV in zip(others, logits_RV.split([len(one) for one in states]), strict=True):
        try:
            found.append((i, logits_TV, _verify(scored[i], logits_TV)))
        except Exception as error:
            outputs[i] = error
    if not found:
        return
    numbers = iter(torch.cat([torch.cat((v.n_accepted.view(1), v.tokens)) for _, _, v in found]).tolist())
    for i, logits_TV, verified in found:
        accepted = next(numbers)
        tokens = [next(numbers) for _ in range(len(verified.tokens))][: accepted + 1]
        committed[i] = tokens
        params = scored[i].turn.sequence.params
        if params.logprobs is not None:
            count = len(tokens)
            logprobs[i] = top_logprobs(logits_TV[:count], verified.tokens[:count], params.logprobs)


def _commit(one: Scored, committed: list[int], logprobs: TopLogprobs | None) -> RoundOutput:
    """Move a sequence on by the tokens of its round."""
    sequence, drafts, count = one.turn.sequence, one.drafts, len(committed)
    if sequence.history is not None:
        sequence.history.commit(torch.tensor(committed, device=sequence.history.output_V.device))
    complete_after = None if sequence.grammar is None else sequence.grammar.commit(committed)
    sequence.length += count
    sequence.last_token = committed[-1]
    table = sequence.cache.table
    table.commit(sequence.length - 1 - table.length)  # none of a prompt's, which are committed chunk by chunk
    return RoundOutput(committed, len(drafts.token_ids), count - 1, logprobs, drafts.confidences, complete_after)


def _verify(one: Scored, logits_TV: Tensor) -> Verified:
    """Returns how many drafts are kept and the tokens, on the device."""
    sequence, drafts, verification = one.turn.sequence, one.drafts, one.turn.verification
    params, drafted, device = sequence.params, len(drafts), logits_TV.device
    tokens_K = torch.tensor(drafts.token_ids, dtype=torch.int64, device=device)
    counts = None if sequence.history is None else sequence.history.rows(tokens_K)
    allowed = None if sequence.grammar is None else sequence.grammar.limits(drafts.token_ids)
    candidates = process(logits_TV, params, counts=counts, allowed_RV=allowed)
    if verification == "exact" or drafted == 0:
        positions = torch.arange(sequence.length, sequence.length + drafted + 1, device=device)
        return verify_exact(choose(candidates, params, positions), tokens_K)
    vocab = logits_TV.shape[-1]
    verify = verify_rejection if verification == "rejection" else verify_block
    draft_probs = torch.cat([probabilities(c, params, vocab) for c in drafts.candidates])
    first_position = torch.tensor(sequence.length, device=device)
    return verify(probabilities(candidates, params, vocab), draft_probs, tokens_K, params.seed, first_position)


def _or_raise(outputs: Items[RoundOutput | Exception]) -> list[RoundOutput]:
    for output in outputs:
        if isinstance(output, Exception):
            raise output
    return [output for output in outputs if not isinstance(output, Exception)]
