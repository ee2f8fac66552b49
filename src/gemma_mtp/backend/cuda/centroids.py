"""A centroid head: scores of clusters of tokens, and logits of the tokens of the best ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemma_mtp.backend.cuda.dots import chain, sum_parts
from gemma_mtp.backend.cuda.launch import Launch, power_of_two
from gemma_mtp.backend.cuda.linear import linear
from gemma_mtp.backend.cuda.tiles import TILES
from gemma_mtp.backend.cuda.weights import DeviceWeight


@dataclass(frozen=True)
class DeviceCentroids:
    """`centroids` [clusters, H]; `table` [V, H] and `token_ids_V` int64, cluster by cluster; `count` are looked at."""

    centroids: DeviceWeight
    table: DeviceWeight
    token_ids_V: Tensor
    count: int


@triton.jit(do_not_specialize=["R", "C"])
def clusters_kernel(parts, best, R, C, COUNT: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """best int32 [R, COUNT]: a row's best clusters, the first of equals first. Of NaN, which a broken drafter has, some
    cluster that there is: another would be read beyond the table."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    scores = sum_parts(parts, row * C + at, at < C, R.to(tl.int64) * C, PARTS)
    scores = tl.where(at < C, scores, float("-inf"))
    for i in range(COUNT):
        first = tl.minimum(tl.min(tl.where(scores == tl.max(scores, 0), at, BLOCK), 0), C - 1)
        tl.store(best + row * COUNT + i, first)
        scores = tl.where(at == first, float("-inf"), scores)


@triton.jit(do_not_specialize=["size"])
def cluster_logits_kernel(
    hidden, w, scales, best, token_ids, logits, ids, D, size, COUNT: tl.constexpr,
    KIND: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Logits and token ids of some tokens of one of a row's clusters, [R, COUNT * size]."""
    row, i = tl.program_id(0).to(tl.int64), tl.program_id(1)
    inside = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    cluster = tl.load(best + row * COUNT + i).to(tl.int64)
    columns, mask, stacked = cluster * size + inside, inside < size, tl.arange(0, BLOCK_M)
    found = chain(
        hidden, row * D + stacked.to(tl.int64) * 0, stacked == 0, w, scales, columns, mask, 0, D, D, KIND, GROUP,
        BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    place = row * COUNT * size + i * size + inside
    tl.store(logits + place, tl.sum(tl.where((stacked == 0)[:, None], found, 0.0), 0), mask=mask)
    tl.store(ids + place, tl.load(token_ids + columns, mask=mask, other=0), mask=mask)


def candidates(launch: Launch, hidden_RH: Tensor, head: DeviceCentroids) -> tuple[Tensor, Tensor]:
    """Returns logits, float32, and token ids, int64, of the tokens in each row's best clusters, [R, C] each."""
    R, D = hidden_RH.shape
    scores, device = linear(launch, hidden_RH, head.centroids), hidden_RH.device
    parts, _, clusters = scores.shape
    size, used = len(head.token_ids_V) // clusters, TILES[0]
    best = torch.empty(R, head.count, dtype=torch.int32, device=device)
    launch(
        clusters_kernel, (R,), scores, best, R, clusters, COUNT=head.count, PARTS=parts, BLOCK=power_of_two(clusters)
    )
    logits = torch.empty(R, head.count * size, dtype=torch.float32, device=device)
    ids = torch.empty(R, head.count * size, dtype=torch.int64, device=device)
    launch(
        cluster_logits_kernel, (R, head.count, triton.cdiv(size, used.columns)), hidden_RH, head.table.data,
        head.table.scales, best, head.token_ids_V, logits, ids, D, size, COUNT=head.count, KIND=head.table.kind,
        GROUP=head.table.group, BLOCK_M=used.rows, BLOCK_N=used.columns, BLOCK_K=used.depth, warps=used.warps,
        stages=used.stages,
    )  # fmt: skip
    return logits, ids
