"""The centroid head: clusters of equal size over the output table, scored first when decoding.

Training scores the whole vocabulary; the head is made when it is done. Tokens are clustered by balanced k-means of
their rows in the output table; the centroids are then fitted, so that the clusters with most of the drafter's own
probability score highest, which cluster means alone do not give.

Beside the table one copy of it is held at a time, and of what grows with the vocabulary blocks of `BLOCK_SCORES`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma_mtp.config import DrafterConfig
from gemma_mtp.model.drafter import CentroidHead, Drafter
from gemma_mtp.training.unroll import trained_head

ITERATIONS = 12
#: clusters that a token may go to, best first, before it is put where there is room
CHOICES = 32
#: scores that are computed at once, of rows by clusters or of states by tokens
BLOCK_SCORES = 1 << 24
#: head states that centroids are fitted to and measured on, steps of the fit, states of a step
FIT_STATES, FIT_STEPS, FIT_BATCH, FIT_LR = 16_384, 300, 256, 0.02


@dataclass(frozen=True)
class Recall:
    """On states that the centroids were not fitted to: how often the best clusters hold the drafter's likeliest token,
    and how much of its probability."""

    top_token: float
    mass: float
    clusters: int
    of: int

    def __str__(self) -> str:
        return (
            f"the best {self.clusters} of {self.of} clusters hold the drafter's likeliest token in {self.top_token:.1%}"
            f" of rows, and {self.mass:.1%} of its probability"
        )


def fit_head(
    drafter: Drafter, config: DrafterConfig, states_NH: Tensor, known: CentroidHead | None, seed: int
) -> Recall:
    """Give `drafter` a centroid head of `config`, for head states such as `states_NH`. `known` is the head it had
    before, whose clusters are kept. The last fifth of the states measures the recall."""
    table = trained_head(drafter).detach()
    head = CentroidHead(config).to(table.device)
    generator = torch.Generator(table.device).manual_seed(seed)
    if known is None:
        clusters_KM, centroids = balanced_clusters(table, config.num_centroids, generator)
    else:
        clusters_KM = known.token_ordering.view(config.num_centroids, -1).to(table.device)
        centroids = known.centroids.weight.detach().float().to(table.device)
    states = states_NH.float()
    states = states[torch.randperm(len(states), generator=generator, device=states.device)]
    split = len(states) - len(states) // 5
    aims = cluster_aims(states, table, clusters_KM)
    centroids = fit_centroids(centroids, aims.mass_NK[:split], states[:split], generator)
    head.token_ordering.copy_(clusters_KM.flatten())
    head.centroids.weight.data.copy_(centroids)
    drafter.config = config
    drafter.masked_embedding = head.to(drafter.norm.weight.dtype).requires_grad_(False)
    return recall(centroids, aims.rows(split), states[split:], config.centroid_intermediate_top_k)


def balanced_clusters(table_VH: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Spherical k-means with V / count members to each cluster: members [count, V / count], fp32 means [count, H]."""
    rows = table_VH.to(torch.float32, copy=True)
    rows /= rows.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    start = torch.randperm(len(rows), generator=generator, device=rows.device)[:count]
    centroids, capacity = rows[start], len(rows) // count
    for _ in range(ITERATIONS):
        owner_V = balanced_assignment(rows, centroids, capacity)
        members_KM = owner_V.argsort(stable=True).view(count, capacity)
        centroids = F.normalize(_means(rows, members_KM), dim=-1)
    return members_KM, _means(table_VH, members_KM)


