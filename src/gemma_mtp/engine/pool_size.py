"""How many blocks an engine's pool has."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from gemma_mtp.config import LayerType, TextConfig
from gemma_mtp.decoding.round_costs import LONGEST
from gemma_mtp.engine.settings import EngineSettings
from gemma_mtp.errors import EngineError
from gemma_mtp.kv.blocks import block_counts
from gemma_mtp.kv.pool import block_bytes


def pool_blocks(
    config: TextConfig, settings: EngineSettings, max_tokens: int, chunk_rows: int, element_bytes: int,
    free_bytes: int | None = None,
) -> dict[LayerType, int]:  # fmt: skip
    """Returns the blocks of each kind: room for one request of `max_tokens` at least, and as much as the settings give.

    `chunk_rows`: rows written at once. `free_bytes`: all that a card has for them; where the settings name no
    memory, the pool takes no more than that. Raises EngineError where the memory does not hold
    one request.
    """

    def counts(tokens: int, sequences: int) -> dict[LayerType, int]:
        of_one = block_counts(config.sliding_window, tokens + LONGEST + 1, chunk_rows)
        return {kind: sequences * count for kind, count in of_one.items()}

    def size(blocks: Mapping[LayerType, int]) -> int:
        return sum(count * block_bytes(config, kind, element_bytes) for kind, count in blocks.items())

    least, wanted = counts(max_tokens, 1), counts(-(-max_tokens // 4), settings.max_running)
    room = None if settings.kv_memory_mb is None else settings.kv_memory_mb * 2**20
    if free_bytes is not None:
        if room is not None and room > free_bytes:
            raise EngineError(
                f"{settings.kv_memory_mb:g} MB for keys and values are asked for, but the card has"
                f" {free_bytes / 2**20:.0f} MB beside the weights; give less."
            )
        if room is None and size(least) > free_bytes:
            raise EngineError(
                f"The card's {free_bytes / 1e9:.3g} GB beside the weights do not hold the keys and values of one"
                f" request of {max_tokens} tokens, which take {size(least) / 1e9:.3g} GB;"
                f" {_what_fits(counts, size, free_bytes)}"
            )
        if room is None and size(wanted) > free_bytes:
            room = free_bytes
    if room is None:
        return {kind: max(wanted[kind], least[kind]) for kind in least}
    if room < size(least):
        raise EngineError(
            f"{room / 2**20:g} MB do not hold the keys and values of one request of {max_tokens} tokens,"
            f" which take {size(least) / 2**20:.3g} MB; give more memory, or lower the most tokens."
        )
    share = room / size(wanted)
    wanted = {kind: int(share * count) for kind, count in wanted.items()}
    if any(wanted[kind] < least[kind] for kind in least):  # what one request needs, and the rest for the others
        spare = (room - size(least)) / size(wanted) if size(wanted) else 0
        wanted = {kind: least[kind] + int(spare * count) for kind, count in wanted.items()}
    return {kind: max(wanted[kind], least[kind]) for kind in least}


def _what_fits(
    counts: Callable[[int, int], dict[LayerType, int]], size: Callable[[Mapping[LayerType, int]], int], room: int
) -> str:
    """Returns what to do where a request does not fit: the most tokens that would."""
    low, high = 0, 1 << 22
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(counts(middle, 1)) <= room else (low, middle)
    return f"lower the most tokens to {low}." if low else "quantise the weights, or take a larger card."
