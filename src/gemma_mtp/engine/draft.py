"""Propose draft tokens: chained drafter steps at one constant position, that of the last committed token."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gemma_mtp.backend.base import Backend, DraftRows
from gemma_mtp.decoding.early_stop import chance
from gemma_mtp.decoding.noise import STREAM_CHOICE, STREAM_DRAFT, round_counters
from gemma_mtp.decoding.sampling import Candidates, choose, process
from gemma_mtp.engine.sequence import Turn


@dataclass(frozen=True)
class Drafts:
    """Draft tokens of one sequence.

    `candidates`: what each was chosen from, one row a draft, where the choice was made outside the backend.
    `confidences`: the probability that the drafter gave to each, where a stop rule asked for it.
    """

    token_ids: list[int]
    candidates: list[Candidates] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.token_ids)


NO_DRAFTS = Drafts([])


def propose(backend: Backend, turns: Items[Turn]) -> list[Drafts]:
    """Returns every turn's drafts; none without a drafter. The sequences are left as they are."""
    drafts = [NO_DRAFTS] * len(turns)
    drafting = [i for i, turn in enumerate(turns) if turn.draft_tokens]
    if not drafting or backend.drafter is None:
        return drafts
    plain = [i for i in drafting if turns[i].backend_chooses(turns[i].draft_tokens)]
    if plain:
        made = backend.draft([_draft_rows(turns[i]) for i in plain])
        for i, of_one in zip(plain, made, strict=True):
            drafts[i] = Drafts(of_one.token_ids, [], of_one.confidences)
    stepwise = {i: _StepwiseDraft(turns[i], backend.device) for i in drafting if i not in plain}
    while going := [draft for draft in stepwise.values() if draft.goes_on()]:
        caches = [draft.turn.sequence.cache for draft in going]
        tokens_R, hidden_RD = torch.cat([draft.token_1 for draft in going]), torch.cat([d.hidden_1D for d in going])
        step = backend.draft_step(caches, tokens_R, hidden_RD)
        for r, draft in enumerate(going):
            ids_1C = None if step.token_ids_RC is None else step.token_ids_RC[r : r + 1]
            draft.take(step.projected_RD[r : r + 1], step.logits_RC[r : r + 1], ids_1C)
    for i, draft in stepwise.items():
        drafts[i] = draft.drafts()
    return drafts


def _draft_rows(turn: Turn) -> DraftRows:
    sequence, count = turn.sequence, turn.draft_tokens
    params, keys = sequence.params, sequence.keys(count)
    return DraftRows(sequence.cache, sequence.last_token, count, params.temperature, keys, turn.stop, params.filters)


class _StepwiseDraft:
    """Drafting for one sequence under way, where penalties, filters, a grammar or independent noise take part.

    Without a stop rule and a grammar the host waits for the device at the end only.
    """

    def __init__(self, turn: Turn, device: torch.device) -> None:
        self.turn = turn
        sequence = turn.sequence
        self.token_1 = torch.tensor([sequence.last_token], device=device)
        self.hidden_1D = sequence.cache.state[None]
        coupled = turn.verification == "exact"
        self.noise = draft_noise(coupled, sequence.length, turn.draft_tokens, device)
        self.tokens: list[Tensor] = []
        self.candidates: list[Candidates] = []
        self.confidences: list[float] = []
        self.token_ids: list[int] = []  # on the host, for the grammar
        self.reach = 1.0
        self.ended = False

    def goes_on(self) -> bool:
        """Returns whether another draft is to be made."""
        step, stop, grammar = len(self.tokens), self.turn.stop, self.turn.sequence.grammar
        if self.ended or step == self.turn.draft_tokens:
            return False
        if grammar is not None and grammar.ended_after(self.token_ids):
            return False
        return stop is None or step == 0 or stop.goes_on(step, self.reach)

    def take(self, projected_1D: Tensor, logits_1C: Tensor, token_ids_1C: Tensor | None) -> None:
        """Choose a step's token, and go on from it and the projected state."""
        sequence, step, stop = self.turn.sequence, len(self.tokens), self.turn.stop
        counters_K, stream = self.noise
        history, grammar = sequence.history, sequence.grammar
        counts = None if history is None else history.rows(self._stacked(), first=step)
        allowed = None if grammar is None else grammar.limits(self.token_ids, first=step)
        candidates = process(logits_1C, sequence.params, token_ids_1C, counts, allowed)
        if sequence.params.forbids and not candidates.any_possible():
            self.ended = True  # a centroid head scores a part of the vocabulary, in which there may be nothing allowed
            return
        self.candidates.append(candidates)
        self.tokens.append(choose(candidates, sequence.params, counters_K[step : step + 1], stream))
        self.token_1, self.hidden_1D = self.tokens[-1], projected_1D
        if grammar is not None:
            self.token_ids.append(int(self.token_1))
        if stop is not None:
            self.confidences.append(candidates.probability(self.tokens[-1]))
            self.reach *= chance(self.confidences[-1], stop.bias, stop.slope)

    def drafts(self) -> Drafts:
        """Returns what was drafted; reads the device."""
        return Drafts(self._stacked().tolist(), self.candidates, self.confidences)

    def _stacked(self) -> Tensor:
        return torch.cat(self.tokens) if self.tokens else self.token_1.new_zeros(0)


def draft_noise(coupled: bool, first_position: int, count: int, device: torch.device) -> tuple[Tensor, int]:
    """Returns the noise counters of the drafts and their stream.

    Coupled drafts use the target's own noise at their position, so that they agree with its choice as often as the two
    distributions allow (Daliri, Musco and Suresh 2024); `rejection` and `block` need independent draws.
    """
    if coupled:
        return torch.arange(first_position, first_position + count, device=device), STREAM_CHOICE
    return round_counters(torch.tensor(first_position, device=device), count), STREAM_DRAFT
