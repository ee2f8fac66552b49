"""Targets and drafters run by the native CPU operators, over the tensors of the reference modules.

A whole call (target), or a whole run of drafts (drafter), is one piece of work for all threads, over the rows of
one or several sequences: a row's result does not depend on the rows beside it. Keys, values, rotary tables and
activations are float32 whatever the weights are.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor

from gemma_mtp.config import FULL, SLIDING, LayerType, TextConfig
from gemma_mtp.kv_cache import KVCache, KVPool
from gemma_mtp.ops.native import Memory, floats, floats_in, floats_of_row, int32s_in, int64s, int64s_in

if TYPE_CHECKING:
    from gemma_mtp import _native
    from gemma_mtp.model.drafter import Drafter
    from gemma_mtp.model.layers import DecoderLayer, MoE
    from gemma_mtp.model.target import Target

#: least, bias and slope of `decoding.early_stop.StopRule`
StopRule = tuple[Sequence[float], float, float]


class Placed(Protocol):
    """A sequence: its cache, and rotary tables of all its positions, from 0 on."""

    cache: KVCache
    rope: Mapping[LayerType, tuple[Tensor, Tensor]]


class Begun(Placed, Protocol):
    """One to draft for: its last token, and which row of the target's states produced it; natively these are
    float32 and contiguous."""

    last_token: int
    states_RD: Tensor
    state: int


class NativeTarget:
    """Runs a target's calls. The target's parameters must stay as they are while it lives."""

    def __init__(self, target: Target) -> None:
        from gemma_mtp import _native

        config, memory = target.config, Memory()
        stack = _stack_config(config)
        self._memory = memory
        self.hidden_size, self.vocab_size = config.hidden_size, config.vocab_size
        tied = target.lm_head is None
        self.table = memory.multiplied(target.embed_tokens) if tied else memory.matrix(target.embed_tokens.stored)
        self.embed_scale = _rounded(config.hidden_size**0.5, target.embed_tokens.weight.dtype)
        stack.table, stack.embed_scale = self.table, self.embed_scale
        stack.head = self.table if target.lm_head is None else memory.multiplied(target.lm_head)
        stack.softcap = config.final_logit_softcapping or 0.0
        if P := config.hidden_size_per_layer_input:
            stack.ple = P
            stack.ple_table = memory.matrix(target.embed_tokens_per_layer.stored)
            stack.ple_embed_scale = _rounded(P**0.5, target.embed_tokens_per_layer.weight.dtype)
            stack.ple_model_projection = memory.multiplied(target.per_layer_model_projection)
            stack.ple_model_norm = memory.vector(target.per_layer_projection_norm.weight)
        stack.norm = memory.vector(target.norm.weight)
        caches = {layer: i for i, layer in enumerate(range(config.first_kv_shared_layer))}
        layers = [
            _layer(memory, cast("DecoderLayer", layer), config, i, caches[config.kv_layer(i)])
            for i, layer in enumerate(target.layers)
        ]
        self._stack = _native.Stack(stack, layers)

    def forward(self, token_ids: Sequence[int], sequences: Sequence[Placed], keep: Sequence[int]) -> Tensor:
        """Hidden states after the final norm, float32 [sum of keep, D]: of each sequence's rows the last `keep`.

        `token_ids`: the rows of the calls that the sequences' caches have begun, one after the other; the
        caches are of one pool.
        """
        ids, hidden = array("q", token_ids), torch.empty(sum(keep), self.hidden_size)
        views, rows, lengths = [], [], []
        for sequence in sequences:
            cache = sequence.cache
            views.append(_view(sequence))
            rows.append(cache.rows)
            lengths.append(cache.length)
        layers = _layers(_pool(sequences))
        self._stack.forward(int64s_in(ids), layers, views, rows, keep, lengths, floats(hidden))
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Soft-capped logits, float32 [..., V]."""
        flat = hidden.reshape(-1, self.hidden_size).contiguous()
        out = torch.empty(flat.shape[0], self.vocab_size)
        self._stack.logits(floats(flat), flat.shape[0], floats(out))
        return out.view(*hidden.shape[:-1], self.vocab_size)

    def choose(
        self, hidden_RD: Tensor, rows: Sequence[int], temperatures: Sequence[float], keys: Sequence[int]
    ) -> list[int]:
        """The token of each of these rows of `hidden_RD`, float32 and contiguous: the lowest id among equals. No logits
        are stored.

        At temperature 0 the arg max of its logits; else of logits / temperature and Gumbel noise of that key
        (`decoding.noise.row_key`).
        """
        return self._stack.choose(floats(hidden_RD), rows, temperatures, keys)


