"""Rounds that a backend plays as a whole, where it can: those of `exact` verification by logits, noise and what
filters it does itself."""

from __future__ import annotations

from collections.abc import Sequence as Items

from gemma_mtp.backend.base import Backend, RoundRows
from gemma_mtp.decoding.noise import STREAM_CHOICE, stream_key
from gemma_mtp.engine.round import RoundOutput
from gemma_mtp.engine.sequence import Sequence, Turn


def plays_whole(backend: Backend, turn: Turn) -> bool:
    """Returns whether the backend plays the whole round of a turn itself."""
    drafts = turn.draft_tokens if backend.drafter is not None else 0
    return (
        backend.rounds is not None and turn.stop is None and drafts <= backend.rounds.longest
        and turn.backend_chooses(drafts)
    )  # fmt: skip


def play_whole(backend: Backend, turns: Items[Turn], other: Sequence | None = None) -> list[RoundOutput | None]:
    """Play the whole rounds among the turns, and move their sequences on; None for turns of another kind.

    `other`: a sequence of the same pool. A backend that is ahead hears of every step, also of one without turns.
    """
    assert backend.rounds is not None, "a backend that plays whole rounds"
    outputs: list[RoundOutput | None] = [None] * len(turns)
    anyone = turns[0].sequence if turns else other
    if anyone is None:
        return outputs
    places = [i for i, turn in enumerate(turns) if plays_whole(backend, turn)]
    calls = [_round_rows(backend, turns[i]) for i in places]
    for i, (token_ids, drafted) in zip(places, backend.rounds.play(anyone.cache.pool, calls), strict=True):
        sequence = turns[i].sequence
        sequence.cache.table.reserve(len(token_ids))
        sequence.cache.table.commit(len(token_ids))
        sequence.length += len(token_ids)
        sequence.last_token = token_ids[-1]
        outputs[i] = RoundOutput(token_ids, drafted, len(token_ids) - 1, None)
    return outputs


def _round_rows(backend: Backend, turn: Turn) -> RoundRows:
    sequence, params = turn.sequence, turn.sequence.params
    drafts = turn.draft_tokens if backend.drafter is not None else 0
    return RoundRows(
        sequence.cache, sequence.last_token, drafts, params.temperature, stream_key(params.seed, STREAM_CHOICE),
        max(0, sequence.end - sequence.length), params.filters,
    )  # fmt: skip
