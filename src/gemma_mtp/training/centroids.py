"""The centroid head: clusters of equal size over the output table, scored first when decoding.

Training scores the whole vocabulary; the head is made when it is done. Tokens are clustered by balanced k-means of
their rows in the output table; the centroids are then fitted, so that the clusters with most of the drafter's own
probability score highest, which cluster means alone do not give.
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
#: rows of a block of similarities, head states that centroids are fitted to, and steps of the fit
BLOCK, FIT_STATES, FIT_STEPS, FIT_LR = 8192, 16_384, 300, 0.02


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
    table = trained_head(drafter).detach().float()
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
    centroids = fit_centroids(centroids, table, clusters_KM, states[:split], generator)
    head.token_ordering.copy_(clusters_KM.flatten())
    head.centroids.weight.data.copy_(centroids)
    drafter.config = config
    drafter.masked_embedding = head.to(drafter.norm.weight.dtype).requires_grad_(False)
    return recall(centroids, table, clusters_KM, states[split:], config.centroid_intermediate_top_k)


def balanced_clusters(table_VH: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Spherical k-means with V / count members to each cluster: members [count, V / count], means [count, H]."""
    rows = F.normalize(table_VH, dim=-1)
    start = torch.randperm(len(rows), generator=generator, device=rows.device)[:count]
    centroids, capacity = rows[start], len(rows) // count
    for _ in range(ITERATIONS):
        owner_V = balanced_assignment(rows, centroids, capacity)
        members_KM = owner_V.argsort(stable=True).view(count, capacity)
        centroids = F.normalize(rows[members_KM].mean(1), dim=-1)
    return members_KM, table_VH[members_KM].mean(1)


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
    found = [(block @ centroids_KH.T).topk(count, dim=-1) for block in rows_VH.split(BLOCK)]
    return torch.cat([top.values for top in found]), torch.cat([top.indices for top in found])


def fit_centroids(
    centroids_KH: Tensor, table_VH: Tensor, clusters_KM: Tensor, states_NH: Tensor, generator: torch.Generator
) -> Tensor:
    """Centroids whose softmax over clusters is near the drafter's own probability of each cluster."""
    fitted = torch.nn.Parameter(centroids_KH.clone())
    optimiser = torch.optim.Adam([fitted], lr=FIT_LR * float(centroids_KH.std()))
    for step in range(FIT_STEPS):
        chosen = torch.randint(len(states_NH), (256,), generator=generator, device=states_NH.device)
        states = states_NH[chosen]
        with torch.no_grad():
            aim = cluster_mass(states, table_VH, clusters_KM)
        loss = F.cross_entropy(states @ fitted.T, aim)
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        for group in optimiser.param_groups:
            group["lr"] = FIT_LR * float(centroids_KH.std()) * (1 - step / FIT_STEPS)
        optimiser.step()
    return fitted.detach()


def cluster_mass(states_NH: Tensor, table_VH: Tensor, clusters_KM: Tensor) -> Tensor:
    """[N, K]: the drafter's probability of each cluster."""
    probs = (states_NH @ table_VH.T).softmax(-1)
    return probs[:, clusters_KM.flatten()].view(len(states_NH), *clusters_KM.shape).sum(-1)


@torch.no_grad()
def recall(centroids_KH: Tensor, table_VH: Tensor, clusters_KM: Tensor, states_NH: Tensor, top_k: int) -> Recall:
    """What the best `top_k` clusters hold."""
    hits, mass = 0.0, 0.0
    owner = torch.empty(table_VH.shape[0], dtype=torch.int64, device=table_VH.device)
    owner[clusters_KM.flatten()] = torch.arange(len(clusters_KM), device=owner.device).repeat_interleave(
        clusters_KM.shape[1]
    )
    for states in states_NH.split(256):
        best = (states @ centroids_KH.T).topk(top_k, dim=-1).indices
        top_token = owner[(states @ table_VH.T).argmax(-1)]
        hits += float((best == top_token[:, None]).any(-1).sum())
        mass += float(cluster_mass(states, table_VH, clusters_KM).gather(-1, best).sum())
    return Recall(hits / len(states_NH), mass / len(states_NH), top_k, len(clusters_KM))
