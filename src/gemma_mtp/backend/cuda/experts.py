"""A mixture of experts: each row's choice, the rows of each expert together, and the row's own sum (rule R7)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemma_mtp.backend.cuda.dots import chain, gelu, sum_parts
from gemma_mtp.backend.cuda.launch import Launch, power_of_two
from gemma_mtp.backend.cuda.rows import normed, row_warps
from gemma_mtp.backend.cuda.tiles import EXPERT_TILES, PAIRED_TILES, tile
from gemma_mtp.backend.cuda.weights import DeviceWeight


@dataclass(frozen=True)
class DeviceExperts:
    """A layer's experts. `router` bf16 [E, D]; `gate_up` [E * 2 I, D]; `down` [E * D, I]; norms and scales float32."""

    router: Tensor
    router_scale: Tensor
    expert_scale: Tensor
    gate_up: DeviceWeight
    down: DeviceWeight
    top_k: int
    post_dense: Tensor
    pre_sparse: Tensor
    post_sparse: Tensor


@triton.jit
def route_kernel(
    residual, router, router_scale, expert_scale, experts, weights, D, factor, eps,
    TOP_K: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """A row's experts, int32 [R, TOP_K], the likeliest first, and their weights, float32. Of NaN, experts that there
    are."""
    row, at, expert = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK), tl.arange(0, BLOCK_E)
    x = tl.load(residual + row * D + at, mask=at < D, other=0.0)
    root = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
    scores = tl.zeros((BLOCK_E,), tl.float32)
    for begin in range(0, D, STEP):
        column = begin + tl.arange(0, STEP)
        mask = column < D
        part = tl.load(residual + row * D + column, mask=mask, other=0.0) * root
        part = part * tl.load(router_scale + column, mask=mask, other=0.0) * factor
        places = router + expert[:, None] * D + column[None, :]
        w = tl.load(places, mask=(expert < E)[:, None] & mask[None, :], other=0.0).to(tl.float32)
        scores += tl.sum(w * part[None, :], 1)
    scores = tl.where(expert < E, scores, float("-inf"))
    likely = tl.exp(scores - tl.max(scores, 0))
    total, left = 0.0, scores
    for _ in range(TOP_K):
        first = tl.minimum(tl.min(tl.where(left == tl.max(left, 0), expert, BLOCK_E), 0), E - 1)
        total += tl.sum(tl.where(expert == first, likely, 0.0), 0)
        left = tl.where(expert == first, float("-inf"), left)
    left = scores
    for i in range(TOP_K):
        first = tl.minimum(tl.min(tl.where(left == tl.max(left, 0), expert, BLOCK_E), 0), E - 1)
        weight = tl.sum(tl.where(expert == first, likely, 0.0), 0) / total * tl.load(expert_scale + first)
        tl.store(experts + row * TOP_K + i, first)
        tl.store(weights + row * TOP_K + i, weight)
        left = tl.where(expert == first, float("-inf"), left)


