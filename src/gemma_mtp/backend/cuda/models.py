"""A target and a drafter on the device, as calls over rows of many sequences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from gemma_mtp.backend.cuda import choice
from gemma_mtp.backend.cuda.batch import Batch
from gemma_mtp.backend.cuda.centroids import DeviceCentroids, candidates
from gemma_mtp.backend.cuda.draws import Draws
from gemma_mtp.backend.cuda.launch import Launch
from gemma_mtp.backend.cuda.layer import device_layer, run_layer, vector
from gemma_mtp.backend.cuda.linear import linear
from gemma_mtp.backend.cuda.rows import added, embed, norm, per_layer_inputs
from gemma_mtp.backend.cuda.weights import device_weight, of_module, reorder_
from gemma_mtp.config import LayerType, TextConfig
from gemma_mtp.kv.pool import KVPool
from gemma_mtp.model.drafter import CentroidHead, Drafter
from gemma_mtp.model.layers import DecoderLayer
from gemma_mtp.model.target import Target
from gemma_mtp.ops import reference as ops
from gemma_mtp.sizes.card import rope_rows

#: cos and sin of the dimensions that turn, float32 [positions, rotated] each, by kind of layer
Ropes = Mapping[LayerType, tuple[Tensor, Tensor]]
#: positions whose rotary tables are made at once
ROPE_PIECE = 8192


def ropes_of(config: TextConfig, rows: int, device: torch.device) -> Ropes:
    """Returns rotary tables of so many positions."""
    tables = {}
    for layer, kind in enumerate(config.layer_types):
        if kind not in tables:
            rope, d = config.rope(kind), config.layer_head_dim(layer)
            rotated = int(rope.partial_rotary_factor * d // 2)
            pieces = []
            for begin in range(0, rows, ROPE_PIECE):
                positions = torch.arange(begin, min(begin + ROPE_PIECE, rows), device=device)
                cos, sin = ops.rope_tables(
                    positions, d, rope.rope_theta, rope.partial_rotary_factor, rope.factor, torch.float32
                )
                pieces.append((cos[:, :rotated].contiguous(), sin[:, d // 2 : d // 2 + rotated].contiguous()))
            all_cos, all_sin = zip(*pieces, strict=True)
            tables[kind] = torch.cat(all_cos), torch.cat(all_sin)
    return tables


class RopeTables:
    """Rotary tables of as many positions as were asked for so far. Those that were handed out stay as they are."""

    def __init__(self, config: TextConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self._rows = 0
        self._tables: Ropes = {}

    def reaching(self, rows: int) -> Ropes:
        """Returns tables of so many positions and more."""
        if rows > self._rows:
            self._rows = rope_rows(rows)
            self._tables = ropes_of(self.config, self._rows, self.device)
        return self._tables


class DeviceTarget:
    """A target's weights and its calls."""

    def __init__(self, target: Target) -> None:
        config = self.config = target.config
        self.table = of_module(target.embed_tokens)
        self.head = self.table if target.lm_head is None else of_module(target.lm_head)
        self.scale = _rounded(config.hidden_size**0.5)
        self.norm = vector(target.norm.weight)
        self.layers = [
            device_layer(cast(DecoderLayer, layer), config, i, config.kv_layer(i))
            for i, layer in enumerate(target.layers)
        ]
        self.has_ple = config.hidden_size_per_layer_input > 0
        if self.has_ple:
            self.ple_table = of_module(target.embed_tokens_per_layer)
            self.ple_projection = of_module(target.per_layer_model_projection)
            self.ple_scale = _rounded(config.hidden_size_per_layer_input**0.5)
            self.ple_norm = vector(target.per_layer_projection_norm.weight)

    def forward(self, launch: Launch, batch: Batch, pool: KVPool, ropes: Ropes) -> Tensor:
        """Returns hidden states of all rows after the final norm, bf16 [R, D]."""
        config, device = self.config, batch.token_ids_R.device
        raw = torch.empty(len(batch.token_ids_R), config.hidden_size, dtype=torch.bfloat16, device=device)
        residual = embed(launch, batch.token_ids_R, self.table, self.scale, raw)
        per_layer = self._per_layer(launch, batch.token_ids_R, raw) if self.has_ple else None
        x = norm(launch, residual, self.layers[0].input_norm, config.rms_norm_eps)
        following = [layer.input_norm for layer in self.layers[1:]] + [self.norm]
        for i, layer in enumerate(self.layers):
            x = run_layer(
                launch, layer, x, residual, batch, pool.layers[layer.kv], ropes[layer.kind],
                None if per_layer is None else per_layer[i], following[i],
            )  # fmt: skip
        return x

    def _per_layer(self, launch: Launch, token_ids_R: Tensor, raw_RD: Tensor) -> Tensor:
        config = self.config
        return per_layer_inputs(
            launch, token_ids_R, linear(launch, raw_RD, self.ple_projection), self.ple_table, self.ple_norm,
            self.ple_scale, config.hidden_size**-0.5, config.rms_norm_eps,
        )  # fmt: skip

    def logits(self, launch: Launch, hidden_RD: Tensor) -> Tensor:
        """Returns soft-capped logits, float32 [R, V]."""
        return choice.logits(launch, hidden_RD.contiguous(), self.head, self.config.final_logit_softcapping)

    def choose(self, launch: Launch, hidden_RD: Tensor, rows_N: Tensor, draws: Draws | None) -> Tensor:
        """Returns the token of each of these rows, int64 [N]."""
        return choice.choose(launch, hidden_RD, self.head, self.config.final_logit_softcapping, rows_N, draws)


