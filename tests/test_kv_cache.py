"""The KV cache keeps what is committed, forgets what is not, and shows each query exactly its rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import TINY, VOCAB, F, S, agreeing_pair, play, random_drafter, random_target, slow_decode

from gemma_mtp.decoding.round import Sequence
from gemma_mtp.decoding.sampling import SamplingParams
from gemma_mtp.kv_cache import BLOCK_ROWS, CommittedKeyValues, KVCache
from gemma_mtp.model.layers import rope_for, slice_rope

PROMPT = [(7 * i) % VOCAB for i in range(21)]


def poison(sequence: Sequence) -> None:
    """NaN in every row that is not committed, and in every sliding row that no later query can see."""
    cache = sequence.cache
    for layer, rows in cache.pool.layers.items():
        kind = cache.config.layer_types[layer]
        first = max(0, cache.length - cache.window + 1) if kind == S else 0
        seen = torch.zeros(rows.keys.shape[1] * BLOCK_ROWS, dtype=torch.bool)
        for position in range(first, cache.length):
            seen[cache.tables[kind][position // BLOCK_ROWS] * BLOCK_ROWS + position % BLOCK_ROWS] = True
        for buffer in (rows.keys, rows.values):
            buffer.view(buffer.shape[0], -1, buffer.shape[-1])[:, ~seen] = torch.nan


@pytest.mark.parametrize("draft_tokens", [1, 4, 8])
@pytest.mark.parametrize("pair", ["random", "agreeing"])
def test_discarded_rows_are_never_seen_again(draft_tokens: int, pair: str) -> None:
    target, drafter = (random_target(), random_drafter()) if pair == "random" else agreeing_pair()
    params = SamplingParams(max_tokens=6 * BLOCK_ROWS, temperature=0.5)
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


def test_sliding_layers_have_blocks_for_window_and_call() -> None:
    cache = KVCache(TINY, max_length=4000, max_rows=5, dtype=torch.float32, device="cpu")
    for layer, rows in cache.pool.layers.items():
        span = TINY.sliding_window - 1 + 5
        expected = -(-(span + BLOCK_ROWS - 1) // BLOCK_ROWS) if TINY.is_sliding(layer) else 4000 // BLOCK_ROWS
        assert rows.keys.shape[1] == rows.values.shape[1] == expected
    assert set(cache.pool.layers) == {0, 1, 2, 3}, "KV-shared layers have no buffers"


@given(st.lists(st.tuples(st.integers(1, 130), st.floats(0, 1)), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
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
