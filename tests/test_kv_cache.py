"""Blocks of keys and values: what is committed stays, what is not is forgotten, and each query sees its rows only."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import (
    TINY,
    VOCAB,
    F,
    Played,
    S,
    agreeing_pair,
    backends,
    committed,
    open_caches,
    play,
    random_drafter,
    random_target,
    slow_decode,
)

from gemma_mtp.backend.base import Backend, DraftRows, Rows
from gemma_mtp.backend.reference import BLOCK, ReferenceBackend
from gemma_mtp.config import LayerType
from gemma_mtp.decoding.params import SamplingParams
from gemma_mtp.engine.round import forward
from gemma_mtp.engine.sequence import Sequence
from gemma_mtp.huge_pages import HUGE_PAGE_BYTES
from gemma_mtp.kv.blocks import BLOCK_ROWS, Blocks, BlockTable, OutOfBlocksError, block_counts, block_names
from gemma_mtp.kv.pool import KVPool
from gemma_mtp.ops import reference as ops

PROMPT = [(7 * i) % VOCAB for i in range(21)]
BACKENDS: dict[str, Backend] = {
    f"{pair}, {name}": backend
    for pair, models in (("random", (random_target(), random_drafter())), ("agreeing", agreeing_pair()))
    for name, backend in backends(*models).items()
}


def poison(sequence: Sequence, value: float) -> None:
    """`value` in every row that is not committed, and in every sliding row that no later query can see."""
    table, pool = sequence.cache.table, sequence.cache.pool
    for kind in (S, F):
        positions = torch.arange(table.windows[kind].first_visible(table.length), table.length)
        blocks = torch.tensor(table.tables[kind])[positions // BLOCK_ROWS]
        layers = [rows for layer, rows in pool.layers.items() if pool.config.layer_types[layer] == kind]
        unseen = torch.ones(layers[0].keys.shape[1], BLOCK_ROWS, dtype=torch.bool)
        unseen[blocks, positions % BLOCK_ROWS] = False
        for rows in layers:
            rows.keys[:, unseen] = rows.values[:, unseen] = value


def poison_of(backend: Backend) -> float:
    """What the reference masks must be finite; the native operators do not even read it."""
    return 1e4 if isinstance(backend, ReferenceBackend) else torch.nan


def outcome(backend: Backend, draft_tokens: int, after_round: Callable[[Sequence], None]) -> tuple[Played, list[float]]:
    """Of a run of rounds, and the state that its last token came from, which sees more than tokens do."""
    params = SamplingParams(max_tokens=2 * BLOCK_ROWS, temperature=0.5)
    played = play(backend, PROMPT, params, draft_tokens, after_round=after_round)
    return played, played.sequence.cache.state.tolist()


@pytest.mark.parametrize(
    ("draft_tokens", "name"),
    # the reference takes long, and its calls are of one shape
    [pytest.param(draft_tokens, name, marks=[pytest.mark.slow] * (draft_tokens != 4 and name.endswith("reference")))
     for draft_tokens in (1, 4, 8) for name in BACKENDS],
)  # fmt: skip
def test_discarded_rows_are_never_seen_again(draft_tokens: int, name: str) -> None:
    backend = BACKENDS[name]
    clean, state = outcome(backend, draft_tokens, lambda sequence: None)
    poisoned, other = outcome(backend, draft_tokens, lambda sequence: poison(sequence, poison_of(backend)))
    assert sum(clean.accepted) < sum(clean.drafted), "the run must reject something to mean anything"
    assert (poisoned.tokens, poisoned.accepted, other) == (clean.tokens, clean.accepted, state)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "agreeing, reference")) for name in BACKENDS]
)
def test_poisoning_a_committed_row_is_noticed(name: str) -> None:
    """Control: the poison test fails when one row too many is hit."""
    backend = BACKENDS[name]

    def poison_one_more(sequence: Sequence) -> None:
        sequence.cache.table.length -= 1
        poison(sequence, poison_of(backend))
        sequence.cache.table.length += 1

    _, state = outcome(backend, 1, lambda sequence: None)
    assert outcome(backend, 1, poison_one_more)[1] != state


# ---- the pool's tensors and slots


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [3, 2000])
def test_layers_begin_as_zeros_and_apart(count: int, dtype: torch.dtype) -> None:
    """In a pool of a few kilobytes, and in one large enough for huge pages."""
    pool = KVPool(TINY, {S: count, F: count + 1}, 2, dtype, "cpu")
    buffers = [buffer for rows in pool.layers.values() for buffer in (rows.keys, rows.values)]
    assert (sum(buffer.nbytes for buffer in buffers) > HUGE_PAGE_BYTES) == (count > 3)
    for layer, rows in pool.layers.items():
        kind = TINY.layer_types[layer]
        shape = (TINY.layer_kv_heads(layer), count + (kind == F), BLOCK_ROWS, TINY.layer_head_dim(layer))
        assert rows.keys.shape == rows.values.shape == shape
    assert set(pool.layers) == {0, 1, 2, 3}, "KV-shared layers have no buffers"
    for number, buffer in enumerate((*buffers, pool.states), start=1):
        assert buffer.dtype == dtype
        assert not buffer.any()
        buffer.fill_(number)
    assert all((buffer == number).all() for number, buffer in enumerate((*buffers, pool.states), start=1))


def test_open_sequences_have_slots_of_their_own() -> None:
    pool = KVPool(TINY, {S: 9, F: 9}, 3, torch.float32, "cpu")
    address, caches = pool.states.data_ptr(), [pool.cache(40) for _ in range(4)]
    for number, cache in enumerate(caches[:3]):
        cache.open()
        cache.state.fill_(number)
    assert {cache.slot for cache in caches[:3]} == {0, 1, 2}
    assert [float(cache.state[0]) for cache in caches[:3]] == [0, 1, 2]
    caches[1].table.reserve(40)
    caches[1].close()
    assert caches[1].slot == -1 and pool.blocks[F].available == 9, "the blocks come back with the slot"
    caches[1].close()  # again: nothing is given back twice
    caches[3].open()
    caches[3].state.fill_(3)
    assert [float(cache.state[0]) for cache in (caches[0], caches[3], caches[2])] == [0, 3, 2]
    assert pool.states.data_ptr() == address, "slots never move"
    with pytest.raises(AssertionError):
        caches[3].open()  # it has one
    with pytest.raises(IndexError):
        caches[1].open()  # all three are taken


# ---- what attention is handed


@given(st.lists(st.tuples(st.integers(1, 130), st.floats(0, 1)), min_size=1, max_size=12))
@settings(max_examples=60)
def test_tables_hold_exactly_the_visible_rows(calls: list[tuple[int, float]]) -> None:
    """Every row that a query of the call, or of the next one, may see lies where the table says, as it was written;
    and so many blocks are enough, whatever the calls are."""
    counts = block_counts(TINY.sliding_window, 2000, 130)
    written = Written(counts)
    table = written.table(2000)
    for rows, kept_share in calls:
        table.reserve(rows)
        end = table.length + rows
        written.write(table, range(table.length, end))
        for kind in (S, F):
            first = table.windows[kind].first_visible(table.length)
            assert first == (0 if kind == F else max(0, table.length - TINY.sliding_window + 1))
            assert written.read(table, kind, first, end) == list(range(first, end))
        table.commit(max(1, int(kept_share * rows)))
    table.release()
    assert [written.blocks[kind].available for kind in (S, F)] == [counts[S], counts[F]]


def test_sliding_layers_have_blocks_for_window_and_call() -> None:
    counts = block_counts(TINY.sliding_window, max_length=4000, max_rows=5)
    span = TINY.sliding_window - 1 + 5
    assert counts == {F: 4000 // BLOCK_ROWS, S: -(-(span + BLOCK_ROWS - 1) // BLOCK_ROWS)}
    blocks = {kind: Blocks(count) for kind, count in counts.items()}
    table, largest = BlockTable(blocks, TINY.sliding_window, 4000), 0
    while table.length + 5 <= 4000:
        table.reserve(5)
        table.commit(3)
        largest = max(largest, counts[S] - blocks[S].available)
    assert largest == counts[S], "none too many"


def test_masks_of_decoding_are_whole_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA, attention with a mask that begins in the middle of another one fails with a misaligned address."""
    seen = []

    def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        seen.append(mask.is_contiguous() and mask.storage_offset() == 0 and mask.shape[1] == k.shape[2])
        return ops.masked_attention(q, k, v, mask)

    patched = SimpleNamespace(**{**vars(ops), "masked_attention": masked})
    monkeypatch.setattr("gemma_mtp.backend.reference.ops", patched)
    play(BACKENDS["random, reference"], PROMPT, SamplingParams(max_tokens=15), 4)
    assert len(seen) > 20 and all(seen)


