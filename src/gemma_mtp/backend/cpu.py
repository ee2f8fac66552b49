"""The native CPU operators as a backend, over the tensors of the models.

A whole call (target), or a whole run of drafts (drafter), is one piece of work for all threads, over the rows of
one or several sequences: a row's result does not depend on the rows beside it. Keys, values, rotary tables and
activations are float32 whatever the weights are.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from gemma_mtp.backend.base import DraftedTokens, DraftRows, DraftStep, Rows
from gemma_mtp.backend.native import Memory, module
from gemma_mtp.backend.processor import processor
from gemma_mtp.config import FULL, SLIDING, LayerType, TextConfig
from gemma_mtp.decoding.early_stop import StopRule
from gemma_mtp.decoding.sampling import ChoiceKind
from gemma_mtp.kv.pool import KVCache, KVPool
from gemma_mtp.model.drafter import Drafter
from gemma_mtp.model.layers import DecoderLayer, MoE, Rope, rope_for
from gemma_mtp.model.target import Target

#: prompt rows of one call, at most: enough to use the cores, few enough that activations stay in the caches
CHUNK_ROWS = 128


class CpuBackend:
    """Runs a pair by the native operators. The models' weights must stay as they are while it lives."""

    device = torch.device("cpu")
    kv_dtype = torch.float32
    chunk_rows = CHUNK_ROWS
    watches_drafts = True
    chooses: frozenset[ChoiceKind] = frozenset({"argmax", "drawn"})

    def __init__(self, target: Target, drafter: Drafter | None = None, stack: TargetStack | None = None) -> None:
        """`stack`: the target's, where there is one already."""
        self.target, self.drafter = target, drafter
        self._stack = stack or TargetStack(target)
        self._drafts = None if drafter is None else DrafterStack(drafter, self._stack)
        self._rope: Mapping[LayerType, Rope] = {}
        self._rope_rows = 0

    @property
    def identity(self) -> Mapping[str, str | int]:
        return {
            "processor": processor(self.device), "operators": f"native {module().isa()}", "threads": module().threads(),
        }  # fmt: skip

    def with_drafter(self, drafter: Drafter | None) -> CpuBackend:
        return CpuBackend(self.target, drafter, self._stack)

    def make_pool(self, counts: Mapping[LayerType, int], slots: int) -> KVPool:
        return KVPool(self.target.config, counts, slots, self.kv_dtype, self.device)

    def forward(self, calls: Sequence[Rows]) -> Tensor:
        token_ids, views, rows, lengths, keep = array("q"), [], [], [], []
        for call in calls:
            table = call.cache.table
            token_ids.extend(call.token_ids)
            views.append(self._view(call.cache))
            rows.append(table.rows)
            lengths.append(table.length)
            keep.append(call.keep)
        pool = _pool([call.cache for call in calls])
        return self._stack.forward(token_ids, _layers(pool), views, rows, keep, lengths)

    def keep_states(self, caches: Sequence[KVCache], hidden_RD: Tensor, rows: Sequence[int]) -> None:
        states, row_bytes = caches[0].pool.states, 4 * hidden_RD.shape[1]
        begin, source = states.data_ptr(), hidden_RD.data_ptr()
        for cache, row in zip(caches, rows, strict=True):
            ctypes.memmove(begin + cache.slot * row_bytes, source + row * row_bytes, row_bytes)

    def logits(self, hidden_RD: Tensor) -> Tensor:
        return self._stack.logits(hidden_RD)

    def choose(
        self, hidden_RD: Tensor, rows: Sequence[int], temperatures: Sequence[float], keys: Sequence[int]
    ) -> list[int]:
        return self._stack.choose(hidden_RD, rows, temperatures, keys)

    def draft(self, calls: Sequence[DraftRows]) -> list[DraftedTokens]:
        assert self._drafts is not None
        caches = [call.cache for call in calls]
        states, row_bytes = caches[0].pool.states, 4 * self._stack.hidden_size
        begin = states.data_ptr()
        return self._drafts.draft(calls, [begin + cache.slot * row_bytes for cache in caches], *self._places(caches))

    def draft_step(self, caches: Sequence[KVCache], token_ids_R: Tensor, hidden_RD: Tensor) -> DraftStep:
        assert self._drafts is not None
        inputs_R2D = torch.cat((self.target.embed(token_ids_R).float(), hidden_RD), -1)
        states_RH, projected_RD = self._drafts.step(inputs_R2D, *self._places(caches))
        return DraftStep(*self._drafts.candidates(states_RH), projected_RD)

    def _places(self, caches: Sequence[KVCache]) -> tuple[Any, list[Any], list[int]]:
        """Returns the donor layers in the order of the drafter's layers, and where each sequence is in them."""
        assert self.drafter is not None
        pool = _pool(caches)
        layers = [pool.config.donor_layers[kind] for kind in self.drafter.config.text.layer_types]
        views = [self._view(cache) for cache in caches]
        return _layers(pool, layers), views, [cache.table.length for cache in caches]

    def _view(self, cache: KVCache) -> Any:
        """Returns the addresses of a sequence's block tables and rotary tables, made at its first call."""
        if cache.handle is None:
            rope = self._rope_for(cache.table.max_length)
            sliding, full = (rope.get(kind, (None, None)) for kind in (SLIDING, FULL))
            view = module().View(
                *(cache.table.tables[kind].buffer_info()[0] for kind in (SLIDING, FULL)),
                *(0 if table is None else table.data_ptr() for table in (*sliding, *full)),
            )
            cache.handle = view, rope  # which keeps its tables, even when longer ones are made
        return cache.handle[0]

    def _rope_for(self, rows: int) -> Mapping[LayerType, Rope]:
        """Returns rotary tables of so many positions and more."""
        if rows > self._rope_rows:
            self._rope_rows = max(rows, min(2 * rows, self.target.config.max_position_embeddings))
            self._rope = rope_for(self.target.config, torch.arange(self._rope_rows), self.kv_dtype)
        return self._rope


