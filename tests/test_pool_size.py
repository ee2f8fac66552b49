"""How many blocks a card's free memory gives, by card and model."""

from __future__ import annotations

import pytest

from gemma_mtp.backend.device_memory import CARD_RESERVE_BYTES
from gemma_mtp.config import FULL, PRESETS, LayerType
from gemma_mtp.engine.pool_size import pool_blocks, pool_bytes, sequence_blocks
from gemma_mtp.engine.settings import EngineSettings
from gemma_mtp.errors import EngineError
from gemma_mtp.kv.blocks import BLOCK_ROWS, block_bytes

#: gigabytes of weights, target and drafter, as GPU.md's table has them
WEIGHTS = {
    ("E2B", "bf16"): 9.5, ("E4B", "bf16"): 15.3, ("12B", "bf16"): 24.7, ("12B", "int4"): 8.4,
    ("26B-A4B", "bf16"): 51.3, ("31B", "bf16"): 62.3, ("31B", "int8"): 33.2, ("31B", "int4"): 19.8,
}  # fmt: skip
#: card GB, most tokens of a request -> whether it fits
TABLE = [
    ("E2B", "bf16", 24, 131072, True), ("E4B", "bf16", 24, 131072, True), ("12B", "bf16", 24, 4096, False),
    ("12B", "bf16", 48, 262144, True), ("12B", "int4", 24, 262144, True), ("26B-A4B", "bf16", 48, 4096, False),
    ("26B-A4B", "bf16", 80, 262144, True), ("31B", "bf16", 80, 131072, True), ("31B", "bf16", 80, 262144, False),
    ("31B", "int8", 48, 65536, True), ("31B", "int4", 24, 8192, True), ("31B", "int4", 24, 131072, False),
    ("31B", "bf16", 141, 262144, True),
]  # fmt: skip


def blocks(name: str, weights: str, card: int, tokens: int, **settings: float) -> tuple[dict[LayerType, int], float]:
    """Blocks of a pool, and the bytes that were free for it."""
    config = PRESETS[f"gemma-4-{name}-it"].text
    free = max(0, int(card * 1e9 - WEIGHTS[name, weights] * 1e9 - CARD_RESERVE_BYTES))
    return pool_blocks(config, EngineSettings(**settings), tokens, 512, 2, free), free  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "weights", "card", "tokens", "fits"), TABLE)
def test_pools(name: str, weights: str, card: int, tokens: int, fits: bool) -> None:
    config = PRESETS[f"gemma-4-{name}-it"].text
    if not fits:
        with pytest.raises(EngineError, match="do not hold the keys and values"):
            blocks(name, weights, card, tokens)
        return
    found, free = blocks(name, weights, card, tokens)
    assert sum(count * block_bytes(config, kind, 2) for kind, count in found.items()) <= free
    assert found[FULL] * BLOCK_ROWS >= tokens


def test_what_would_fit_is_said_and_fits() -> None:
    with pytest.raises(EngineError, match=r"a request of \d+ tokens would fit: lower the most tokens") as refused:
        blocks("31B", "int4", 24, 131072)
    most = int(str(refused.value).split("a request of ")[1].split()[0])
    assert 8192 < most < 131072
    assert blocks("31B", "int4", 24, most)
    with pytest.raises(EngineError):
        blocks("31B", "int4", 24, most + 64)


def test_what_decoding_takes_beside_is_said_where_a_request_does_not_fit() -> None:
    """And that fewer sequences take less, where more than one may run."""
    config = PRESETS["gemma-4-31B-it"].text
    for running, advice in (
        (16, "lower the most tokens, let fewer run together, or free"),
        (1, "most tokens, or free"),
    ):
        with pytest.raises(EngineError, match=rf"1\.00 GB .* free beside 2\.00 GB for decoding {running} .*{advice}"):
            pool_blocks(config, EngineSettings(max_running=running), 8192, 512, 2, 10**9, 2 * 10**9)


def test_a_pool_takes_no_more_than_is_wanted_nor_than_is_there() -> None:
    small, free = blocks("E2B", "bf16", 141, 4096)
    config = PRESETS["gemma-4-E2B-it"].text
    assert sum(count * block_bytes(config, kind, 2) for kind, count in small.items()) < free / 10
    asked, _ = blocks("E2B", "bf16", 24, 4096, kv_memory_mb=1000)
    assert sum(count * block_bytes(config, kind, 2) for kind, count in asked.items()) <= 1000 * 10**6
    with pytest.raises(EngineError, match=r"20\.0 GB were asked for keys and values, but"):
        blocks("E2B", "bf16", 24, 4096, kv_memory_mb=20000)


def test_the_megabytes_of_a_request_hold_it() -> None:
    """Whatever its bytes come to, divided by a million and multiplied again."""
    config = PRESETS["gemma-4-31B-it"].text
    for tokens in range(512, 40000, 512):
        counts = sequence_blocks(config, tokens, 512)
        settings = EngineSettings(kv_memory_mb=pool_bytes(config, counts, 2) / 10**6, max_running=1)
        assert pool_blocks(config, settings, tokens, 512, 2) == counts
