"""Products with weights: plain ones, and a gated MLP's first half with its activation."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemma_mtp.backend.cuda.dots import chain, gelu
from gemma_mtp.backend.cuda.launch import Launch
from gemma_mtp.backend.cuda.tiles import (
    PAIRED_TILES,
    PARALLEL_ROWS,
    part_count,
    part_length,
    tile,
)
from gemma_mtp.backend.cuda.weights import DeviceWeight


@triton.jit(do_not_specialize=["R"])
def linear_kernel(
    x, w, scales, out, R, N, K, part_length, WHOLE: tl.constexpr,
    KIND: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out float32 [parts, R, N], of which a program computes one part of a tile; [1, R, N] with WHOLE: their sum."""
    columns = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    part, row = tl.program_id(1), tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows, row_mask, column_mask = row.to(tl.int64) * K, row < R, columns < N
    if WHOLE:
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for begin in range(0, K, part_length):
            total += chain(
                x, rows, row_mask, w, scales, columns, column_mask, begin, tl.minimum(begin + part_length, K), K,
                KIND, GROUP, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
    else:
        begin = part * part_length
        total = chain(
            x, rows, row_mask, w, scales, columns, column_mask, begin, tl.minimum(begin + part_length, K), K,
            KIND, GROUP, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    corner = out + (part * R + tl.program_id(2) * BLOCK_M).to(tl.int64) * N + tl.program_id(0) * BLOCK_N
    places = corner + tl.arange(0, BLOCK_M)[:, None] * N + tl.arange(0, BLOCK_N)[None, :]
    tl.store(places, total, mask=row_mask[:, None] & column_mask[None, :])


def linear(launch: Launch, x_RK: Tensor, weight: DeviceWeight) -> Tensor:
    """Returns x times the transpose of the weight, in float32 parts [parts, R, N] that are to be added in order.

    `x_RK`: bf16, contiguous. More rows than `PARALLEL_ROWS` come already added: [1, R, N].
    """
    (R, K), N = x_RK.shape, weight.rows
    whole = R > PARALLEL_ROWS or part_count(N, K) == 1
    used = tile(R)
    out = torch.empty(1 if whole else part_count(N, K), R, N, dtype=torch.float32, device=x_RK.device)
    grid = (triton.cdiv(N, used.columns), out.shape[0], triton.cdiv(R, used.rows))
    launch(
        linear_kernel, grid, x_RK, weight.data, weight.scales, out, R, N, K, part_length(N, K), WHOLE=whole,
        KIND=weight.kind, GROUP=weight.group, BLOCK_M=used.rows, BLOCK_N=used.columns, BLOCK_K=used.depth,
        warps=used.warps, stages=used.stages,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["R"])
def gate_up_kernel(
    x, w, scales, out, R, N, K,
    KIND: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out bf16 [R, N]: gelu(x times the first N rows of the weight) times (x times the last N)."""
    columns = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows, row_mask, column_mask = row.to(tl.int64) * K, row < R, columns < N
    gate = chain(x, rows, row_mask, w, scales, columns, column_mask, 0, K, K, KIND, GROUP, BLOCK_M, BLOCK_N, BLOCK_K)
    up = chain(x, rows, row_mask, w, scales, columns + N, column_mask, 0, K, K, KIND, GROUP, BLOCK_M, BLOCK_N, BLOCK_K)
    corner = out + tl.program_id(1).to(tl.int64) * BLOCK_M * N + tl.program_id(0) * BLOCK_N
    places = corner + tl.arange(0, BLOCK_M)[:, None] * N + tl.arange(0, BLOCK_N)[None, :]  # int32: fewer registers
    tl.store(places, (gelu(gate) * up).to(tl.bfloat16), mask=row_mask[:, None] & column_mask[None, :])


def gate_up(launch: Launch, x_RK: Tensor, weight: DeviceWeight) -> Tensor:
    """Returns gelu(gate) * up of a fused weight [2 N, K], bf16 [R, N]. `x_RK`: bf16, contiguous."""
    (R, K), N = x_RK.shape, weight.rows // 2
    used = tile(R, PAIRED_TILES)
    out = torch.empty(R, N, dtype=torch.bfloat16, device=x_RK.device)
    launch(
        gate_up_kernel, (triton.cdiv(N, used.columns), triton.cdiv(R, used.rows)), x_RK, weight.data, weight.scales,
        out, R, N, K, KIND=weight.kind, GROUP=weight.group, BLOCK_M=used.rows, BLOCK_N=used.columns, BLOCK_K=used.depth,
        warps=used.warps, stages=used.stages,
    )  # fmt: skip
    return out
