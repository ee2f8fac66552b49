"""A sequence being decoded, and its part in a round."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import NamedTuple

from gemma_mtp.backend.base import PROCESSED, Backend, choice_of
from gemma_mtp.decoding.early_stop import StopRule
from gemma_mtp.decoding.grammar_state import GrammarState
from gemma_mtp.decoding.history import TokenHistory
from gemma_mtp.decoding.noise import STREAM_CHOICE, row_key
from gemma_mtp.decoding.params import ChoiceKind, SamplingParams
from gemma_mtp.decoding.verify import Verification
from gemma_mtp.kv.pool import KVCache


@dataclass(slots=True)
class Sequence:
    """A sequence of `length` committed tokens. `choice`: how the backend chooses them.

    Between rounds its cache has length - 1 rows, because the last token has not been through the target yet, and its
    slot holds the target's state that produced the last token. `grammar` is there if and only if the parameters have
    one.
    """

    params: SamplingParams
    choice: ChoiceKind
    cache: KVCache
    history: TokenHistory | None = None
    grammar: GrammarState | None = None
    length: int = 0
    last_token: int = -1
    end: int = 0  # no more tokens than so many are ever wanted; 0: not known

    def keys(self, count: int) -> list[int]:
        """Returns the noise keys of the next `count` positions; 0 where the choice has no noise."""
        if self.choice == "argmax":
            return [0] * count
        seed = self.params.seed
        return [row_key(seed, position, STREAM_CHOICE) for position in range(self.length, self.length + count)]


class Turn(NamedTuple):
    """A sequence's part in a round: `draft_tokens` drafts, or fewer where `stop` says so."""

    sequence: Sequence
    draft_tokens: int
    verification: Verification = "exact"
    stop: StopRule | None = None

    def backend_chooses(self, drafts: int) -> bool:
        """Returns whether the backend makes the choices of this turn itself: by logits, by noise of their
        positions, and by filters."""
        choice = self.sequence.choice
        return choice == "argmax" or (choice != PROCESSED and (not drafts or self.verification == "exact"))


def open_sequence(
    backend: Backend, cache: KVCache, params: SamplingParams, prompt_ids: Items[int],
    grammar: GrammarState | None = None, end: int = 0,
) -> Sequence:  # fmt: skip
    """Returns a sequence of a prompt, of which no row has been computed.

    `grammar`: the state to start from, needed if and only if there is a `params.grammar`. `end`: tokens that it will
    have at most, the prompt's too, or 0 where that is not known.
    """
    assert (grammar is None) == (params.grammar is None), "a grammar needs a GrammarState"
    vocab_size = backend.target.config.vocab_size
    history = TokenHistory(prompt_ids, vocab_size, backend.device) if params.uses_history else None
    return Sequence(params, choice_of(backend, params), cache, history, grammar, length=len(prompt_ids), end=end)