@triton.jit(do_not_specialize=["E", "divisor"])
def expert_kernel(
    x, w, scales, order, tile_expert, tile_begin, ends, out, N, K, E, divisor,
    GATED: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of one expert's assignments: with GATED gelu(gate) * up, bf16 [A, N], else float32 products [A, N].

    `order`: assignments sorted by expert, of which assignment a reads row a // divisor of x."""
    number = tl.program_id(0)
    expert = tl.load(tile_expert + number).to(tl.int64)
    if expert < E:
        at = tl.load(tile_begin + number) + tl.arange(0, BLOCK_M)
        row_mask = at < tl.load(ends + expert)
        assignment = tl.load(order + at, mask=row_mask, other=0).to(tl.int64)
        column = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        column_mask, rows = column < N, assignment // divisor * K
        places = out + assignment[:, None] * N + column[None, :]
        mask = row_mask[:, None] & column_mask[None, :]
        if GATED:
            first = expert * 2 * N + column
            gate = chain(x, rows, row_mask, w, scales, first, column_mask, 0, K, K, KIND, GROUP, BLOCK_M, BLOCK_N,
                         BLOCK_K)  # fmt: skip
            up = chain(x, rows, row_mask, w, scales, first + N, column_mask, 0, K, K, KIND, GROUP, BLOCK_M, BLOCK_N,
                       BLOCK_K)  # fmt: skip
            tl.store(places, (gelu(gate) * up).to(tl.bfloat16), mask=mask)
        else:
            found = chain(x, rows, row_mask, w, scales, expert * N + column, column_mask, 0, K, K, KIND, GROUP,
                          BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
            tl.store(places, found, mask=mask)


@triton.jit(do_not_specialize=["R"])
def combine_kernel(
    dense, sparse, weights, post_dense, post_sparse, out, R, D, eps,
    PARTS: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """norm(dense) + norm(the row's experts in its own order), float32 [R, D]."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    mask = at < D
    mixed = tl.zeros((BLOCK,), tl.float32)
    for i in range(TOP_K):
        own = tl.load(sparse + (row * TOP_K + i) * D + at, mask=mask, other=0.0)
        mixed += own * tl.load(weights + row * TOP_K + i)
    x = normed(sum_parts(dense, row * D + at, mask, R.to(tl.int64) * D, PARTS), D, eps)
    x = x * tl.load(post_dense + at, mask=mask, other=0.0)
    x += normed(mixed, D, eps) * tl.load(post_sparse + at, mask=mask, other=0.0)
    tl.store(out + row * D + at, x, mask=mask)


def route(launch: Launch, residual_RD: Tensor, moe: DeviceExperts, eps: float) -> tuple[Tensor, Tensor]:
    """Returns each row's experts, int32 [R, k], and their weights, float32."""
    R, D = residual_RD.shape
    E = len(moe.router)
    experts = torch.empty(R, moe.top_k, dtype=torch.int32, device=residual_RD.device)
    weights = torch.empty(R, moe.top_k, dtype=torch.float32, device=residual_RD.device)
    block = power_of_two(D)
    launch(
        route_kernel, (R,), residual_RD, moe.router, moe.router_scale, moe.expert_scale, experts, weights, D, D**-0.5,
        eps, TOP_K=moe.top_k, E=E, BLOCK_E=power_of_two(E), BLOCK=block, STEP=64, warps=row_warps(block),
    )  # fmt: skip
    return experts, weights


@dataclass(frozen=True)
class Tiles:
    """Assignments (row, choice) sorted by expert, and the tiles that they make: integers on the device, no host read.

    `order_A`: assignments; `ends_E`: where each expert's end; of tile t, its expert (E: none) and first place."""

    order_A: Tensor
    ends_E: Tensor
    expert_T: Tensor
    begin_T: Tensor


def tiles_of(experts_RK: Tensor, E: int, rows: int) -> Tiles:
    """Returns the tiles of `rows` assignments each."""
    flat = experts_RK.flatten()
    chosen, order = flat.sort(stable=True)
    all_experts = torch.arange(E, device=flat.device, dtype=flat.dtype)
    ends = torch.searchsorted(chosen, all_experts, right=True)
    begins = torch.cat((ends.new_zeros(1), ends[:-1]))
    tile_ends = ((ends - begins + rows - 1) // rows).cumsum(0)
    number = torch.arange(min(E, len(flat)) + len(flat) // rows, device=flat.device)
    expert = torch.searchsorted(tile_ends, number, right=True)
    known = expert.clamp(max=E - 1)
    before = torch.cat((tile_ends.new_zeros(1), tile_ends[:-1]))[known]
    return Tiles(order.int(), ends.int(), expert.int(), (begins[known] + (number - before) * rows).int())


def mixture(
    launch: Launch, residual_RD: Tensor, sparse_RD: Tensor, dense_SRD: Tensor, moe: DeviceExperts, eps: float
) -> Tensor:
    """Returns the normed sum of both branches, float32 [1, R, D].

    `residual_RD`: float32, what the router reads; `sparse_RD`: bf16, what the experts read; `dense_SRD`: parts.
    """
    (R, D), E, k, I = residual_RD.shape, len(moe.router), moe.top_k, moe.down.columns  # noqa: E741
    device = residual_RD.device
    experts_RK, weights_RK = route(launch, residual_RD, moe, eps)
    per_expert = -(-R * k // E)
    used, paired = tile(per_expert, EXPERT_TILES), tile(per_expert, PAIRED_TILES[:2])
    tiles = tiles_of(experts_RK, E, used.rows)
    hidden = torch.empty(R * k, I, dtype=torch.bfloat16, device=device)
    out = torch.empty(R * k, D, dtype=torch.float32, device=device)
    for x, w, into, N, K, divisor, gated, one in (
        (sparse_RD, moe.gate_up, hidden, I, D, k, True, paired), (hidden, moe.down, out, D, I, 1, False, used),
    ):  # fmt: skip
        launch(
            expert_kernel, (len(tiles.expert_T), triton.cdiv(N, one.columns)), x, w.data, w.scales, tiles.order_A,
            tiles.expert_T, tiles.begin_T, tiles.ends_E, into, N, K, E, divisor, GATED=gated, KIND=w.kind,
            GROUP=w.group, BLOCK_M=one.rows, BLOCK_N=one.columns, BLOCK_K=one.depth, warps=one.warps, stages=one.stages,
        )  # fmt: skip
    parts, block = len(dense_SRD), power_of_two(D)
    both = torch.empty(1, R, D, dtype=torch.float32, device=device)
    launch(
        combine_kernel, (R,), dense_SRD, out, weights_RK, moe.post_dense, moe.post_sparse, both, R, D, eps,
        PARTS=parts, TOP_K=k, BLOCK=block, warps=row_warps(block),
    )  # fmt: skip
    return both
