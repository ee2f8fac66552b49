"""Attention over the pool's blocks, rows and the query heads of a key-value head stacked in a tile (rules R4, R5).

A span of 256 positions is one running softmax: the largest score so far, the sum of weights, the weighted values. The
weights' sum is taken by the tensor core, so that its order is that of the products. Spans are joined in order, by one
rule, in the program that made them (prefill) or by another (decoding, where spans run beside each other).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemma_mtp.backend.cuda.launch import Launch, power_of_two
from gemma_mtp.kv.blocks import BLOCK_ROWS
from gemma_mtp.sizes.card import SPANS_BYTES

SPAN = 256
#: stacked rows of a program: what the tensor core takes
STACKED = 16
#: programs that walk the spans of one group of rows
SLOTS = 16
#: bytes of spans' results, at most: beyond, one program joins all of its spans
MOST_SCRATCH = SPANS_BYTES


class Stacks(NamedTuple):
    """Which rows a program stacks: `first_A` and `count_A` of each stack's rows, int32; all are of one sequence."""

    first_A: Tensor
    count_A: Tensor


class Seen(NamedTuple):
    """What rows see. `positions_R`, `owners_R` int32: each row's position (-1: padding) and line of `tables`, int32
    [sequences, blocks]. `window`: of the layer's kind, 0 for all. `behind`: 1 where a row does not see itself."""

    positions_R: Tensor
    owners_R: Tensor
    tables: Tensor
    window: int
    behind: int


@triton.jit
def joined(total_max, total_sum, span_max, span_sum):
    """Two running softmaxes as one: its largest score and sum, and what each one's values are multiplied by. One that
    saw nothing (its largest score -inf) changes nothing."""
    largest = tl.maximum(total_max, span_max)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    old, new = tl.exp(total_max - base), tl.exp(span_max - base)
    return largest, total_sum * old + span_sum * new, old, new