def _means(rows_VH: Tensor, members_KM: Tensor) -> Tensor:
    """The mean [K, H] of each cluster's rows, in fp32."""
    at_once = max(1, BLOCK_SCORES // (members_KM.shape[1] * rows_VH.shape[1]))
    return torch.cat([rows_VH[members].float().mean(1) for members in members_KM.split(at_once)])


def balanced_assignment(rows_VH: Tensor, centroids_KH: Tensor, capacity: int) -> Tensor:
    """The cluster [V] of each row, `capacity` rows to each: rows ask for their best clusters in turn, and clusters keep
    the ones most like them (deferred acceptance); rows that all their choices refused fill what is left."""
    choices = min(CHOICES, len(centroids_KH))
    scores_VC, asked_VC = _best_clusters(rows_VH, centroids_KH, choices)
    owner = torch.full((len(rows_VH),), -1, dtype=torch.int64, device=rows_VH.device)
    turn = torch.zeros_like(owner)
    while len(asking := torch.nonzero((owner < 0) & (turn < choices)).flatten()):
        owner[asking] = asked_VC[asking, turn[asking]]
        held = torch.nonzero(owner >= 0).flatten()
        score = scores_VC[held, turn[held]]
        order = held[score.argsort(descending=True, stable=True)]
        order = order[owner[order].argsort(stable=True)]  # cluster by cluster, the most alike first
        sizes = owner[order].bincount(minlength=len(centroids_KH))
        rank = torch.arange(len(order), device=order.device) - (sizes.cumsum(0) - sizes)[owner[order]]
        refused = order[rank >= capacity]
        owner[refused] = -1
        turn[refused] += 1
    room = capacity - owner[owner >= 0].bincount(minlength=len(centroids_KH))
    owner[owner < 0] = torch.repeat_interleave(torch.arange(len(room), device=owner.device), room)
    return owner


def _best_clusters(rows_VH: Tensor, centroids_KH: Tensor, count: int) -> tuple[Tensor, Tensor]:
    scores = torch.empty(len(rows_VH), count, dtype=rows_VH.dtype, device=rows_VH.device)
    places = torch.empty(len(rows_VH), count, dtype=torch.int64, device=rows_VH.device)
    at_once = max(1, BLOCK_SCORES // len(centroids_KH))
    for start in range(0, len(rows_VH), at_once):
        block = slice(start, start + at_once)
        scores[block], places[block] = (rows_VH[block] @ centroids_KH.T).topk(count, dim=-1)
    return scores, places


@dataclass(frozen=True)
class Aims:
    """What centroids are to find for N states: the drafter's probability of each cluster [N, K], and the cluster [N] of
    its likeliest token."""

    mass_NK: Tensor
    top_N: Tensor

    def rows(self, start: int) -> Aims:
        return Aims(self.mass_NK[start:], self.top_N[start:])


@torch.no_grad()
def cluster_aims(states_NH: Tensor, table_VH: Tensor, clusters_KM: Tensor) -> Aims:
    """Scores every token for each state, once: the fit would come back to a state several times."""
    ordered_VH, (count, members) = table_VH[clusters_KM.flatten()].float(), clusters_KM.shape
    mass_NK = states_NH.new_empty(len(states_NH), count)
    top_N = torch.empty(len(states_NH), dtype=torch.int64, device=states_NH.device)
    at_once = max(1, BLOCK_SCORES // len(ordered_VH))
    for start in range(0, len(states_NH), at_once):
        block = slice(start, start + at_once)
        scores = states_NH[block] @ ordered_VH.T
        highest, place = scores.max(-1, keepdim=True)
        sums = scores.sub_(highest).exp_().view(-1, count, members).sum(-1)
        mass_NK[block], top_N[block] = sums / sums.sum(-1, keepdim=True), place.squeeze(-1) // members
        del scores  # before those of the next block are made
    return Aims(mass_NK, top_N)


def fit_centroids(centroids_KH: Tensor, mass_NK: Tensor, states_NH: Tensor, generator: torch.Generator) -> Tensor:
    """Centroids whose softmax over clusters is near the drafter's own probability of each cluster."""
    fitted = torch.nn.Parameter(centroids_KH.clone())
    optimiser = torch.optim.Adam([fitted], lr=FIT_LR * float(centroids_KH.std()))
    for step in range(FIT_STEPS):
        chosen = torch.randint(len(states_NH), (FIT_BATCH,), generator=generator, device=states_NH.device)
        loss = F.cross_entropy(states_NH[chosen] @ fitted.T, mass_NK[chosen])
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        for group in optimiser.param_groups:
            group["lr"] = FIT_LR * float(centroids_KH.std()) * (1 - step / FIT_STEPS)
        optimiser.step()
    return fitted.detach()


@torch.no_grad()
def recall(centroids_KH: Tensor, aims: Aims, states_NH: Tensor, top_k: int) -> Recall:
    """What the best `top_k` clusters hold."""
    best = (states_NH @ centroids_KH.T).topk(top_k, dim=-1).indices
    hits = (best == aims.top_N[:, None]).any(-1).sum()
    mass = aims.mass_NK.gather(-1, best).sum()
    return Recall(float(hits) / len(states_NH), float(mass) / len(states_NH), top_k, len(centroids_KH))
