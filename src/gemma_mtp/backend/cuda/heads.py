"""From a layer's query, key and value product to normed, rotated queries, and to keys and values in the pool."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemma_mtp.backend.cuda.dots import sum_parts
from gemma_mtp.backend.cuda.launch import Launch, power_of_two
from gemma_mtp.kv.blocks import BLOCK_ROWS


class Heads(NamedTuple):
    """A layer's heads: H of queries, G of keys in the call (0 where another layer's are read), of d numbers each.

    `key_is_value`: values come from the keys' projection. `value_norm`: values are normed. `score_scale` multiplies
    queries.
    """

    H: int
    G: int
    d: int
    key_is_value: bool
    value_norm: bool
    score_scale: float


@triton.jit
def half_of_head(parts, row, head, half, mask, stride, N, d, PARTS: tl.constexpr):
    """One half of a head's numbers, float32."""
    return sum_parts(parts, row * N + head * d + half, mask, stride, PARTS)


@triton.jit
def head_norm(q_norm, k_norm, at, mask, is_query):
    """Some numbers of a query's or of a key's norm."""
    return tl.where(is_query, tl.load(q_norm + at, mask=mask, other=0.0), tl.load(k_norm + at, mask=mask, other=0.0))


@triton.jit(do_not_specialize=["table_stride", "blocks", "R", "H", "G", "rotated"])
def heads_kernel(
    parts, q_norm, k_norm, cos, sin, positions, owners, tables, table_stride, queries, keys, values, blocks,
    R, N, H, G, d, eps, score_scale, rotated, PARTS: tl.constexpr, KEY_IS_VALUE: tl.constexpr,
    VALUE_NORM: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One head of one row: a query (head < H), then keys, then values. Rows of position -1 are padding."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position = tl.load(positions + row)
    if position >= 0:
        half, middle = tl.arange(0, BLOCK), d // 2
        mask = half < middle
        stride = R.to(tl.int64) * N
        is_value = head >= H + G
        source = tl.where(is_value & KEY_IS_VALUE, head - G, head)
        low = half_of_head(parts, row, source, half, mask, stride, N, d, PARTS)
        high = half_of_head(parts, row, source, half + middle, mask, stride, N, d, PARTS)
        factor = tl.rsqrt(tl.sum(low * low + high * high, 0) / d + eps)
        if is_value:
            if VALUE_NORM:
                low, high = low * factor, high * factor
        else:
            low = low * factor * head_norm(q_norm, k_norm, half, mask, head < H)
            high = high * factor * head_norm(q_norm, k_norm, half + middle, mask, head < H)
            turned = half < rotated
            c = tl.load(cos + position.to(tl.int64) * rotated + half, mask=turned, other=1.0)
            s = tl.load(sin + position.to(tl.int64) * rotated + half, mask=turned, other=0.0)
            low, high = low * c - high * s, high * c + low * s
        if head < H:
            places = queries + (row * H + head) * d + half
            tl.store(places, (low * score_scale).to(tl.bfloat16), mask=mask)
            tl.store(places + middle, (high * score_scale).to(tl.bfloat16), mask=mask)
        else:
            table = tables + tl.load(owners + row).to(tl.int64) * table_stride
            block = tl.load(table + position // BLOCK_ROWS).to(tl.int64)
            group = (head - H) % G
            offset = ((group * blocks + block) * BLOCK_ROWS + position % BLOCK_ROWS) * d + half
            if is_value:
                tl.store(values + offset, low.to(tl.bfloat16), mask=mask)
                tl.store(values + offset + middle, high.to(tl.bfloat16), mask=mask)
            else:
                tl.store(keys + offset, low.to(tl.bfloat16), mask=mask)
                tl.store(keys + offset + middle, high.to(tl.bfloat16), mask=mask)


def finish_heads(
    launch: Launch, parts_SRN: Tensor, heads: Heads, q_norm: Tensor, k_norm: Tensor | None, rope: tuple[Tensor, Tensor],
    positions_R: Tensor, owners_R: Tensor, tables: Tensor, keys: Tensor, values: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    """Returns queries, bf16 [R, H, d], and stores the rows' keys and values in the pool's [G, blocks, rows, d].

    `rope`: cos and sin, float32 [positions, rotated]; dimensions d / 2 apart turn together, those beyond stay.
    `owners_R`: each row's line of `tables`, int32 [sequences, blocks].
    """
    parts, R, N = parts_SRN.shape
    queries = torch.empty(R, heads.H, heads.d, dtype=torch.bfloat16, device=parts_SRN.device)
    block = power_of_two(heads.d // 2)
    launch(
        heads_kernel, (R, heads.H + 2 * heads.G), parts_SRN, q_norm, q_norm if k_norm is None else k_norm, *rope,
        positions_R, owners_R, tables, tables.stride(0), queries, keys, values, keys.shape[1],
        R, N, heads.H, heads.G, heads.d, eps, heads.score_scale, rope[0].shape[1],
        PARTS=parts, KEY_IS_VALUE=heads.key_is_value, VALUE_NORM=heads.value_norm, BLOCK_ROWS=BLOCK_ROWS, BLOCK=block,
        warps=2,
    )  # fmt: skip
    return queries