@triton.jit
def one_span(
    q, keys, values, table, group, blocks, first, end, begin, stop, d,
    M: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The running softmax of M rows over positions begin .. stop: largest [M], sum [M], values [M, BLOCK_D]."""
    inner, at_d = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_D)
    largest = tl.full((M,), float("-inf"), tl.float32)
    sums, acc = tl.zeros((M, 16), tl.float32), tl.zeros((M, BLOCK_D), tl.float32)
    ones = tl.full((BLOCK_ROWS, 16), 1.0, tl.float32).to(tl.bfloat16)
    for start in range(begin, stop, BLOCK_ROWS):
        block = tl.load(table + start // BLOCK_ROWS).to(tl.int64)
        places = ((group * blocks + block) * BLOCK_ROWS + inner)[:, None] * d + at_d[None, :]
        k = tl.load(keys + places, mask=(at_d < d)[None, :], other=0.0)
        scores = tl.dot(q, tl.trans(k))
        at = (start + inner)[None, :]
        scores = tl.where((at >= first[:, None]) & (at < end[:, None]), scores, float("-inf"))
        now = tl.maximum(largest, tl.max(scores, 1))
        base = tl.where(now == float("-inf"), 0.0, now)
        shrink = tl.exp(largest - base)
        weights = tl.exp(scores - base[:, None]).to(tl.bfloat16)
        v = tl.load(values + places, mask=(at_d < d)[None, :], other=0.0)
        sums = tl.dot(weights, ones, sums * shrink[:, None])
        acc = tl.dot(weights, v, acc * shrink[:, None])
        largest = now
    return largest, tl.max(sums, 1), acc  # all columns of `sums` are the same


@triton.jit(do_not_specialize=["table_stride", "H", "G", "blocks", "window", "behind", "kept", "slots"])
def attend_kernel(
    queries, keys, values, first_rows, counts, positions, owners, tables, table_stride, out, spans, numbers,
    H, G, d, blocks, window, behind, kept, slots,
    PER_ROW: tl.constexpr, JOIN: tl.constexpr, M: tl.constexpr, SPAN: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A stack of rows and the query heads of one key-value head. JOIN: all spans, and out bf16 [R, H, d]. Else each
    `slots`-th span: spans float32 [R, H, kept, d], and numbers [R, H, kept, 2] with its largest score and sum.

    `slots` is no constant: a growing context has more and more, and each would be compiled anew."""
    stack, group, slot = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    stacked, at_d = tl.arange(0, M), tl.arange(0, BLOCK_D)
    of_group = H // G
    first_row, count = tl.load(first_rows + stack), tl.load(counts + stack)
    row = first_row + stacked // PER_ROW
    valid = (stacked // PER_ROW < count) & (stacked % PER_ROW < of_group)
    position = tl.load(positions + row, mask=valid, other=-1)
    valid = valid & (position >= 0)
    end = tl.where(valid, position + 1 - behind, 0)
    first = tl.where(window > 0, tl.maximum(position - window + 1, 0), 0)
    lowest, highest = tl.min(tl.where(valid, first, 2147483647), 0), tl.max(end, 0)
    place = row.to(tl.int64) * H + group * of_group + stacked % PER_ROW
    q_places = queries + place[:, None] * d + at_d[None, :]
    whole_mask = valid[:, None] & (at_d < d)[None, :]
    q = tl.load(q_places, mask=whole_mask, other=0.0)
    table = tables + tl.load(owners + first_row).to(tl.int64) * table_stride
    total_max, total_sum = tl.full((M,), float("-inf"), tl.float32), tl.zeros((M,), tl.float32)
    total = tl.zeros((M, BLOCK_D), tl.float32)
    for number in range(lowest // SPAN + slot, tl.cdiv(highest, SPAN), slots):
        begin = tl.maximum(number * SPAN, lowest // BLOCK_ROWS * BLOCK_ROWS)
        stop = tl.minimum((number + 1) * SPAN, highest)
        largest, sums, acc = one_span(
            q, keys, values, table, group, blocks, first, end, begin, stop, d, M, BLOCK_ROWS, BLOCK_D
        )
        if JOIN:
            total_max, total_sum, old, new = joined(total_max, total_sum, largest, sums)
            total = total * old[:, None] + acc * new[:, None]
        else:
            at = place * kept + number % kept
            tl.store(spans + at[:, None] * d + at_d[None, :], acc, mask=whole_mask)
            tl.store(numbers + at * 2, largest, mask=valid)
            tl.store(numbers + at * 2 + 1, sums, mask=valid)
    if JOIN:
        result = total / tl.where(valid, total_sum, 1.0)[:, None]
        tl.store(out + place[:, None] * d + at_d[None, :], result.to(tl.bfloat16), mask=whole_mask)


@triton.jit(do_not_specialize=["H", "window", "behind", "kept"])
def join_kernel(spans, numbers, positions, out, H, d, window, behind, kept, SPAN: tl.constexpr, BLOCK_D: tl.constexpr):
    """The spans of one head of one row joined in order, bf16."""
    row, head, at_d = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BLOCK_D)
    position = tl.load(positions + row)
    if position >= 0:
        end = position + 1 - behind
        first = tl.where(window > 0, tl.maximum(position - window + 1, 0), 0)
        place = row * H + head
        total_max, total_sum = tl.full((1,), float("-inf"), tl.float32), tl.zeros((1,), tl.float32)
        total = tl.zeros((BLOCK_D,), tl.float32)
        for number in range(first // SPAN, tl.cdiv(end, SPAN)):
            at = place * kept + number % kept
            span = tl.load(spans + at * d + at_d, mask=at_d < d, other=0.0)
            both = numbers + at * 2 + tl.zeros((1,), tl.int32)
            total_max, total_sum, old, new = joined(total_max, total_sum, tl.load(both), tl.load(both + 1))
            total = total * old + span * new
        tl.store(out + place * d + at_d, (total / total_sum).to(tl.bfloat16), mask=at_d < d)


def rows_of_stack(H: int, G: int) -> tuple[int, int]:
    """Returns how many rows a program stacks, and the places that each takes: a power of two of query heads."""
    per_row = power_of_two(H // G)
    return max(1, STACKED // per_row), per_row


def attend(launch: Launch, queries_RHd: Tensor, keys: Tensor, values: Tensor, stacks: Stacks, seen: Seen,
           most_rows: int) -> Tensor:  # fmt: skip
    """Returns what rows read of the pool's keys and values [G, blocks, rows, d]: bf16 [R, H * d].

    `queries_RHd`: bf16, with the scale of their scores. `stacks`: of `rows_of_stack` rows each. `most_rows`: no
    row sees a position from there on; it bounds scratch memory and decides no bits.
    """
    R, H, d = queries_RHd.shape
    G, device = keys.shape[0], queries_RHd.device
    rows, per_row = rows_of_stack(H, G)
    kept = spans_kept(seen.window, most_rows)
    join = R * H * kept * d * 4 > MOST_SCRATCH
    # rows of padding are read by the product that follows, and must be finite
    out = torch.zeros(R, H * d, dtype=torch.bfloat16, device=device)
    spans = out if join else torch.empty(R, H, kept, d, dtype=torch.float32, device=device)
    numbers = out if join else torch.empty(R, H, kept, 2, dtype=torch.float32, device=device)
    slots = 1 if join else min(SLOTS, kept)
    block_d = max(16, power_of_two(d))
    launch(
        attend_kernel, (len(stacks.first_A), G, slots), queries_RHd, keys, values, *stacks, seen.positions_R,
        seen.owners_R, seen.tables, seen.tables.stride(0), out, spans, numbers, H, G, d, keys.shape[1], seen.window,
        seen.behind, kept, slots, PER_ROW=per_row, JOIN=join, M=rows * per_row, SPAN=SPAN, BLOCK_ROWS=BLOCK_ROWS,
        BLOCK_D=block_d, warps=8 if block_d > 256 else 4,
    )  # fmt: skip
    if not join:
        launch(
            join_kernel, (R, H), spans, numbers, seen.positions_R, out, H, d, seen.window, seen.behind, kept, SPAN=SPAN,
            BLOCK_D=block_d,
        )  # fmt: skip
    return out


def spans_kept(window: int, most_rows: int) -> int:
    """Returns the spans that a stack's rows see at once, at most: so many results are kept of each row."""
    of_all = -(-most_rows // SPAN)
    return min(of_all, -(-(window + STACKED) // SPAN) + 1) if window else of_all
