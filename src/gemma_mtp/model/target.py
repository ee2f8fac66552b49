"""The target: a Gemma 4 text model (transformers 5.22.2, Gemma4TextModel and Gemma4ForCausalLM)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from gemma_mtp.config import FULL, LayerType, TextConfig
from gemma_mtp.model.layers import KeyValues, RMSNorm, Rope, quantise_matrices, rope_for
from gemma_mtp.model.stack import Stack
from gemma_mtp.ops import reference as ops
from gemma_mtp.weight_types import WeightTypes, merge
from gemma_mtp.weights.base import Weight
from gemma_mtp.weights.matrix import Embedding, Linear, matrices


class SequenceOutput(NamedTuple):
    """Hidden states after the final norm [B, T, D], and the keys and values of each layer that stores them, each
    [B, T, G, d]."""

    hidden_BTD: Tensor
    stored: dict[int, tuple[Tensor, Tensor]]


class Target(Stack):
    """Embeddings, decoder layers, final norm and head of a Gemma 4 text model."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        self.config = config
        D, P, L = config.hidden_size, config.hidden_size_per_layer_input, config.num_hidden_layers
        if P:
            self.embed_tokens_per_layer = Embedding(config.vocab_size_per_layer_input, L * P)
            self.per_layer_model_projection = Linear(D, L * P)
            self.per_layer_projection_norm = RMSNorm(P, config.rms_norm_eps)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Scaled token embeddings, [..., D]. The scale is rounded to the weights' dtype, as Gemma was trained."""
        x = self.embed_tokens(token_ids)
        return x * _rounded(math.sqrt(self.config.hidden_size), x.dtype)

    def per_layer_inputs(self, token_ids_BT: Tensor, embeds_BTD: Tensor) -> Tensor | None:
        """Per-layer embeddings (PLE), [L, B, T, P]: the token's own, mixed with a projection of its embedding."""
        P = self.config.hidden_size_per_layer_input
        if not P:
            return None
        projected = self.per_layer_model_projection(embeds_BTD) * self.config.hidden_size**-0.5
        projected = self.per_layer_projection_norm(projected.unflatten(-1, (-1, P)))
        own = self.embed_tokens_per_layer(token_ids_BT)
        own = (own * _rounded(math.sqrt(P), own.dtype)).unflatten(-1, (-1, P))
        return ((projected + own) * 2**-0.5).permute(2, 0, 1, 3)

    def forward(
        self, token_ids_BT: Tensor, rope: Mapping[LayerType, Rope], kv: KeyValues, store_only: bool = False
    ) -> Tensor:
        """Returns hidden states after the final norm, [B, T, D]. `rope` holds this call's positions.

        With `store_only` the rows end at the last layer that stores keys and values, because nobody wants their states:
        what is returned then is of no use.
        """
        config = self.config
        x = self.embed(token_ids_BT)
        per_layer = self.per_layer_inputs(token_ids_BT, x)
        count = config.first_kv_shared_layer if store_only else len(self.layers)
        for i, layer in enumerate(self.layers[:count]):
            x = layer(x, rope[config.layer_types[i]], kv, None if per_layer is None else per_layer[i])
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Soft-capped logits [..., V] of hidden states after the final norm."""
        return ops.softcap(self.scores(hidden), self.config.final_logit_softcapping)

    def scores(self, hidden: Tensor) -> Tensor:
        """Returns the logits [..., V] before they are soft-capped."""
        return self.head.product(hidden)

    def forward_sequence(self, token_ids_BT: Tensor) -> SequenceOutput:
        """Whole sequences at once, without a cache: the slow, obvious reference of decoding and training."""
        T = token_ids_BT.shape[1]
        positions = torch.arange(T, device=token_ids_BT.device)
        kv = SequenceKeyValues(self.config, positions)
        hidden = self(token_ids_BT, rope_for(self.config, positions, self.embed_tokens.dtype), kv)
        return SequenceOutput(hidden, kv.stored)

    def quantise_(self, types: WeightTypes) -> None:
        """Quantise the parts that `types` names. The model can not be trained after.

        Raises QuantisationError where a part is quantised otherwise.
        """
        self.weight_types = merge(self.weight_types, types.of_target())
        tables = [matrix for matrix in matrices(self) if isinstance(matrix, Embedding)]
        quantise_matrices([*tables, self.lm_head], types.embeddings)
        quantise_matrices(self.layers.modules(), types.target)
        if self.config.hidden_size_per_layer_input:
            quantise_matrices([self.per_layer_model_projection], types.target)

    def dequantise_(self) -> None:
        """Make what is quantised dense again, in the dtype of the rest. Whole rows of training then cost what they do
        with a dense target, and are what decoding computes but for how the native operators round activations."""
        for matrix in matrices(self):
            matrix.dequantise_()
        self.weight_types = WeightTypes()

    def checkpoint_tensors(self) -> dict[str, Weight]:
        tensors = super().checkpoint_tensors()
        if self.config.hidden_size_per_layer_input:
            tensors["model.embed_tokens_per_layer.weight"] = self.embed_tokens_per_layer.stored
            tensors["model.per_layer_model_projection.weight"] = self.per_layer_model_projection.stored
            tensors["model.per_layer_projection_norm.weight"] = self.per_layer_projection_norm.stored
        return tensors


@dataclass
class SequenceKeyValues:
    """Keys and values of whole sequences: every row sees itself and the rows before it, within its layer's window."""

    config: TextConfig
    positions_T: Tensor
    stored: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    masks: dict[LayerType, Tensor] = field(default_factory=dict)

    def attend(self, layer: int, q_BTHd: Tensor, k_BTGd: Tensor | None, v_BTGd: Tensor | None) -> Tensor:
        if k_BTGd is not None and v_BTGd is not None:
            self.stored[layer] = k_BTGd, v_BTGd
        k, v = self.stored[self.config.kv_layer(layer)]
        mask = self._mask(self.config.layer_types[layer])
        return ops.masked_attention(q_BTHd, k.transpose(1, 2), v.transpose(1, 2), mask)

    def _mask(self, kind: LayerType) -> Tensor:
        if kind not in self.masks:
            window = None if kind == FULL else self.config.sliding_window
            self.masks[kind] = ops.visible_rows(self.positions_T, self.positions_T, window)
        return self.masks[kind]


def _rounded(value: float, dtype: torch.dtype) -> float:
    return torch.tensor(value, dtype=dtype).item()
