"""How many blocks an engine's pool has."""

from __future__ import annotations

from collections.abc import Mapping

from gemma_mtp.config import LayerType, TextConfig
from gemma_mtp.decoding.round_costs import LONGEST
from gemma_mtp.engine.settings import EngineSettings
from gemma_mtp.errors import EngineError
from gemma_mtp.kv.blocks import block_counts
from gemma_mtp.kv.pool import block_bytes


def pool_blocks(
    config: TextConfig, settings: EngineSettings, max_tokens: int, chunk_rows: int, element_bytes: int
) -> dict[LayerType, int]:
    """Returns the blocks of each kind: room for one request of `max_tokens` at least, and as much as the settings give.

    `chunk_rows`: rows written at once. Raises EngineError where the memory does not hold one request.
    """

    def counts(tokens: int, sequences: int) -> dict[LayerType, int]:
        of_one = block_counts(config.sliding_window, tokens + LONGEST + 1, chunk_rows)
        return {kind: sequences * count for kind, count in of_one.items()}

    def size(blocks: Mapping[LayerType, int]) -> int:
        return sum(count * block_bytes(config, kind, element_bytes) for kind, count in blocks.items())

    least, wanted = counts(max_tokens, 1), counts(-(-max_tokens // 4), settings.max_running)
    if settings.kv_memory_mb is not None:
        room = settings.kv_memory_mb * 2**20
        if room < size(least):
            raise EngineError(
                f"{settings.kv_memory_mb:g} MB do not hold the keys and values of one request of {max_tokens} tokens,"
                f" which take {size(least) / 2**20:.3g} MB; give more memory, or lower the most tokens."
            )
        share = room / size(wanted)
        wanted = {kind: int(share * count) for kind, count in wanted.items()}
        if any(wanted[kind] < least[kind] for kind in least):  # what one request needs, and the rest for the others
            spare = (room - size(least)) / size(wanted)
            wanted = {kind: least[kind] + int(spare * count) for kind, count in wanted.items()}
    return {kind: max(wanted[kind], least[kind]) for kind in least}