class NativeDrafter:
    """Runs a drafter's steps beside the target it drafts for."""

    def __init__(self, drafter: Drafter, target: NativeTarget) -> None:
        from gemma_mtp import _native

        config, memory = drafter.config, Memory()
        text = config.text
        self._memory, self._target = memory, target
        self.hidden_size, self.backbone = text.hidden_size, config.backbone_hidden_size
        stack = _stack_config(text)
        stack.norm = memory.vector(drafter.norm.weight)
        stack.softcap = text.final_logit_softcapping or 0.0
        draft, head = _native.DraftConfig(), drafter.masked_embedding
        self._ordering = torch.zeros(0, dtype=torch.int64)
        if head is None:
            stack.head = memory.multiplied(drafter.head)
        else:
            self._ordering = head.token_ordering.contiguous()
            centroids = memory.matrix(head.centroids.stored)
            draft.centroids = _native.Centroids(config.num_centroids, head.top_k, centroids, int64s(self._ordering))
            stack.head = memory.matrix(drafter.head_table[self._ordering])  # cluster by cluster: each is one block
        layers = [_layer(memory, cast("DecoderLayer", layer), text, i, i) for i, layer in enumerate(drafter.layers)]
        self._layer_types = text.layer_types
        draft.pre_projection = memory.multiplied(drafter.pre_projection)
        draft.post_projection = memory.multiplied(drafter.post_projection)
        draft.target_table, draft.target_scale, draft.backbone = target.table, target.embed_scale, self.backbone
        self._stack = _native.DraftStack(stack, layers, draft)
        self._stop_rule = _native.StopRule
        self.candidate_count = self._stack.candidates()

    def step(self, inputs_R2D: Tensor, sequences: Sequence[Placed]) -> tuple[Tensor, Tensor]:
        """One step of each sequence from concat(embedding, hidden), float32: states for the head [R, H] and projected
        states [R, D]."""
        inputs = inputs_R2D.contiguous()
        state, projected = torch.empty(len(inputs), self.hidden_size), torch.empty(len(inputs), self.backbone)
        self._stack.step(floats(inputs), *self._places(sequences), floats(state), floats(projected))
        return state, projected

    def candidates(self, state_RH: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits [R, C] to choose from, and their token ids [R, C], or None where every token is a candidate."""
        rows = len(state_RH)
        logits = torch.empty(rows, self.candidate_count)
        ids = torch.empty(rows if self._ordering.numel() else 0, self.candidate_count, dtype=torch.int64)
        self._stack.score(floats(state_RH.contiguous()), rows, floats(logits), int64s(ids))
        return logits, ids if self._ordering.numel() else None

    def draft(
        self, sequences: Sequence[Begun], counts: Sequence[int], stops: Sequence[StopRule],
        temperatures: Sequence[float], keys: Sequence[Sequence[int]],
    ) -> tuple[list[list[int]], list[list[float]], list[int]]:  # fmt: skip
        """Drafts of all sequences in one call, chosen as `NativeTarget.choose` does, draft i by `keys[sequence][i]`.

        `counts` of them, or fewer where its rule says so; a rule without numbers is none. Returns of each sequence its
        tokens and how sure the drafter was of each (0 without a rule), as many as the highest count, and how many were
        made.
        """
        most, rows = max(counts), len(sequences)
        out, made = array("q", bytes(8 * rows * most)), array("q", bytes(8 * rows))
        confidences = array("f", bytes(4 * rows * most))
        self._stack.draft(
            [sequence.last_token for sequence in sequences],
            [floats_of_row(sequence.states_RD, sequence.state) for sequence in sequences],
            *self._places(sequences), counts, [self._stop_rule(*stop) for stop in stops],
            [temperature for temperature in temperatures for _ in range(most)],
            [key for row in keys for key in (*row, *[0] * (most - len(row)))],
            int64s_in(out), floats_in(confidences), int64s_in(made),
        )  # fmt: skip
        starts = range(0, rows * most, most)
        return ([out[i : i + most].tolist() for i in starts], [confidences[i : i + most].tolist() for i in starts],
                made.tolist())  # fmt: skip

    def _places(self, sequences: Sequence[Placed]) -> tuple[_native.Caches, list[_native.View], list[int]]:
        """The donor layers in the order of the drafter's layers, and where each sequence is in them."""
        pool = _pool(sequences)
        layers = [pool.config.donor_layers[kind] for kind in self._layer_types]
        views = [_view(sequence) for sequence in sequences]
        return _layers(pool, layers), views, [sequence.cache.length for sequence in sequences]


def _stack_config(text: TextConfig) -> _native.Config:
    from gemma_mtp import _native

    stack = _native.Config()
    stack.hidden, stack.vocab, stack.window = text.hidden_size, text.vocab_size, text.sliding_window
    stack.eps, stack.first_shared = text.rms_norm_eps, text.first_kv_shared_layer
    return stack


def _layer(memory: Memory, layer: DecoderLayer, config: TextConfig, index: int, cache: int) -> _native.Layer:
    from gemma_mtp import _native

    attention, mlp, out = layer.self_attn, layer.mlp, _native.Layer()
    out.kind = _native.LayerKind.SLIDING if config.is_sliding(index) else _native.LayerKind.FULL
    out.key_is_value = attention.key_is_value
    out.value_norm, out.score_scale = config.options.value_norm, config.options.score_scale
    out.heads, out.kv_heads, out.groups = attention.heads, attention.kv_heads, config.layer_kv_heads(index)
    out.head_dim, out.cache = attention.head_dim, cache
    if layer.layer_scalar is not None:
        out.scalar = layer.layer_scalar.item()
    out.qkv, out.o = memory.multiplied(attention.qkv_proj), memory.multiplied(attention.o_proj)
    out.gate_up, out.down = memory.multiplied(mlp.gate_up_proj), memory.multiplied(mlp.down_proj)
    if layer.ple is not None:
        out.ple_gate = memory.multiplied(layer.ple.per_layer_input_gate)
        out.ple_projection = memory.multiplied(layer.ple.per_layer_projection)
        out.ple_norm = memory.vector(layer.ple.post_per_layer_input_norm.weight)
    out.q_norm = memory.vector(attention.q_norm.weight)
    out.k_norm = memory.vector(None if attention.k_norm is None else attention.k_norm.weight)
    out.input_norm = memory.vector(layer.input_layernorm.weight)
    out.post_attention = memory.vector(layer.post_attention_layernorm.weight)
    out.pre_feedforward = memory.vector(layer.pre_feedforward_layernorm.weight)
    out.post_feedforward = memory.vector(layer.post_feedforward_layernorm.weight)
    if layer.moe is not None:
        out.moe = _moe(memory, layer.moe)
    return out


def _moe(memory: Memory, moe: MoE) -> _native.MoE:
    from gemma_mtp import _native

    out, experts = _native.MoE(), moe.experts
    out.experts, out.top_k, out.width = experts.experts, moe.router.top_k, experts.down_proj.stored.shape[2]
    out.router = memory.matrix(moe.router.proj.stored)
    out.gate_up, out.down = memory.matrix(experts.gate_up_proj.stored), memory.matrix(experts.down_proj.stored)
    out.router_scale = memory.vector(moe.router.scale)
    out.expert_scale = memory.vector(moe.router.per_expert_scale)
    out.post_dense = memory.vector(moe.post_feedforward_layernorm_1.weight)
    out.pre_sparse = memory.vector(moe.pre_feedforward_layernorm_2.weight)
    out.post_sparse = memory.vector(moe.post_feedforward_layernorm_2.weight)
    return out


def _pool(sequences: Sequence[Placed]) -> KVPool:
    """The one that all of them are of."""
    pool = sequences[0].cache.pool
    assert all(sequence.cache.pool is pool for sequence in sequences), "sequences of one call share a pool"
    return pool


def _layers(pool: KVPool, layers: Sequence[int] | None = None) -> _native.Caches:
    """Addresses of the pool's layers, of all or of some in their order; made once."""
    key = tuple(pool.layers if layers is None else layers)
    if key not in pool.handles:
        from gemma_mtp._native import Caches

        caches = Caches()
        for layer in key:
            rows = pool.layers[layer]
            caches.add(floats(rows.keys), floats(rows.values), rows.keys.shape[1])
        pool.handles[key] = caches
    handle: _native.Caches = pool.handles[key]
    return handle


def _view(sequence: Placed) -> _native.View:
    """Addresses of a sequence's block tables and rotary tables, made at its first call."""
    cache = sequence.cache
    if cache.handle is None:
        from gemma_mtp._native import View

        sliding, full = (sequence.rope.get(kind, (None, None)) for kind in (SLIDING, FULL))
        cache.handle = View(
            int32s_in(cache.tables[SLIDING]), int32s_in(cache.tables[FULL]),
            floats(sliding[0]), floats(sliding[1]), floats(full[0]), floats(full[1]),
        )  # fmt: skip
    handle: _native.View = cache.handle
    return handle


def _rounded(value: float, dtype: torch.dtype) -> float:
    return torch.tensor(value, dtype=dtype).item()
