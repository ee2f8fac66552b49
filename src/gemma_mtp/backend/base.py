"""What decoding asks of the machine: run rows of many sequences, choose tokens, draft.

A backend runs one target and, if there is one, its drafter. The models hold weights and reference math and know no
backend. Every backend keeps row invariance: the hidden state, keys and values of a row depend on the tokens up to that
row alone, bit for bit, and not on the rows, sequences, blocks or chunks beside it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from gemma_mtp.config import LayerType
from gemma_mtp.decoding.early_stop import StopRule
from gemma_mtp.decoding.params import NO_FILTERS, ChoiceKind, Filters, SamplingParams
from gemma_mtp.kv.pool import KVCache, KVPool
from gemma_mtp.model.drafter import Drafter
from gemma_mtp.model.target import Target

#: what no backend chooses itself
PROCESSED: ChoiceKind = "processed"


class Rows(NamedTuple):
    """Rows of one sequence for the target, from its committed length on.

    Hidden states are wanted for the last `keep` of them, at least one. The cache's table has begun the call.
    """

    cache: KVCache
    token_ids: list[int]
    keep: int


class DraftRows(NamedTuple):
    """A sequence to draft for: at most `most` tokens, chosen by logits and noise alone.

    `keys`: the noise key of each draft (`noise.row_key`); not looked at where the temperature is 0. `stop` may end the
    drafts earlier. `filters`: only of backends that choose filtered.
    """

    cache: KVCache
    last_token: int
    most: int
    temperature: float
    keys: list[int]
    stop: StopRule | None
    filters: Filters = NO_FILTERS


class RoundRows(NamedTuple):
    """A sequence's part in a whole round: at most `most` drafts after its last token, by logits and noise alone.

    `stream_key`: of its noise (`noise.stream_key`). `room`: how many tokens it may still commit, or 0 where that is not
    known. `filters`: as in `DraftRows`.
    """

    cache: KVCache
    last_token: int
    most: int
    temperature: float
    stream_key: int
    room: int
    filters: Filters = NO_FILTERS


class Committed(NamedTuple):
    """What a whole round of one sequence committed: accepted drafts and the target's own token; `drafted` at most."""

    token_ids: list[int]
    drafted: int


class WholeRounds(Protocol):
    """Plays rounds of `exact` verification from drafting to the state of the sequence, and may be ahead of the host."""

    @property
    def longest(self) -> int:
        """Drafts of a round, at most."""
        ...

    def play(self, pool: KVPool, calls: Sequence[RoundRows]) -> list[Committed]:
        """Returns what a round of each sequence committed, and leaves its state in its slot; the host commits. Takes
        the blocks that it needs; raises OutOfBlocksError.

        Where there is room, the next round of these sequences may already be played when this returns, and be the
        one that the next `play` returns: with the drafts that were asked for in this call. A sequence that is not
        among the next calls has lost that round. So every step plays, be it without calls.
        """
        ...


class DraftedTokens(NamedTuple):
    """Draft tokens of one sequence, and how sure the drafter was of each; no confidences without a stop rule."""

    token_ids: list[int]
    confidences: list[float]


class DraftStep(NamedTuple):
    """One step of the drafter for R sequences.

    `logits_RC`: of C candidates; `token_ids_RC`: their ids, None where every token is a candidate;
    `projected_RD`: what the next step takes in place of the target's state.
    """

    logits_RC: Tensor
    token_ids_RC: Tensor | None
    projected_RD: Tensor


class Backend(Protocol):
    """Runs a target and its drafter on one device."""

    @property
    def target(self) -> Target: ...

    @property
    def drafter(self) -> Drafter | None: ...

    @property
    def device(self) -> torch.device:
        """Where pools, logits and processed choices live."""
        ...

    @property
    def kv_dtype(self) -> torch.dtype:
        """Of keys, values and hidden states."""
        ...

    @property
    def chunk_rows(self) -> int:
        """Prompt rows of one call, at most: enough to use the hardware, few enough to bound activations."""
        ...

    @property
    def watches_drafts(self) -> bool:
        """Whether a stop rule costs nothing: each draft's confidence is known without waiting for a device."""
        ...

    @property
    def chooses(self) -> Collection[ChoiceKind]:
        """The kinds of choice that `choose` and `draft` make."""
        ...

    @property
    def rounds(self) -> WholeRounds | None:
        """What plays rounds as a whole on the device; None where the host takes part between drafts and choices."""
        ...

    @property
    def identity(self) -> Mapping[str, str | int]:
        """What measured costs depend on beside the models: the processor, the operators, the threads."""
        ...

    def with_drafter(self, drafter: Drafter | None) -> Backend:
        """Returns a backend of the same target and another drafter."""
        ...

    def workspace_bytes(self, sequences: int, context: int) -> int:
        """Returns the bytes of a card that decoding takes beside weights and a pool, of so many sequences of so many
        tokens at most: what a pool leaves free. Where there is no card, 0."""
        ...

    def make_pool(self, counts: Mapping[LayerType, int], slots: int) -> KVPool:
        """Returns a pool of so many blocks of each kind, for so many open sequences."""
        ...

    def forward(self, calls: Sequence[Rows]) -> Tensor:
        """Run rows of sequences of one pool. Returns hidden states after the final norm, [sum of keep, D], which the
        pool's next call may overwrite."""
        ...

    def keep_states(self, caches: Sequence[KVCache], hidden_RD: Tensor, rows: Sequence[int]) -> None:
        """Copy a row of `hidden_RD` into each sequence's slot."""
        ...

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """Returns soft-capped logits [R, V] of hidden states after the final norm."""
        ...

    def choose(
        self, hidden_RD: Tensor, rows: Sequence[int], temperatures: Sequence[float] = (), keys: Sequence[int] = (),
        filters: Sequence[Filters] = (),
    ) -> list[int]:  # fmt: skip
        """Returns the token of each of these rows of `hidden_RD`, the lowest id among equals.

        At temperature 0 it is the arg max of the logits; else of logits / temperature plus Gumbel noise of that key, of
        what the row's filters keep. No `temperatures` and `keys` are 0 for all rows, and no `filters` are none for any
        row; a backend that does not choose filtered is given none.
        """
        ...

    def draft(self, calls: Sequence[DraftRows]) -> list[DraftedTokens]:
        """Returns the drafts of each sequence. The sequences are left as they are."""
        ...

    def draft_step(self, caches: Sequence[KVCache], token_ids_R: Tensor, hidden_RD: Tensor) -> DraftStep:
        """Run one step of the drafter for each sequence, from its last token (or draft) and the state behind it."""
        ...


def choice_of(backend: Backend, params: SamplingParams) -> ChoiceKind:
    """Returns how rounds with these parameters choose on a backend: what it does not choose itself is processed."""
    kind = params.choice
    return kind if kind in backend.chooses else PROCESSED
