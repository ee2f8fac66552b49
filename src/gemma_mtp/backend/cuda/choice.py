"""The choice of a token: the largest of logits, or of logits / temperature plus counter-based Gumbel noise, after the
filters, and the lowest id among equals: what `decoding.sampling.choose` gives (rule R6)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemma_mtp.backend.cuda.dots import chain
from gemma_mtp.backend.cuda.draws import Draws, noisy
from gemma_mtp.backend.cuda.filters import filtered
from gemma_mtp.backend.cuda.launch import Launch
from gemma_mtp.backend.cuda.tiles import TILES, tile
from gemma_mtp.backend.cuda.weights import DeviceWeight
from gemma_mtp.sizes.card import FILTERED_ROWS

#: numbers that a program reads at once
READ = 1024


@triton.jit
def capped(logits, cap, CAPPED: tl.constexpr):
    """cap * tanh(logits / cap)."""
    if CAPPED:
        size = tl.abs(logits) / cap
        shrunk = tl.exp(-2.0 * size)
        bounded = cap * ((1.0 - shrunk) / (1.0 + shrunk))
        logits = tl.where(logits < 0.0, -bounded, bounded)
    return logits


@triton.jit(do_not_specialize=["R", "V"])
def head_kernel(
    hidden, w, scales, picked, temperatures, keys, out, ids, R, V, D, cap,
    CHOICE: tl.constexpr, DRAWN: tl.constexpr, CAPPED: tl.constexpr,
    KIND: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of logits of rows `picked` of hidden. Without CHOICE out float32 [R, V]; else the tile's best of each row,
    out [R, tiles] (float64 with DRAWN) and ids int32 [R, tiles]."""
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask, column_mask = row < R, column < V
    rows = tl.load(picked + row, mask=row_mask, other=0).to(tl.int64) * D
    logits = capped(
        chain(hidden, rows, row_mask, w, scales, column.to(tl.int64), column_mask, 0, D, D, KIND, GROUP, BLOCK_M,
              BLOCK_N, BLOCK_K),
        cap, CAPPED,
    )  # fmt: skip
    if CHOICE:
        scores = logits
        if DRAWN:
            temperature = tl.load(temperatures + row, mask=row_mask, other=0.0)
            key = tl.load(keys + row, mask=row_mask, other=0)
            scores = noisy(logits, column[None, :], temperature[:, None], key[:, None])
        scores = tl.where(column_mask[None, :], scores, float("-inf"))
        best = tl.max(scores, 1)
        is_best = (scores == best[:, None]) & column_mask[None, :]
        first = tl.min(tl.where(is_best, column[None, :], 2147483647), 1)
        place = row.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
        tl.store(out + place, best, mask=row_mask)
        tl.store(ids + place, first, mask=row_mask)
    else:
        places = out + row.to(tl.int64)[:, None] * V + column[None, :]
        tl.store(places, logits, mask=row_mask[:, None] & column_mask[None, :])


@triton.jit(do_not_specialize=["C"])
def best_kernel(
    scores, ids, temperatures, keys, out, C, stride, DRAWN: tl.constexpr, NAMED: tl.constexpr, READ: tl.constexpr
):
    """The id of a row's best score, int64 [R]; with DRAWN of its noisy logits. Ids are columns without NAMED. A row of
    NaN has id 0: a number that is no token would be looked up."""
    row = tl.program_id(0).to(tl.int64)
    if DRAWN:
        best_score = tl.full((), float("-inf"), tl.float64)
    else:
        best_score = tl.full((), float("-inf"), scores.dtype.element_ty)
    best_id = tl.full((), 2147483647, tl.int32)
    for begin in range(0, C, READ):
        at = begin + tl.arange(0, READ)
        mask = at < C
        found = tl.load(scores + row * stride + at, mask=mask, other=float("-inf"))
        named = at
        if NAMED:
            named = tl.load(ids + row * stride + at, mask=mask, other=2147483647).to(tl.int32)
        if DRAWN:
            found = noisy(found, named, tl.load(temperatures + row), tl.load(keys + row))
        found = tl.where(mask, found, float("-inf"))
        largest = tl.max(found, 0)
        first = tl.min(tl.where((found == largest) & mask, named, 2147483647), 0)
        best_id = tl.where(
            largest > best_score, first, tl.where(largest == best_score, tl.minimum(best_id, first), best_id)
        )
        best_score = tl.maximum(largest, best_score)
    tl.store(out + row, tl.where(best_id == 2147483647, 0, best_id).to(tl.int64))


