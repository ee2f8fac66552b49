"""How many blocks an engine's pool has, and what would fit into other memory. Integers only."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping

from gemma_mtp.config import LayerType, TextConfig
from gemma_mtp.decoding.round_costs import LONGEST
from gemma_mtp.engine.settings import EngineSettings
from gemma_mtp.errors import EngineError
from gemma_mtp.kv.blocks import block_bytes, block_counts
from gemma_mtp.units import shown_bytes

Counts = dict[LayerType, int]


def sequence_blocks(config: TextConfig, tokens: int, chunk_rows: int, sequences: int = 1) -> Counts:
    """Returns the blocks of each kind that so many requests of so many tokens need, `chunk_rows` written at once."""
    of_one = block_counts(config.sliding_window, tokens + LONGEST + 1, chunk_rows)
    return {kind: sequences * count for kind, count in of_one.items()}


def pool_bytes(config: TextConfig, counts: Mapping[LayerType, int], element_bytes: int) -> int:
    """Returns the bytes of a pool of so many blocks of each kind."""
    return sum(count * block_bytes(config, kind, element_bytes) for kind, count in counts.items())


def pool_blocks(
    config: TextConfig, settings: EngineSettings, max_tokens: int, chunk_rows: int, element_bytes: int,
    free_bytes: int | None = None, workspace: int = 0,
) -> Counts:  # fmt: skip
    """Returns the blocks of each kind: room for one request of `max_tokens` at least, and as much as the settings give.

    `chunk_rows`: rows written at once. `free_bytes`: what the device has for them, where that is known; a pool whose
    size the settings leave open keeps within it. `workspace`: what decoding so many sequences takes beside. Raises
    EngineError, saying what would fit, where the memory does not hold one request.
    """
    least = sequence_blocks(config, max_tokens, chunk_rows)

    def size(counts: Mapping[LayerType, int]) -> int:
        return pool_bytes(config, counts, element_bytes)

    def fits(room: float) -> str:
        longest = largest_context(config, 1, room, chunk_rows, element_bytes, max_tokens)
        return (
            f"a request of {longest} tokens would fit: lower the most tokens" if longest else "not even one would fit"
        )

    if settings.kv_memory_mb is None:
        quarter = sequence_blocks(config, -(-max_tokens // 4), chunk_rows, settings.max_running)
        wanted = {kind: max(quarter[kind], least[kind]) for kind in least}
        if free_bytes is None or size(wanted) <= free_bytes:
            return wanted
        if free_bytes < size(least):
            beside = (
                f" beside {shown_bytes(workspace)} for decoding {settings.max_running} together" if workspace else ""
            )
            fewer = ", let fewer run together" if workspace and settings.max_running > 1 else ""
            raise EngineError(
                f"{shown_bytes(free_bytes)} of memory are free{beside}, which do not hold the keys and values of one"
                f" request of {max_tokens} tokens, {shown_bytes(size(least))}; {fits(free_bytes)}{fewer}, or free some"
                " memory."
            )
        return _within(config, settings.max_running, max_tokens, chunk_rows, element_bytes, free_bytes)
    room = round(settings.kv_memory_mb * 10**6)  # whole bytes: what they were divided from comes out again
    if room < size(least):
        raise EngineError(
            f"{shown_bytes(room)} do not hold the keys and values of one request of {max_tokens} tokens,"
            f" which take {shown_bytes(size(least))}; {fits(room)}, or give more memory."
        )
    if free_bytes is not None and room > free_bytes:
        raise EngineError(
            f"{shown_bytes(room)} were asked for keys and values, but {shown_bytes(free_bytes)} of memory"
            f" are free; {fits(free_bytes)}, or ask for less than is free."
        )
    return _within(config, settings.max_running, max_tokens, chunk_rows, element_bytes, room)


def largest_context(
    config: TextConfig, sequences: int, room: float, chunk_rows: int, element_bytes: int, most: int | None = None
) -> int:
    """Returns the most tokens that each of so many sequences can have in `room` bytes at the same time; 0: none."""

    def fits(tokens: int) -> bool:
        counts = sequence_blocks(config, tokens, chunk_rows, sequences)
        return pool_bytes(config, counts, element_bytes) <= room

    return largest(fits, config.max_position_embeddings if most is None else most)


def most_sequences(config: TextConfig, tokens: int, room: float, chunk_rows: int, element_bytes: int) -> int:
    """Returns how many sequences of so many tokens have room together in `room` bytes."""
    return int(room // pool_bytes(config, sequence_blocks(config, tokens, chunk_rows), element_bytes))


def _within(
    config: TextConfig, running: int, max_tokens: int, chunk_rows: int, element_bytes: int, room: float
) -> Counts:
    """Returns blocks of `room` bytes, which hold one request of `max_tokens`: so many tokens for each that runs as fit,
    and of what is left as much of each kind."""
    least = sequence_blocks(config, max_tokens, chunk_rows)

    def counts(tokens: int) -> Counts:
        each = sequence_blocks(config, tokens, chunk_rows, running)
        return {kind: max(each[kind], least[kind]) for kind in least}

    tokens = largest(lambda n: pool_bytes(config, counts(n), element_bytes) <= room, max_tokens)
    wanted = counts(tokens) if tokens else least
    share = room / pool_bytes(config, wanted, element_bytes)
    return {kind: int(share * count) for kind, count in wanted.items()}


def largest(fits: Callable[[int], bool], limit: int) -> int:
    """Returns the largest number up to `limit` that fits, 0 for none, where no larger one does once one does not."""
    return bisect.bisect_left(range(1, limit + 1), True, key=lambda number: not fits(number))
