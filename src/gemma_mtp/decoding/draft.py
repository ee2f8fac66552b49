"""Propose draft tokens: K chained drafter steps at one constant position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from gemma_mtp.decoding.early_stop import StopRule, chance
from gemma_mtp.decoding.grammar import GrammarState
from gemma_mtp.decoding.noise import STREAM_CHOICE, STREAM_DRAFT, round_counters, row_key
from gemma_mtp.decoding.sampling import Candidates, SamplingParams, TokenHistory, choose, process
from gemma_mtp.kv_cache import CommittedKeyValues
from gemma_mtp.model.drafter import Drafter
from gemma_mtp.model.layers import slice_rope
from gemma_mtp.model.native import Begun, NativeDrafter
from gemma_mtp.model.target import Target

#: for the native operators: draft all that are asked for
NO_RULE: tuple[Sequence[float], float, float] = ((), 0.0, 1.0)


@dataclass(frozen=True)
class Drafts:
    """Draft tokens, where they are (int64 [K] on the device, or on the host), and what each was chosen from (one row of
    `Candidates` a draft).

    `confidences`: the probability that the drafter gave to each, where a stop rule asked for it.
    """

    tokens: Tensor | list[int]
    candidates: list[Candidates] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tokens)

    def on_host(self) -> list[int]:
        """May read the device."""
        return self.tokens if isinstance(self.tokens, list) else self.tokens.tolist()

    def on_device(self, device: torch.device) -> Tensor:
        """int64 [K]."""
        return torch.as_tensor(self.tokens, dtype=torch.int64, device=device)


def draft_noise(coupled: bool, first_position: int, count: int, device: torch.device) -> tuple[Tensor, int]:
    """Noise counters of the drafts and their stream.

    Coupled drafts use the target's own noise at their position, so that they agree with its choice as often as the two
    distributions allow (Daliri, Musco and Suresh 2024); `rejection` and `block` need independent draws.
    """
    if coupled:
        return torch.arange(first_position, first_position + count, device=device), STREAM_CHOICE
    return round_counters(torch.tensor(first_position, device=device), count), STREAM_DRAFT


class Drafted(Begun, Protocol):
    """What drafting needs to know of a sequence."""

    params: SamplingParams
    history: TokenHistory | None
    grammar: GrammarState | None
    length: int

    @property
    def last_state(self) -> Tensor: ...


@dataclass(frozen=True)
class Drafting:
    """A sequence to draft for: `count` tokens, or fewer where `stop` or its grammar says so. `coupled`: drawn with the
    target's own noise."""

    sequence: Drafted
    count: int
    coupled: bool
    stop: StopRule | None = None

    @property
    def is_plain(self) -> bool:
        """Whether drafts are chosen by logits and the target's own noise alone."""
        choice = self.sequence.params.choice
        return choice == "argmax" or (choice == "drawn" and self.coupled)

    @property
    def keys(self) -> list[int]:
        """Noise keys of plain drafts, for the native operators; 0 where they use none."""
        params, first = self.sequence.params, self.sequence.length
        if params.greedy:
            return [0] * self.count
        return [row_key(params.seed, position, STREAM_CHOICE) for position in range(first, first + self.count)]


def draft(drafter: Drafter, target: Target, sequences: Sequence[Drafting]) -> list[Drafts]:
    """Draft for several sequences: together where the drafter runs natively, else one after another.

    Without a stop rule and a grammar there is no host synchronisation; with one there is one a draft. Every step of a
    sequence keeps the one position of its last committed token, and feeds back its own token and projected state.
    """
    native = drafter.native
    if native is None:
        return [_Steps(one).run(drafter, target) for one in sequences]
    drafts: dict[int, Drafts] = {}
    together = [i for i, one in enumerate(sequences) if one.is_plain]
    if together:
        drafts.update(zip(together, _native_drafts(native, [sequences[i] for i in together]), strict=True))
    drawn = {i: _Steps(one) for i, one in enumerate(sequences) if i not in drafts}
    while going := [steps for steps in drawn.values() if steps.goes_on()]:
        inputs_R2D = torch.cat([steps.inputs(target)[0] for steps in going]).float()
        states_RH, projected_RD = native.step(inputs_R2D, [steps.drafting.sequence for steps in going])
        logits_RC, ids_RC = drafter.candidates(states_RH)
        for r, steps in enumerate(going):
            ids_1C = None if ids_RC is None else ids_RC[r : r + 1]
            steps.take(projected_RD[r].view(1, 1, -1), logits_RC[r : r + 1], ids_1C)
    drafts.update((i, steps.drafts()) for i, steps in drawn.items())
    return [drafts[i] for i in range(len(sequences))]