@torch.inference_mode()
def test_drafter_sees_the_committed_rows_of_its_donors(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = BACKENDS["random, reference"]
    cache = play(backend, PROMPT, SamplingParams(max_tokens=15), 4).sequence.cache
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        seen.append((k, v))
        return ops.attention(q, k, v)

    monkeypatch.setattr("gemma_mtp.backend.reference.ops", SimpleNamespace(**{**vars(ops), "attention": attention}))
    backend.draft([DraftRows(cache, 3, 1, 0.0, [0], None)])
    assert len(seen) == 4
    for kind, (k, v) in zip((S, S, S, F), seen, strict=True):
        assert k.shape[2] == (cache.table.length if kind == F else TINY.sliding_window - 1)
        assert all(torch.equal(*pair) for pair in zip((k, v), committed(cache, kind), strict=True))


@pytest.mark.parametrize("chunk_rows", [1, 3, 8, 9, 64, 80, 512])
@pytest.mark.parametrize("name", [name for name in BACKENDS if name.startswith("random")])
def test_prefill_in_chunks_equals_prefill_at_once(chunk_rows: int, name: str) -> None:
    backend, prompt = BACKENDS[name], [(11 * i * i) % VOCAB for i in range(120)]
    params = SamplingParams(max_tokens=6)
    played = play(backend, prompt, params, 0, chunk_rows=chunk_rows)
    assert played.tokens == slow_decode(backend.target, prompt, params, 6)


def test_rows_that_nobody_wants_end_before_the_kv_shared_layers() -> None:
    target, prompt = random_target(), [(11 * i) % VOCAB for i in range(2 * BLOCK + 5)]
    (cache,) = open_caches(ReferenceBackend(target), 1, 64)
    calls = [0] * len(target.layers)
    for i, layer in enumerate(target.layers):
        layer.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    with torch.inference_mode():
        hidden_1D = forward(ReferenceBackend(target), [Rows(cache, prompt, keep=1)])
        assert calls == [3, 3, 3, 3, 1, 1]
        full = target.forward_sequence(torch.tensor([prompt])).hidden_BTD
    torch.testing.assert_close(hidden_1D, full[0, -1:], rtol=1e-5, atol=1e-5)


# ---- sharing


class Written:
    """Blocks, and the mark that was written to each row of them."""

    def __init__(self, counts: dict[LayerType, int]) -> None:
        self.blocks = {kind: Blocks(count) for kind, count in counts.items()}
        self._marks: dict[tuple[LayerType, int, int], int] = {}

    def table(self, max_length: int = 400) -> BlockTable:
        return BlockTable(self.blocks, TINY.sliding_window, max_length)

    def write(self, table: BlockTable, marks: range | list[int]) -> None:
        """Write the rows of the call under way."""
        for position, mark in enumerate(marks, start=table.length):
            for kind in (S, F):
                block = table.tables[kind][position // BLOCK_ROWS]
                self._marks[kind, block, position % BLOCK_ROWS] = mark

    def read(self, table: BlockTable, kind: LayerType, begin: int, end: int) -> list[int]:
        places = [(table.tables[kind][i // BLOCK_ROWS], i % BLOCK_ROWS) for i in range(begin, end)]
        return [self._marks[kind, block, offset] for block, offset in places]

    def append(self, table: BlockTable, token_ids: list[int], rows: int) -> None:
        """Append rows with marks that are made of the tokens up to them, and register what is full."""
        while rows:
            count = min(rows, BLOCK_ROWS)
            table.reserve(count)
            self.write(table, [hash(tuple(token_ids[: i + 1])) for i in range(table.length, table.length + count)])
            table.commit(count)
            table.register(token_ids)
            rows -= count

    def held(self, table: BlockTable) -> list[list[int]]:
        """The marks of all rows that the next query sees."""
        return [
            self.read(table, kind, table.windows[kind].first_visible(table.length), table.length) for kind in (S, F)
        ]


POOL: dict[LayerType, int] = {S: 6, F: 12}


@given(st.data())
@settings(max_examples=80)
def test_sequences_that_share_a_pool_keep_their_rows(data: st.DataObject) -> None:
    """Begun alike or not, grown, ended, sent away: what a sequence reads is what it would read alone."""
    written, texts_of = Written(POOL), dict[int, tuple[BlockTable, list[int]]]()
    texts = [[i % 7 for i in range(150)], [i % 7 for i in range(60)] + [1] * 90, [3] * 150]
    for number in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["open", "grow", "grow", "end"]))
        if action == "open" or not texts_of:
            text = data.draw(st.sampled_from(texts))
            table, text = written.table(), text[: data.draw(st.integers(1, 150))]
            hit = table.adopt(text)
            assert hit % BLOCK_ROWS == 0 and hit < len(text)
            texts_of[number] = table, text
        chosen = data.draw(st.sampled_from(list(texts_of)))
        table, text = texts_of[chosen]
        try:
            if action != "end" and table.length < len(text):
                written.append(table, text, data.draw(st.integers(1, len(text) - table.length)))
        except OutOfBlocksError:
            action = "end"
        if action == "end":
            del texts_of[chosen]
            table.release()
        for other, tokens in texts_of.values():
            alone = Written(block_counts(TINY.sliding_window, 400, BLOCK_ROWS))
            lone = alone.table()
            alone.append(lone, tokens, other.length)
            assert written.held(other) == alone.held(lone)
    for table, _ in texts_of.values():
        table.release()
    assert {kind: blocks.available for kind, blocks in written.blocks.items()} == POOL


def test_a_beginning_is_found_as_far_as_its_window_is_there() -> None:
    written, text = Written(POOL), list(range(40)) * 4
    first = written.table()
    written.append(first, text, 160)
    assert written.table().adopt([9, *text]) == 0, "another first token"
    longer, shorter, other = written.table(), written.table(), written.table()
    assert longer.adopt(text) == 128, "the last row is computed in any case"
    assert shorter.adopt(text[:64]) == 32
    assert other.adopt([*text[:70], *[5] * 60]) == 64
    assert written.held(other) == [written.held(first)[1][64 - 7 : 64], written.held(first)[1][:64]]
    assert longer.tables[F][:4] == first.tables[F][:4], "shared, not copied"
    for table in (first, longer, shorter, other):
        table.release()
    blocks = written.blocks[F]
    assert (blocks.available, blocks.kept) == (12, 5)


def test_kept_blocks_are_given_up_when_others_need_them() -> None:
    written, text = Written(POOL), list(range(40)) * 4
    first = written.table()
    written.append(first, text, 160)
    first.release()
    second = written.table()
    written.append(second, [9] * 300, 300)
    assert written.blocks[F].kept == 2, "of five, three went"
    assert written.table().adopt(text) == 0 or written.blocks[S].kept > 0
    with pytest.raises(OutOfBlocksError):
        written.append(written.table(), [8] * 300, 300)


def test_rows_that_were_discarded_are_not_shared() -> None:
    written, text = Written(POOL), list(range(40)) * 4
    first = written.table()
    written.append(first, text, 30)
    first.reserve(5)
    first.commit(1)
    first.register(text)
    assert written.table().adopt(text) == 0, "31 rows fill no block"


def test_blocks_lie_side_by_side_or_were_used_last() -> None:
    written = Written(POOL)
    first, second = written.table(), written.table()
    first.reserve(64)
    second.reserve(32)
    assert [list(table.tables[F][:2]) for table in (first, second)] == [[0, 1], [2, -1]]
    second.reserve(96)
    assert list(second.tables[F][:3]) == [2, 3, 4], "behind its last one"
    first.release()
    second.reserve(128)
    assert second.tables[F][3] == 5, "behind it, though others were freed since"
    assert written.blocks[F].take() == 0, "which was freed last"


# ---- names of blocks


@given(st.lists(st.integers(0, 3), min_size=160, max_size=160), st.integers(0, 159))
@settings(max_examples=60)
def test_a_name_is_of_all_tokens_up_to_the_blocks_end(token_ids: list[int], at: int) -> None:
    """The same whether made at once or block by block; another one from where a token is another."""
    names = block_names(token_ids)
    assert len(set(names)) == 5
    before, made = b"", list[bytes]()
    for start in range(0, 160, BLOCK_ROWS):
        made += block_names(token_ids[start : start + BLOCK_ROWS], before)
        before = made[-1]
    assert made == names
    others = block_names([*token_ids[:at], 4, *token_ids[at + 1 :]])
    alike = [ours == theirs for ours, theirs in zip(names, others, strict=True)]
    assert alike == [i < at // BLOCK_ROWS for i in range(5)]
