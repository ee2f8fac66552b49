"""Targets and drafters run by the native CPU operators, over the tensors of the reference modules.

A whole call (target), or a whole run of greedy drafts (drafter), is one piece of work for all threads. Keys, values,
rotary tables and activations are float32 whatever the weights are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from gemma_mtp.config import FULL, SLIDING, LayerType, TextConfig
from gemma_mtp.kv_cache import CommittedKeyValues, KVCache
from gemma_mtp.ops.native import Memory, module

if TYPE_CHECKING:
    from gemma_mtp.model.drafter import Drafter
    from gemma_mtp.model.layers import DecoderLayer, MoE
    from gemma_mtp.model.target import Target

Rope = Mapping[LayerType, tuple[Tensor, Tensor]]


class NativeTarget:
    """Runs a target's calls. The target's parameters must stay as they are while it lives."""

    def __init__(self, target: Target) -> None:
        native, config, memory = module(), target.config, Memory()
        stack = _stack_config(config)
        self._memory = memory
        self.hidden_size, self.vocab_size = config.hidden_size, config.vocab_size
        self.table = memory.matrix(target.embed_tokens.stored)
        self.embed_scale = _rounded(config.hidden_size**0.5, target.embed_tokens.weight.dtype)
        stack.table, stack.embed_scale = self.table, self.embed_scale
        stack.head = self.table if target.lm_head is None else memory.matrix(target.lm_head.stored)
        stack.softcap = config.final_logit_softcapping or 0.0
        if P := config.hidden_size_per_layer_input:
            stack.ple = P
            stack.ple_table = memory.matrix(target.embed_tokens_per_layer.stored)
            stack.ple_embed_scale = _rounded(P**0.5, target.embed_tokens_per_layer.weight.dtype)
            stack.ple_model_projection = memory.matrix(target.per_layer_model_projection.stored)
        ple_norm = memory.vector(target.per_layer_projection_norm.weight) if P else 0
        stack.set_norms(memory.vector(target.norm.weight), ple_norm)
        caches = {layer: i for i, layer in enumerate(range(config.first_kv_shared_layer))}
        layers = [
            _layer(memory, cast("DecoderLayer", layer), config, i, caches[config.kv_layer(i)])
            for i, layer in enumerate(target.layers)
        ]
        self._stack = native.Stack(stack, layers)

    def forward(self, token_ids_1T: Tensor, rope: Rope, cache: KVCache, last_only: bool) -> Tensor:
        """Hidden states after the final norm, float32 [1, T, D], or [1, 1, D] of the last row with `last_only`."""
        rows = token_ids_1T.shape[1]
        ids = token_ids_1T.contiguous()
        hidden = torch.empty(1, 1 if last_only else rows, self.hidden_size)
        handle = _handle(cache, rope)
        self._stack.forward(ids.data_ptr(), handle, rows, cache.length, last_only, hidden.data_ptr())
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Soft-capped logits, float32 [..., V]."""
        flat = hidden.reshape(-1, self.hidden_size).contiguous()
        out = torch.empty(flat.shape[0], self.vocab_size)
        self._stack.logits(flat.data_ptr(), flat.shape[0], out.data_ptr())
        return out.view(*hidden.shape[:-1], self.vocab_size)

    def greedy(self, hidden_RD: Tensor) -> Tensor:
        """The arg max of each row's logits, the lowest id among equals, int64 [R]; no logits are stored."""
        flat = hidden_RD.contiguous()
        out = torch.empty(flat.shape[0], dtype=torch.int64)
        self._stack.greedy(flat.data_ptr(), flat.shape[0], out.data_ptr())
        return out