class TargetStack:
    """A target as the native module runs it."""

    def __init__(self, target: Target) -> None:
        native, config, memory = module(), target.config, Memory()
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
        ple_norm = memory.vector(target.per_layer_projection_norm.weight) if P else 0
        stack.set_norms(memory.vector(target.norm.weight), ple_norm)
        caches = {layer: i for i, layer in enumerate(range(config.first_kv_shared_layer))}
        layers = [
            _layer(memory, cast(DecoderLayer, layer), config, i, caches[config.kv_layer(i)])
            for i, layer in enumerate(target.layers)
        ]
        self._stack = native.Stack(stack, layers)

    def forward(
        self, token_ids: array[int], layers: Any, views: list[Any], rows: list[int], keep: list[int], lengths: list[int]
    ) -> Tensor:
        """Returns hidden states after the final norm, float32 [sum of keep, D]."""
        hidden = torch.empty(sum(keep), self.hidden_size)
        self._stack.forward(token_ids.buffer_info()[0], layers, views, rows, keep, lengths, hidden.data_ptr())
        return hidden

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """Returns soft-capped logits, float32 [R, V]."""
        hidden_RD = hidden_RD.contiguous()
        out = torch.empty(len(hidden_RD), self.vocab_size)
        self._stack.logits(hidden_RD.data_ptr(), len(hidden_RD), out.data_ptr())
        return out

    def choose(
        self, hidden_RD: Tensor, rows: Sequence[int], temperatures: Sequence[float], keys: Sequence[int]
    ) -> list[int]:
        """Returns the tokens of these rows of `hidden_RD`, float32 and contiguous. No logits are stored."""
        tokens: list[int] = self._stack.choose(hidden_RD.data_ptr(), rows, temperatures, keys)
        return tokens