class DeviceDrafter:
    """A drafter's weights and its steps, beside the target that it drafts for."""

    def __init__(self, drafter: Drafter, target: DeviceTarget) -> None:
        self.config, self.target = drafter.config, target
        text = drafter.config.text
        donors = target.config.donor_layers
        self.layers = [
            device_layer(cast(DecoderLayer, layer), text, i, donors[text.layer_types[i]])
            for i, layer in enumerate(drafter.layers)
        ]
        self.norm = vector(drafter.norm.weight)
        self.pre_projection, self.post_projection = (
            of_module(drafter.pre_projection),
            of_module(drafter.post_projection),
        )
        head = drafter.masked_embedding
        self.centroids = None if head is None else _centroids(drafter, head)
        self.head = of_module(drafter.head) if head is None else self.centroids.table  # type: ignore[union-attr]

    def step(
        self, launch: Launch, batch: Batch, pool: KVPool, hidden_RD: Tensor, ropes: Ropes
    ) -> tuple[Tensor, Tensor]:
        """Run one step from each row's token and the state behind it. Returns the state for the head, bf16 [R, H], and
        the projected state, bf16 [R, D]."""
        R, D = hidden_RD.shape
        inputs = torch.empty(R, 2 * D, dtype=torch.bfloat16, device=hidden_RD.device)
        embed(launch, batch.token_ids_R, self.target.table, self.target.scale, inputs)
        inputs[:, D:].copy_(hidden_RD)
        residual = added(launch, linear(launch, inputs, self.pre_projection))
        x = norm(launch, residual, self.layers[0].input_norm, self.config.text.rms_norm_eps)
        following = [layer.input_norm for layer in self.layers[1:]] + [self.norm]
        for layer, norm_D in zip(self.layers, following, strict=True):
            x = run_layer(launch, layer, x, residual, batch, pool.layers[layer.kv], ropes[layer.kind], None, norm_D)
        return x, added(launch, linear(launch, x, self.post_projection)).bfloat16()

    def candidates(self, launch: Launch, state_RH: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns logits to choose from, float32 [R, C], and their token ids, or None where every token is one."""
        if self.centroids is not None:
            return candidates(launch, state_RH, self.centroids)
        return choice.logits(launch, state_RH, self.head, None), None

    def choose(self, launch: Launch, state_RH: Tensor, draws: Draws | None) -> Tensor:
        """Returns each row's draft, int64 [R]."""
        if self.centroids is not None:
            logits, ids = candidates(launch, state_RH, self.centroids)
            return choice.best_of(launch, logits, ids, draws)
        rows = torch.arange(len(state_RH), dtype=torch.int32, device=state_RH.device)
        return choice.choose(launch, state_RH, self.head, None, rows, draws)


@dataclass(frozen=True)
class PairCalls:
    """The calls of a pair that a whole round is made of (`round.RoundModels`), for positions that `ropes` has."""

    launch: Launch
    target: DeviceTarget
    drafter: DeviceDrafter | None
    ropes: Ropes

    def run(self, batch: Batch, pool: KVPool) -> Tensor:
        return self.target.forward(self.launch, batch, pool, self.ropes)

    def choose(self, hidden_RD: Tensor, draws: Draws | None) -> Tensor:
        rows_R = torch.arange(len(hidden_RD), dtype=torch.int32, device=hidden_RD.device)
        return self.target.choose(self.launch, hidden_RD, rows_R, draws)

    def draft(self, batch: Batch, pool: KVPool, hidden_BD: Tensor) -> tuple[Tensor, Tensor]:
        assert self.drafter is not None
        return self.drafter.step(self.launch, batch, pool, hidden_BD, self.ropes)

    def choose_draft(self, state_BH: Tensor, draws: Draws | None) -> Tensor:
        assert self.drafter is not None
        return self.drafter.choose(self.launch, state_BH, draws)


def _centroids(drafter: Drafter, head: CentroidHead) -> DeviceCentroids:
    ordering = head.token_ordering.contiguous()
    reorder_(drafter.head)
    drafter.head.order_rows_(ordering)
    return DeviceCentroids(of_module(head.centroids), device_weight(drafter.head.lying), ordering, head.top_k)


def _rounded(value: float) -> float:
    """Gemma's scales are rounded to bf16, as it was trained."""
    return torch.tensor(value, dtype=torch.bfloat16).item()