class _Steps:
    """Drafting for one sequence under way."""

    def __init__(self, drafting: Drafting) -> None:
        self.drafting = drafting
        sequence = drafting.sequence
        self.token_11 = torch.tensor([[sequence.last_token]], device=sequence.last_state.device)
        self.hidden_11D = sequence.last_state[None, None]
        self.noise = draft_noise(drafting.coupled, sequence.length, drafting.count, self.token_11.device)
        self.tokens: list[Tensor] = []
        self.candidates: list[Candidates] = []
        self.confidences: list[float] = []
        self.token_ids: list[int] = []  # on the host, for the grammar
        self.reach = 1.0
        self.ended = False

    def goes_on(self) -> bool:
        step, stop, grammar = len(self.tokens), self.drafting.stop, self.drafting.sequence.grammar
        if self.ended or step == self.drafting.count:
            return False
        if grammar is not None and grammar.ended_after(self.token_ids):
            return False
        return stop is None or step == 0 or stop.goes_on(step, self.reach)

    def inputs(self, target: Target) -> Tensor:
        """concat(embedding, hidden) [1, 1, 2 D] of the next step."""
        return torch.cat((target.embed(self.token_11), self.hidden_11D), dim=-1)

    def take(self, projected_11D: Tensor, logits_1C: Tensor, token_ids_1C: Tensor | None) -> None:
        """Choose a step's token, and go on from it and the projected state."""
        sequence, step, stop = self.drafting.sequence, len(self.tokens), self.drafting.stop
        counters_K, stream = self.noise
        history, grammar = sequence.history, sequence.grammar
        counts = None if history is None else history.rows(_stack(self.tokens, self.token_11), first=step)
        allowed = None if grammar is None else grammar.allowed(self.token_ids, first=step)
        candidates = process(logits_1C, sequence.params, token_ids_1C, counts, allowed)
        if sequence.params.forbids and not candidates.any_possible():
            self.ended = True  # a centroid head scores a part of the vocabulary, in which there may be nothing allowed
            return
        self.candidates.append(candidates)
        self.tokens.append(choose(self.candidates[-1], sequence.params, counters_K[step : step + 1], stream))
        self.token_11, self.hidden_11D = self.tokens[-1].unsqueeze(0), projected_11D
        if grammar is not None:
            self.token_ids.append(int(self.token_11))
        if stop is not None:
            self.confidences.append(self.candidates[-1].probability(self.tokens[-1]))
            self.reach *= chance(self.confidences[-1], stop.bias, stop.slope)

    def run(self, drafter: Drafter, target: Target) -> Drafts:
        """All steps, by PyTorch's operators."""
        sequence, position = self.drafting.sequence, self.drafting.sequence.length - 1
        rope = slice_rope(sequence.rope, position, position + 1)
        kv = CommittedKeyValues(sequence.cache, drafter.config.text.layer_types)
        while self.goes_on():
            state, projected = drafter(target.embed(self.token_11), self.hidden_11D, rope, kv)
            self.take(projected, *drafter.candidates(state[0]))
        return self.drafts()

    def drafts(self) -> Drafts:
        return Drafts(_stack(self.tokens, self.token_11), self.candidates, self.confidences)


def _native_drafts(drafter: NativeDrafter, sequences: Sequence[Drafting]) -> list[Drafts]:
    """All drafts in one call, which knows the same stop rule."""
    of = [one.sequence for one in sequences]
    rules = [NO_RULE if one.stop is None else (one.stop.least, one.stop.bias, one.stop.slope) for one in sequences]
    tokens, confidences, made = drafter.draft(
        of, [one.count for one in sequences], rules, [sequence.params.temperature for sequence in of],
        [one.keys for one in sequences],
    )  # fmt: skip
    return [
        Drafts(tokens[i][:n], [], [] if one.stop is None else confidences[i][:n])
        for i, (one, n) in enumerate(zip(sequences, made, strict=True))
    ]


def _stack(tokens: list[Tensor], like: Tensor) -> Tensor:
    return torch.cat(tokens) if tokens else like.new_zeros(0)
