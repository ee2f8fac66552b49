"""The KV cache keeps what is committed, forgets what is not, and shows each query exactly its rows."""

from types import SimpleNamespace

import pytest
import torch
from gemma_mtp.decoding.round import Sequence
from gemma_mtp.kv_cache import (
    BLOCK_ROWS,
    HUGE_PAGE_BYTES,
    CommittedKeyValues,
    KVCache,
    KVPool,
    OutOfBlocksError,
    block_counts,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from models import TINY, VOCAB, F, S, agreeing_pair, play, random_drafter, random_target, slow_decode

from gemma_mtp.decoding.sampling import SamplingParams
from gemma_mtp.model.layers import rope_for, slice_rope
from gemma_mtp.ops import reference as ops

PROMPT = [(7 * i) % VOCAB for i in range(21)]


def poison(sequence: Sequence) -> None:
    """NaN in every row that is not committed, and in every sliding row that no later query can see."""
    cache = sequence.cache
    for kind in (S, F):
        positions = torch.arange(max(0, cache.length - cache.window + 1) if kind == S else 0, cache.length)
        blocks = torch.tensor(cache.tables[kind])[positions // BLOCK_ROWS]
        layers = [rows for layer, rows in cache.pool.layers.items() if cache.config.layer_types[layer] == kind]
        unseen = torch.ones(layers[0].keys.shape[1], BLOCK_ROWS, dtype=torch.bool)
        unseen[blocks, positions % BLOCK_ROWS] = False
        for rows in layers:
            rows.keys[:, unseen] = rows.values[:, unseen] = torch.nan


@pytest.mark.parametrize("draft_tokens", [1, 4, 8])
@pytest.mark.parametrize("pair", ["random", "agreeing"])
def test_discarded_rows_are_never_seen_again(draft_tokens: int, pair: str) -> None:
    target, drafter = (random_target(), random_drafter()) if pair == "random" else agreeing_pair()
    params = SamplingParams(max_tokens=4 * BLOCK_ROWS, temperature=0.5)
    clean = play(target, drafter, PROMPT, params, draft_tokens)
    poisoned = play(target, drafter, PROMPT, params, draft_tokens, after_round=poison)
    assert sum(clean.accepted) < sum(clean.drafted), "the run must reject something to mean anything"
    assert (poisoned.tokens, poisoned.accepted) == (clean.tokens, clean.accepted)


def test_poisoning_a_committed_row_is_noticed() -> None:
    """Control: the poison test fails when one row too many is hit."""
    target, drafter = agreeing_pair()

    def poison_one_more(sequence: Sequence) -> None:
        sequence.cache.length -= 1
        poison(sequence)
        sequence.cache.length += 1

    params = SamplingParams(max_tokens=60)
    clean = play(target, drafter, PROMPT, params, 4)
    assert play(target, drafter, PROMPT, params, 4, after_round=poison_one_more).tokens != clean.tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [3, 2000])
def test_layers_begin_as_zeros_and_apart(count: int, dtype: torch.dtype) -> None:
    """In a pool of a few kilobytes, and in one large enough for huge pages."""
    pool = KVPool(TINY, {S: count, F: count + 1}, dtype, "cpu")
    buffers = [buffer for rows in pool.layers.values() for buffer in (rows.keys, rows.values)]
    assert (sum(buffer.nbytes for buffer in buffers) > HUGE_PAGE_BYTES) == (count > 3)
    for layer, rows in pool.layers.items():
        kind = TINY.layer_types[layer]
        shape = (TINY.layer_kv_heads(layer), count + (kind == F), BLOCK_ROWS, TINY.layer_head_dim(layer))
        assert rows.keys.shape == rows.values.shape == shape
    for number, buffer in enumerate(buffers, start=1):
        assert buffer.dtype == dtype
        assert not buffer.any()
        buffer.fill_(number)
    assert all((buffer == number).all() for number, buffer in enumerate(buffers, start=1))


def test_sliding_layers_have_blocks_for_window_and_call() -> None:
    cache = KVCache(TINY, max_length=4000, max_rows=5, dtype=torch.float32, device="cpu")
    for layer, rows in cache.pool.layers.items():
        span = TINY.sliding_window - 1 + 5
        expected = -(-(span + BLOCK_ROWS - 1) // BLOCK_ROWS) if TINY.is_sliding(layer) else 4000 // BLOCK_ROWS
        assert rows.keys.shape[1] == rows.values.shape[1] == expected
    assert set(cache.pool.layers) == {0, 1, 2, 3}, "KV-shared layers have no buffers"


@given(st.lists(st.tuples(st.integers(1, 130), st.floats(0, 1)), min_size=1, max_size=12))
@settings(max_examples=60)
def test_slices_hold_exactly_the_visible_rows(calls: list[tuple[int, float]]) -> None:
    """Rows carry their own position as key, so that what a slice holds can be read off it."""
    cache = KVCache(TINY, max_length=2000, max_rows=9, dtype=torch.float32, device="cpu", chunk_rows=130)
    for rows, kept_share in calls:
        cache.begin(rows)
        positions = torch.arange(cache.length, cache.length + rows, dtype=torch.float32)
        for layer in cache.pool.layers:
            kv = positions.view(1, rows, 1, 1).expand(1, rows, TINY.layer_kv_heads(layer), TINY.layer_head_dim(layer))
            cache._append(layer, kv, kv)
        end = cache.length + rows
        for layer in cache.pool.layers:
            first = cache._first_visible(TINY.layer_types[layer], cache.length)
            held = cache._read(layer, first, end)[0][0, 0, :, 0]
            assert torch.equal(held, torch.arange(first, end, dtype=torch.float32))
        cache.commit(rows if rows > 9 else max(1, int(kept_share * rows)))
        for kind in (S, F):
            keys, _ = cache.committed(kind)
            first = 0 if kind == F else max(0, cache.length - TINY.sliding_window + 1)
            assert torch.equal(keys[0, 0, :, 0], torch.arange(first, cache.length, dtype=torch.float32))


def test_masks_of_decoding_are_whole_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA, attention with a mask that begins in the middle of another one fails with a misaligned address."""
    seen = []

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        if mask is not None:
            seen.append(mask.is_contiguous() and mask.storage_offset() == 0 and mask.shape[1] == k.shape[2])
        return ops.attention(q, k, v, mask)

    monkeypatch.setattr("gemma_mtp.kv_cache.ops", SimpleNamespace(**{**vars(ops), "attention": attention}))
    target, drafter = random_target(), random_drafter()
    play(target, drafter, PROMPT, SamplingParams(max_tokens=30), 4)
    assert len(seen) > 20 and all(seen)


def test_drafter_sees_the_committed_rows_of_its_donors() -> None:
    target = random_target()
    sequence = play(target, random_drafter(), PROMPT, SamplingParams(max_tokens=40), 4).sequence
    committed = CommittedKeyValues(sequence.cache, (S, S, S, F))
    seen = {kind: committed.rows(kind) for kind in (S, F)}
    assert seen[F][0].shape[2] == sequence.cache.length
    assert seen[S][0].shape[2] == TINY.sliding_window - 1
    assert seen[F][0].data_ptr() == sequence.cache.pool.layers[TINY.donor_layers[F]].keys.data_ptr()


@pytest.mark.parametrize("chunk_rows", [1, 3, 8, 9, 64, 80, 512])
def test_prefill_in_chunks_equals_prefill_at_once(chunk_rows: int) -> None:
    target = random_target()
    prompt = [(11 * i * i) % VOCAB for i in range(200)]
    params = SamplingParams(max_tokens=6)
    assert play(target, None, prompt, params, 0, chunk_rows=chunk_rows).tokens == slow_decode(target, prompt, params, 6)


def test_prefill_sends_only_the_last_row_through_kv_shared_layers() -> None:
    target = random_target()
    rows_seen: list[int] = []
    for layer in target.layers:
        layer.register_forward_hook(lambda _, args, out: rows_seen.append(out.shape[1]))
    cache = KVCache(TINY, 64, 1, torch.float32, "cpu", chunk_rows=21)
    cache.begin(21)
    rope = slice_rope(rope_for(TINY, torch.arange(64), torch.float32), 0, 21)
    with torch.inference_mode():
        hidden = target(torch.tensor([PROMPT]), rope, cache, last_only=True)
        full = target.forward_sequence(torch.tensor([PROMPT])).hidden_BTD
    assert rows_seen[:6] == [21, 21, 21, 21, 1, 1]
    torch.testing.assert_close(hidden, full[:, -1:], rtol=1e-5, atol=1e-5)


POOL = {S: 6, F: 12}


def shared_pool() -> KVPool:
    return KVPool(TINY, POOL, torch.float32, "cpu")


def cache_of(pool: KVPool, max_length: int = 400) -> KVCache:
    return KVCache(TINY, max_length, 9, torch.float32, "cpu", chunk_rows=BLOCK_ROWS, pool=pool)


def write(cache: KVCache, token_ids: list[int], rows: int) -> None:
    """Append rows whose keys and values are made of the tokens up to them."""
    while rows:
        count = min(rows, BLOCK_ROWS)
        cache.begin(count)
        ids = token_ids[: cache.length + count]
        marks = [float(hash(tuple(ids[: i + 1])) % 1000) for i in range(cache.length, cache.length + count)]
        for layer in cache.pool.layers:
            kv = (
                torch.tensor(marks)
                .view(1, count, 1, 1)
                .expand(-1, -1, TINY.layer_kv_heads(layer), TINY.layer_head_dim(layer))
            )
            cache._append(layer, kv, kv)
        cache.commit(count)
        cache.name(token_ids)
        rows -= count


def held(cache: KVCache) -> list[list[float]]:
    return [cache.committed(kind)[0][0, 0, :, 0].tolist() for kind in (S, F)]


@given(st.data())
@settings(max_examples=80)
def test_sequences_that_share_a_pool_keep_their_rows(data: st.DataObject) -> None:
    """Begun alike or not, grown, ended, sent away: what a sequence reads is what it would read alone."""
    pool, caches = shared_pool(), dict[KVCache, list[int]]()
    texts = [[i % 7 for i in range(150)], [i % 7 for i in range(60)] + [1] * 90, [3] * 150]
    for _ in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["open", "grow", "grow", "end"]))
        if action == "open" or not caches:
            cache, text = cache_of(pool), data.draw(st.sampled_from(texts))
            text = text[: data.draw(st.integers(1, 150))]
            hit = cache.adopt(text)
            assert hit % BLOCK_ROWS == 0 and hit < len(text)
            caches[cache] = text
        cache = data.draw(st.sampled_from(list(caches)))
        text = caches[cache]
        try:
            if action != "end" and cache.length < len(text):
                write(cache, text, data.draw(st.integers(1, len(text) - cache.length)))
        except OutOfBlocksError:
            action = "end"
        if action == "end":
            del caches[cache]
            cache.release()
        for other, tokens in ((cache, tokens) for cache, tokens in caches.items() if cache.length):
            alone = cache_of(KVPool(TINY, block_counts(TINY, 400, BLOCK_ROWS), torch.float32, "cpu"))
            write(alone, tokens, other.length)
            assert held(other) == held(alone)
    for cache in caches:
        cache.release()
    assert [pool.blocks[kind].available for kind in (S, F)] == [POOL[S], POOL[F]]


def test_a_beginning_is_found_as_far_as_its_window_is_there() -> None:
    pool, text = shared_pool(), list(range(40)) * 4
    first = cache_of(pool)
    write(first, text, 160)
    assert cache_of(pool).adopt([9, *text]) == 0, "another first token"
    longer, shorter, other = cache_of(pool), cache_of(pool), cache_of(pool)
    assert longer.adopt(text) == 128, "the last row is computed in any case"
    assert shorter.adopt(text[:64]) == 32
    assert other.adopt([*text[:70], *[5] * 60]) == 64
    assert held(other) == [held(first)[1][64 - 7 : 64], held(first)[1][:64]]
    assert longer.tables[F][:4] == first.tables[F][:4], "shared, not copied"
    for cache in (first, longer, shorter, other):
        cache.release()
    blocks = pool.blocks[F]
    assert (blocks.available, blocks.kept) == (12, 5)


def test_kept_blocks_are_given_up_when_others_need_them() -> None:
    pool, text = shared_pool(), list(range(40)) * 4
    first = cache_of(pool)
    write(first, text, 160)
    first.release()
    second = cache_of(pool)
    write(second, [9] * 300, 300)
    assert pool.blocks[F].kept == 2, "of five, three went"
    assert cache_of(pool).adopt(text) == 0 or pool.blocks[S].kept > 0
    with pytest.raises(OutOfBlocksError):
        write(cache_of(pool), [8] * 300, 300)


def test_rows_that_were_discarded_are_not_shared() -> None:
    pool, text = shared_pool(), list(range(40)) * 4
    first = cache_of(pool)
    write(first, text, 30)
    first.begin(5)
    first.commit(1)
    first.name(text)
    assert cache_of(pool).adopt(text) == 0, "31 rows fill no block"


def test_blocks_lie_side_by_side_or_were_used_last() -> None:
    pool = shared_pool()
    first, second = cache_of(pool), cache_of(pool)
    first.reserve(64)
    second.reserve(32)
    assert [list(cache.tables[F][:2]) for cache in (first, second)] == [[0, 1], [2, -1]]
    second.reserve(96)
    assert list(second.tables[F][:3]) == [2, 3, 4], "behind its last one"
    first.release()
    second.reserve(128)
    assert second.tables[F][3] == 5, "behind it, though others were freed since"
    assert pool.blocks[F].take() == 0, "which was freed last"
