"""The drafter: a four-layer model that reads the target's keys and values (transformers 5.22.2, gemma4_assistant)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from gemma_mtp.config import FULL, DrafterConfig, LayerType
from gemma_mtp.model.layers import KeyValues, Rope, quantise_matrices
from gemma_mtp.model.stack import Stack
from gemma_mtp.ops import reference as ops
from gemma_mtp.weight_types import WeightTypes, merge
from gemma_mtp.weights.base import Weight
from gemma_mtp.weights.dense import Dense
from gemma_mtp.weights.matrix import Chooser, Linear, Matrix


class CentroidHead(nn.Module):
    """Scores clusters first, then only the tokens of the best ones (E2B and E4B drafters).

    `token_ordering` [V] lists the token ids cluster by cluster, V / num_centroids to a cluster.
    """

    token_ordering: Tensor

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.top_k = config.centroid_intermediate_top_k
        self.centroids = Chooser(config.text.hidden_size, config.num_centroids)
        self.register_buffer("token_ordering", torch.zeros(config.text.vocab_size, dtype=torch.int64))

    def candidates(self, hidden_RH: Tensor, table_VH: Matrix) -> tuple[Tensor, Tensor]:
        """Logits and token ids of the tokens in each row's best clusters, each [R, top_k * V / num_centroids]."""
        scores: Tensor = self.centroids(hidden_RH)
        clusters = scores.topk(self.top_k, dim=-1).indices
        token_ids = self.token_ordering.view(scores.shape[-1], -1)[clusters].flatten(-2)
        return table_VH.gathered_product(hidden_RH, token_ids), token_ids


class Drafter(Stack):
    """Input projection, KV-less decoder layers, head, and the projection fed back to the next step.

    Its own embedding table is only its head; inputs are the target's embeddings and hidden states. So of a checkpoint
    that unties them the table is the head, and what it has as its embedding is never used.
    """

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__(replace(config.text, tie_word_embeddings=True))
        self.config = config
        text, D = config.text, config.backbone_hidden_size
        self.pre_projection = Linear(2 * D, text.hidden_size)
        self.post_projection = Linear(text.hidden_size, D)
        self.masked_embedding = CentroidHead(config) if config.use_ordered_embeddings else None

    def forward(
        self, embeds_BTD: Tensor, hidden_BTD: Tensor, rope: Mapping[LayerType, Rope], kv: KeyValues
    ) -> tuple[Tensor, Tensor]:
        """One draft step for each row.

        `embeds_BTD`: the target's scaled embedding of each row's last token; `hidden_BTD`: the target's hidden state
        that produced it, or the previous step's projected state. Returns the state for the head [B, T, H] and the
        projected state [B, T, D] for the next step.
        """
        inputs = torch.cat((embeds_BTD, hidden_BTD), dim=-1)
        x = self.pre_projection(inputs)
        for i, layer in enumerate(self.layers):
            x = layer(x, rope[self.config.text.layer_types[i]], kv)
        x = self.norm(x)
        return x, self.post_projection(x)

    def logits(self, state: Tensor) -> Tensor:
        """Logits over the whole vocabulary [..., V] (training; decoding uses `candidates`)."""
        return self.head.product(state)

    def candidates(self, state_RH: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits [R, C] to choose from and their token ids [R, C], or None where every token is a candidate."""
        if self.masked_embedding is None:
            return self.logits(state_RH), None
        return self.masked_embedding.candidates(state_RH, self.head)

    def quantise_(self, types: WeightTypes) -> None:
        """Quantise the parts that `types` names. The model can not be trained after.

        Raises QuantisationError where a part is quantised otherwise.
        """
        self.weight_types = merge(self.weight_types, types.of_drafter())
        quantise_matrices([self.embed_tokens], types.drafter_head)
        quantise_matrices([*self.layers.modules(), self.pre_projection, self.post_projection], types.drafter)

    def checkpoint_tensors(self) -> dict[str, Weight]:
        tensors = super().checkpoint_tensors()
        tensors["pre_projection.weight"] = self.pre_projection.stored
        tensors["post_projection.weight"] = self.post_projection.stored
        if self.masked_embedding is not None:
            tensors["masked_embedding.centroids.weight"] = self.masked_embedding.centroids.stored
            tensors["masked_embedding.token_ordering"] = Dense(self.masked_embedding.token_ordering)
        return tensors


@dataclass
class DonorKeyValues:
    """The target's donor keys and values over whole sequences: query t sees rows before its position.

    `stored[kind]` holds [B, S, G, d]; row t of a draft step has query position `query_positions_T[t]` and sees the
    rows strictly before it, within the sliding window counted from it: what decoding has committed at that point.
    """

    config: DrafterConfig
    stored: Mapping[LayerType, tuple[Tensor, Tensor]]
    query_positions_T: Tensor
    masks: dict[LayerType, Tensor] = field(default_factory=dict)

    def attend(self, layer: int, q_BTHd: Tensor, k_BTGd: Tensor | None, v_BTGd: Tensor | None) -> Tensor:
        kind = self.config.text.layer_types[layer]
        k, v = self.stored[kind]
        if kind not in self.masks:
            # what the row before it sees, of a window that is one row shorter: a query has no row of its own
            window = None if kind == FULL else self.config.text.sliding_window - 1
            rows = torch.arange(k.shape[1], device=k.device)
            self.masks[kind] = ops.visible_rows(self.query_positions_T - 1, rows, window)
        return ops.masked_attention(q_BTHd, k.transpose(1, 2), v.transpose(1, 2), self.masks[kind])