def logits(
    launch: Launch, hidden_RD: Tensor, weight: DeviceWeight, cap: float | None, picked_N: Tensor | None = None
) -> Tensor:
    """Returns soft-capped logits of a head, float32 [R, V], or of `picked_N` rows alone, int32. `hidden_RD`: bf16,
    contiguous."""
    if picked_N is None:
        picked_N = torch.arange(len(hidden_RD), dtype=torch.int32, device=hidden_RD.device)
    out = torch.empty(len(picked_N), weight.rows, dtype=torch.float32, device=hidden_RD.device)
    _head(launch, hidden_RD, weight, cap, picked_N, out, None, None)
    return out


def choose(
    launch: Launch, hidden_RD: Tensor, weight: DeviceWeight, cap: float | None, picked_N: Tensor, draws: Draws | None
) -> Tensor:
    """Returns the token of each of these rows of `hidden_RD`, int64 [N]; logits are stored for filters alone, of so
    many rows at once that they take little memory.

    `picked_N`: int32. `draws`: None where all temperatures are 0.
    """
    if draws is not None and draws.filters is not None:
        return torch.cat([
            best_of(launch, logits(launch, hidden_RD, weight, cap, picked), None, of_them)
            for picked, of_them in zip(picked_N.split(FILTERED_ROWS), draws.split(FILTERED_ROWS), strict=True)
        ])  # fmt: skip
    N, device = len(picked_N), hidden_RD.device
    tiles = triton.cdiv(weight.rows, tile(N, HEAD_TILES).columns)
    best = torch.empty(N, tiles, dtype=torch.float32 if draws is None else torch.float64, device=device)
    ids = torch.empty(N, tiles, dtype=torch.int32, device=device)
    _head(launch, hidden_RD, weight, cap, picked_N, best, ids, draws)
    return best_of(launch, best, ids, None)


def _head(
    launch: Launch, hidden_RD: Tensor, weight: DeviceWeight, cap: float | None, picked_N: Tensor, out: Tensor,
    ids: Tensor | None, draws: Draws | None,
) -> None:  # fmt: skip
    N, D = len(picked_N), hidden_RD.shape[1]
    used = tile(N, HEAD_TILES)
    temperatures, keys = (picked_N, picked_N) if draws is None else draws[:2]
    launch(
        head_kernel, (triton.cdiv(weight.rows, used.columns), triton.cdiv(N, used.rows)), hidden_RD, weight.data,
        weight.scales, picked_N, temperatures, keys, out, out if ids is None else ids, N, weight.rows, D, cap or 1.0,
        CHOICE=ids is not None, DRAWN=draws is not None, CAPPED=cap is not None, KIND=weight.kind, GROUP=weight.group,
        BLOCK_M=used.rows, BLOCK_N=used.columns, BLOCK_K=used.depth, warps=used.warps, stages=used.stages,
    )  # fmt: skip


#: a tile's scores are float64 for a while: the largest tile of `linear` would not fit the registers
HEAD_TILES = TILES[:2]


def best_of(launch: Launch, scores_RC: Tensor, ids_RC: Tensor | None, draws: Draws | None) -> Tensor:
    """Returns the id of each row's best score, int64 [R], the lowest among equals: of noisy scores where there are
    `draws`, and of what their filters keep. Ids (integers below 2**31, or 2**24 with filters) are the columns where
    there are none."""
    if draws is not None and draws.filters is not None:
        scores_RC, ids_RC = filtered(launch, scores_RC, ids_RC, draws)
        draws = None
    R, C = scores_RC.shape
    out = torch.empty(R, dtype=torch.int64, device=scores_RC.device)
    temperatures, keys = (out, out) if draws is None else draws[:2]
    launch(
        best_kernel, (R,), scores_RC, out if ids_RC is None else ids_RC, temperatures, keys, out, C,
        scores_RC.stride(0), DRAWN=draws is not None, NAMED=ids_RC is not None, READ=READ,
    )  # fmt: skip
    return out