class DrafterStack:
    """A drafter as the native module runs it, beside the target that it drafts for."""

    def __init__(self, drafter: Drafter, target: TargetStack) -> None:
        native, config, memory = module(), drafter.config, Memory()
        text = config.text
        self._memory, self._target = memory, target
        self.hidden_size, self.backbone = text.hidden_size, config.backbone_hidden_size
        stack = _stack_config(text)
        stack.set_norms(memory.vector(drafter.norm.weight), 0)
        stack.softcap = text.final_logit_softcapping or 0.0
        head, centroids = drafter.masked_embedding, memory.matrix(torch.zeros(1, text.hidden_size))
        clusters, top_k, self._ordering = 0, 0, torch.zeros(0, dtype=torch.int64)
        if head is None:
            stack.head = memory.multiplied(drafter.head)
        else:
            clusters, top_k = config.num_centroids, head.top_k
            centroids = memory.matrix(head.centroids.stored)
            self._ordering = head.token_ordering.contiguous()
            stack.head = memory.matrix(drafter.head_table[self._ordering])  # cluster by cluster: each is one block
        layers = [_layer(memory, cast(DecoderLayer, layer), text, i, i) for i, layer in enumerate(drafter.layers)]
        self._stack = native.DraftStack(
            stack, layers, memory.multiplied(drafter.pre_projection), memory.multiplied(drafter.post_projection),
            self.backbone, target.table, target.embed_scale, clusters, top_k, centroids, self._ordering.data_ptr(),
        )  # fmt: skip
        self.candidate_count: int = self._stack.candidates()

    def step(self, inputs_R2D: Tensor, layers: Any, views: list[Any], lengths: list[int]) -> tuple[Tensor, Tensor]:
        """Run one step from concat(embedding, hidden), float32. Returns states for the head [R, H] and projected states
        [R, D]."""
        inputs = inputs_R2D.contiguous()
        state, projected = torch.empty(len(inputs), self.hidden_size), torch.empty(len(inputs), self.backbone)
        self._stack.step(inputs.data_ptr(), layers, views, lengths, state.data_ptr(), projected.data_ptr())
        return state, projected

    def candidates(self, state_RH: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits [R, C] to choose from, and their token ids [R, C], or None where every token is a candidate."""
        rows = len(state_RH)
        logits = torch.empty(rows, self.candidate_count)
        ids = torch.empty(rows if self._ordering.numel() else 0, self.candidate_count, dtype=torch.int64)
        self._stack.score(state_RH.contiguous().data_ptr(), rows, logits.data_ptr(), ids.data_ptr())
        return logits, ids if self._ordering.numel() else None

    def draft(
        self, calls: Sequence[DraftRows], states: list[int], layers: Any, views: list[Any], lengths: list[int]
    ) -> list[DraftedTokens]:
        """Returns the drafts of all sequences, made in one call. `states`: addresses of the states to start from."""
        counts = [call.most for call in calls]
        most, rows = max(counts), len(calls)
        out, made = array("q", bytes(8 * rows * most)), array("q", bytes(8 * rows))
        confidences = array("f", bytes(4 * rows * most))
        self._stack.draft(
            [call.last_token for call in calls], states, layers, views, lengths, counts,
            [_stop_rule(call.stop) for call in calls], [call.temperature for call in calls for _ in range(most)],
            [key for call in calls for key in (*call.keys, *[0] * (most - len(call.keys)))],
            *(place.buffer_info()[0] for place in (out, confidences, made)),
        )  # fmt: skip
        drafted = []
        for begin, count, call in zip(range(0, rows * most, most), made, calls, strict=True):
            sure = [] if call.stop is None else confidences[begin : begin + count].tolist()
            drafted.append(DraftedTokens(out[begin : begin + count].tolist(), sure))
        return drafted


def _stop_rule(stop: StopRule | None) -> Any:
    """Returns the native form of a rule; one without numbers drafts all that are asked for."""
    return module().StopRule((), 0.0, 1.0) if stop is None else module().StopRule(stop.least, stop.bias, stop.slope)


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
    out.qkv, out.o = memory.multiplied(attention.qkv_proj), memory.multiplied(attention.o_proj)
    out.gate_up, out.down = memory.multiplied(mlp.gate_up_proj), memory.multiplied(mlp.down_proj)
    k_norm = None if attention.k_norm is None else attention.k_norm.weight
    ple_norm = None
    if layer.ple is not None:
        out.ple_gate = memory.multiplied(layer.ple.per_layer_input_gate)
        out.ple_projection = memory.multiplied(layer.ple.per_layer_projection)
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


def _pool(caches: Sequence[KVCache]) -> KVPool:
    """Returns the pool that all of them are of."""
    pool = caches[0].pool
    assert all(cache.pool is pool for cache in caches), "sequences of one call share a pool"
    return pool


def _layers(pool: KVPool, layers: Sequence[int] | None = None) -> Any:
    """Addresses of the pool's layers, of all or of some in their order; made once."""
    key = tuple(pool.layers if layers is None else layers)
    if key not in pool.handles:
        caches = module().Caches()
        for layer in key:
            rows = pool.layers[layer]
            assert rows.keys.dtype == torch.float32
            caches.add(rows.keys.data_ptr(), rows.values.data_ptr(), rows.keys.shape[1])
        pool.handles[key] = caches
    return pool.handles[key]


def _rounded(value: float, dtype: torch.dtype) -> float:
    return torch.tensor(value, dtype=dtype).item()