class NativeDrafter:
    """Runs a drafter's steps beside the target it drafts for."""

    def __init__(self, drafter: Drafter, target: NativeTarget) -> None:
        native, config, memory = module(), drafter.config, Memory()
        text = config.text
        self._memory, self._target = memory, target
        self.hidden_size, self.backbone = text.hidden_size, config.backbone_hidden_size
        stack = _stack_config(text)
        stack.set_norms(memory.vector(drafter.norm.weight), 0)
        stack.softcap = text.final_logit_softcapping or 0.0
        head, centroids = drafter.masked_embedding, memory.matrix(torch.zeros(1, text.hidden_size))
        table, self._ordering = drafter.head_table, torch.zeros(0, dtype=torch.int64)
        clusters, top_k = 0, 0
        if head is not None:
            clusters, top_k = config.num_centroids, head.top_k
            centroids = memory.matrix(head.centroids.stored)
            self._ordering = head.token_ordering.contiguous()
            table = table[self._ordering]  # cluster by cluster, so that a cluster is one block
        stack.head = memory.matrix(table)
        layers = [_layer(memory, cast("DecoderLayer", layer), text, i, i) for i, layer in enumerate(drafter.layers)]
        self._stack = native.DraftStack(
            stack, layers, memory.matrix(drafter.pre_projection.stored), memory.matrix(drafter.post_projection.stored),
            self.backbone, target.table, target.embed_scale, clusters, top_k, centroids, self._ordering.data_ptr(),
        )  # fmt: skip
        self.candidate_count: int = self._stack.candidates()

    def step(self, inputs_2D: Tensor, rope: Rope, kv: CommittedKeyValues) -> tuple[Tensor, Tensor]:
        """One step from concat(embedding, hidden): the state for the head [H], the projected state [D]."""
        inputs = inputs_2D.contiguous()
        state, projected = torch.empty(self.hidden_size), torch.empty(self.backbone)
        handle = _drafter_handle(kv, rope)
        self._stack.step(inputs.data_ptr(), handle, kv.cache.length, state.data_ptr(), projected.data_ptr())
        return state, projected

    def candidates(self, state_H: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits [C] to choose from, and their token ids [C], or None where every token is a candidate."""
        logits = torch.empty(self.candidate_count)
        ids = torch.empty(self.candidate_count if self._ordering.numel() else 0, dtype=torch.int64)
        self._stack.score(state_H.contiguous().data_ptr(), logits.data_ptr(), ids.data_ptr())
        return logits, ids if self._ordering.numel() else None

    def greedy(
        self, token: int, hidden_D: Tensor, rope: Rope, kv: CommittedKeyValues, count: int,
        least: Sequence[float] = (), bias: float = 0.0, slope: float = 1.0,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Greedy drafts in one call, int64 [made], and how sure the drafter was of each, float32 [made].

        `count` of them, or fewer where `least` has numbers (`decoding/early_stop.py`); without, confidences are 0.
        """
        out, confidences = torch.empty(count, dtype=torch.int64), torch.empty(count)
        hidden = hidden_D.contiguous()
        handle = _drafter_handle(kv, rope)
        made = self._stack.draft(
            token, hidden.data_ptr(), handle, kv.cache.length, count, least, bias, slope,
            out.data_ptr(), confidences.data_ptr(),
        )  # fmt: skip
        return out[:made], confidences[:made]


def _stack_config(text: TextConfig) -> Any:
    stack = module().Config()
    stack.hidden, stack.vocab, stack.window = text.hidden_size, text.vocab_size, text.sliding_window
    stack.eps, stack.first_shared = text.rms_norm_eps, text.first_kv_shared_layer
    return stack


def _layer(memory: Memory, layer: DecoderLayer, config: TextConfig, index: int, cache: int) -> Any:
    attention, mlp, out = layer.self_attn, layer.mlp, module().Layer()
    out.sliding, out.key_is_value = config.is_sliding(index), attention.key_is_value
    out.heads, out.kv_heads, out.groups = attention.heads, attention.kv_heads, config.layer_kv_heads(index)
    out.head_dim, out.cache, out.scalar = attention.head_dim, cache, layer.layer_scalar.item()
    out.qkv, out.o = memory.matrix(attention.qkv_proj.stored), memory.matrix(attention.o_proj.stored)
    out.gate_up, out.down = memory.matrix(mlp.gate_up_proj.stored), memory.matrix(mlp.down_proj.stored)
    k_norm = None if attention.k_norm is None else attention.k_norm.weight
    ple_norm = None
    if layer.ple is not None:
        out.ple_gate = memory.matrix(layer.ple.per_layer_input_gate.stored)
        out.ple_projection = memory.matrix(layer.ple.per_layer_projection.stored)
        ple_norm = layer.ple.post_per_layer_input_norm.weight
    norms = (attention.q_norm.weight, k_norm, layer.input_layernorm.weight, layer.post_attention_layernorm.weight,
             layer.pre_feedforward_layernorm.weight, layer.post_feedforward_layernorm.weight, ple_norm)  # fmt: skip
    out.set_norms(*map(memory.vector, norms))
    if layer.moe is not None:
        out.moe = _moe(memory, layer.moe)
    return out


def _moe(memory: Memory, moe: MoE) -> Any:
    out, experts = module().MoE(), moe.experts
    out.experts, out.top_k, out.width = experts.experts, moe.router.top_k, experts.down_proj.stored.shape[2]
    out.router = memory.matrix(moe.router.proj.stored)
    out.gate_up, out.down = memory.matrix(experts.gate_up_proj.stored), memory.matrix(experts.down_proj.stored)
    vectors = (moe.router.scale, moe.router.per_expert_scale, moe.post_feedforward_layernorm_1.weight,
               moe.pre_feedforward_layernorm_2.weight, moe.post_feedforward_layernorm_2.weight)  # fmt: skip
    out.set_vectors(*map(memory.vector, vectors))
    return out


@dataclass
class Handle:
    """Addresses of a cache's buffers, in the order of the layers that own them."""

    caches: Any
    sliding: Sequence[int]
    origin: int = 0

    def at(self, origin: int, rope: Rope) -> Any:
        if origin != self.origin:
            for index in self.sliding:
                self.caches.set_origin(index, origin)
            self.origin = origin
        sliding, full = (rope.get(kind, (None, None)) for kind in (SLIDING, FULL))
        addresses = [0 if table is None else table.data_ptr() for table in (*sliding, *full)]
        self.caches.set_rope(*addresses)
        return self.caches


def _new_handle(cache: KVCache, layers: Sequence[int]) -> Handle:
    caches = module().Caches()
    for layer in layers:
        rows = cache.layers[layer]
        assert rows.keys.dtype == torch.float32
        caches.add(rows.keys.data_ptr(), rows.values.data_ptr(), rows.keys.shape[2])
    return Handle(caches, [i for i, layer in enumerate(layers) if cache.config.is_sliding(layer)])


def _handle(cache: KVCache, rope: Rope) -> Any:
    """The cache's own handle, made at its first call."""
    if cache.handle is None:
        cache.handle = _new_handle(cache, list(cache.layers))
    return cache.handle.at(cache.sliding_start, rope)


def _drafter_handle(kv: CommittedKeyValues, rope: Rope) -> Any:
    """The donor layers' buffers in the order of the drafter's layers, kept with the cache between rounds."""
    cache = kv.cache
    if cache.donor_handle is None:
        cache.donor_handle = _new_handle(cache, [cache.config.donor_layers[kind] for kind in kv.layer_types])
    return cache.donor_handle.at(cache.sliding_start, rope)


def _rounded(value: float, dtype: torch.dtype) -> float:
    return torch.tensor(value, dtype=dtype).item()
