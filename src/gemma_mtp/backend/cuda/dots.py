"""The one chain of tensor-core steps that all products with weights are made of (rule R1).

A weight [N, K] is dense bf16; int8 in groups of 64 or 32; int4 in groups of 32, two values a byte: of each group, byte
i has column i low and column i + 16 high; or fp8 e4m3 in groups of 128 or of whole rows. Groups have float32 scales
[N, K / group]. Integers up to 8 bits and e4m3 are exact in bf16, so a group's products are exact.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: kinds of weights, as the kernels see them
DENSE, INT8, INT4, FP8 = 0, 1, 2, 3


@triton.jit
def e4m3(bits):
    """float32 of fp8 e4m3 bits (uint8), without the instruction that older cards lack."""
    wide = bits.to(tl.uint32)
    shifted = ((wide & 0x7F) << 20) | ((wide & 0x80) << 24)
    return shifted.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2**120, the difference of the biases


@triton.jit
def inputs(x, rows, row_mask, begin, K, COUNT: tl.constexpr):
    """bf16 [rows, COUNT] of x from column `begin` on; `rows` are offsets. Zero outside."""
    at = begin + tl.arange(0, COUNT)
    return tl.load(x + rows[:, None] + at[None, :], mask=row_mask[:, None] & (at < K)[None, :], other=0.0)


@triton.jit
def chain(
    x, rows, row_mask, w, scales, columns, column_mask, begin, end, K,
    KIND: tl.constexpr, GROUP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """float32 [M, N] of one part: rows of x (offsets) times rows `columns` (int64) of the weight, over begin .. end."""
    acc = tl.zeros((M, N), tl.float32)
    if KIND == 0:
        for k in range(begin, end, DEPTH):
            at = k + tl.arange(0, DEPTH)
            a = inputs(x, rows, row_mask, k, K, DEPTH)
            places = w + columns[:, None] * K + at[None, :]
            b = tl.load(places, mask=column_mask[:, None] & (at < K)[None, :], other=0.0)
            acc = tl.dot(a, tl.trans(b), acc)
    elif KIND == 2:
        half = tl.arange(0, 16)
        for k in range(begin, end, 32):
            places = w + columns[:, None] * (K // 2) + (k // 2 + half)[None, :]
            packed = tl.load(places, mask=column_mask[:, None], other=0).to(tl.int32)
            low = ((packed & 15) - 8).to(tl.float32).to(tl.bfloat16)
            high = ((packed >> 4) - 8).to(tl.float32).to(tl.bfloat16)
            dot = tl.dot(inputs(x, rows, row_mask, k, K, 16), tl.trans(low))
            dot = tl.dot(inputs(x, rows, row_mask, k + 16, K, 16), tl.trans(high), dot)
            scale = tl.load(scales + columns * (K // 32) + k // 32, mask=column_mask, other=0.0)
            acc = tl.fma(dot, tl.broadcast_to(scale[None, :], (M, N)), acc)
    elif KIND == 1:
        for k in range(begin, end, GROUP):
            at = k + tl.arange(0, GROUP)
            places = w + columns[:, None] * K + at[None, :]
            stored = tl.load(places, mask=column_mask[:, None] & (at < K)[None, :], other=0)
            b = stored.to(tl.float32).to(tl.bfloat16)
            dot = tl.dot(inputs(x, rows, row_mask, k, K, GROUP), tl.trans(b))
            scale = tl.load(scales + columns * (K // GROUP) + k // GROUP, mask=column_mask, other=0.0)
            acc = tl.fma(dot, tl.broadcast_to(scale[None, :], (M, N)), acc)
    else:
        for k in range(begin, end, 128):
            dot = tl.zeros((M, N), tl.float32)
            for start in range(k, k + 128, 32):  # 128 at once would not fit every card
                at = start + tl.arange(0, 32)
                places = w + columns[:, None] * K + at[None, :]
                stored = tl.load(places, mask=column_mask[:, None] & (at < K)[None, :], other=0)
                dot = tl.dot(inputs(x, rows, row_mask, start, K, 32), tl.trans(e4m3(stored).to(tl.bfloat16)), dot)
            scale = tl.load(scales + columns * tl.cdiv(K, GROUP) + k // GROUP, mask=column_mask, other=0.0)
            acc = tl.fma(dot, tl.broadcast_to(scale[None, :], (M, N)), acc)
    return acc


@triton.jit
def table_row(table, scales, row, at, mask, K, KIND: tl.constexpr, GROUP: tl.constexpr):
    """float32 columns `at` of one row (int64) of a weight [N, K]."""
    if KIND == 0:
        found = tl.load(table + row * K + at, mask=mask, other=0.0).to(tl.float32)
    elif KIND == 1:
        scale = tl.load(scales + row * (K // GROUP) + at // GROUP, mask=mask, other=0.0)
        found = tl.load(table + row * K + at, mask=mask, other=0).to(tl.float32) * scale
    else:
        scale = tl.load(scales + row * (K // 32) + at // 32, mask=mask, other=0.0)
        place = at % 32
        packed = tl.load(table + row * (K // 2) + at // 32 * 16 + place % 16, mask=mask, other=0).to(tl.int32)
        found = (((packed >> (place // 16 * 4)) & 15) - 8).to(tl.float32) * scale
    return found


@triton.jit
def gelu(x):
    """The tanh form of gelu, as x times a sigmoid."""
    inner = 1.5957691216057308 * (x + 0.044715 * x * x * x)  # 2 sqrt(2 / pi)
    return x / (1.0 + tl.exp(-inner))


@triton.jit
def sum_parts(parts, offsets, mask, stride, PARTS: tl.constexpr):
    """The parts of a product added in order, from zero."""
    total = tl.load(parts + offsets, mask=mask, other=0.0) + 0.0
    for part in range(1, PARTS):
        total += tl.load(parts + part * stride + offsets, mask=mask, other=0.0)
    return total
