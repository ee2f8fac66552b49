"""The native CPU operators as a backend, over the tensors of the models.

A whole call (target), or a whole run of drafts (drafter), is one piece of work for all threads, over the rows of
one or several sequences: a row's result does not depend on the rows beside it. Keys, values, rotary tables and
activations are float32 whatever the weights are.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor

from gemma_mtp import _native
from gemma_mtp.backend.base import DraftedTokens, DraftRows, DraftStep, Rows
from gemma_mtp.backend.native import (
    Memory,
    floats,
    floats_in,
    int32s_in,
    int64s,
    int64s_in,
)
from gemma_mtp.backend.processor import processor
from gemma_mtp.config import FULL, SLIDING, LayerType, TextConfig
from gemma_mtp.decoding.early_stop import StopRule
from gemma_mtp.decoding.params import ChoiceKind, Filters
from gemma_mtp.freed_memory import return_freed_memory
from gemma_mtp.kv.pool import KVCache, KVPool
from gemma_mtp.model.drafter import Drafter
from gemma_mtp.model.layers import DecoderLayer, MoE, Rope, rope_for
from gemma_mtp.model.target import Target
from gemma_mtp.sizes.run import NATIVE_CHUNK_ROWS

if TYPE_CHECKING:
    from gemma_mtp._native import Floats


class CpuBackend:
    """Runs a pair by the native operators. The models' weights must stay as they are while it lives."""

    device = torch.device("cpu")
    kv_dtype = torch.float32
    chunk_rows = NATIVE_CHUNK_ROWS
    watches_drafts = True
    rounds = None
    chooses: frozenset[ChoiceKind] = frozenset({"argmax", "drawn"})

    def __init__(self, target: Target, drafter: Drafter | None = None, stack: TargetStack | None = None) -> None:
        """`stack`: the target's, where there is one already."""
        self.target, self.drafter = target, drafter
        self._stack = stack or TargetStack(target)
        self._drafts = None if drafter is None else DrafterStack(drafter, self._stack)
        self._rope: tuple[int, Mapping[LayerType, Rope]] = 0, {}  # how many positions, and their tables
        self._last: _States | None = None  # of the last call

    @property
    def identity(self) -> Mapping[str, str | int]:
        return {
            "processor": processor(self.device), "operators": f"native {_native.isa()}", "threads": _native.threads(),
        }  # fmt: skip

    def with_drafter(self, drafter: Drafter | None) -> CpuBackend:
        return CpuBackend(self.target, drafter, self._stack)

    def workspace_bytes(self, sequences: int, context: int) -> int:
        return 0

    def make_pool(self, counts: Mapping[LayerType, int], slots: int) -> KVPool:
        return KVPool(self.target.config, counts, slots, self.kv_dtype, self.device)

    def forward(self, calls: Sequence[Rows]) -> Tensor:
        caches, token_ids, keep = zip(*calls, strict=True)
        rows, tokens = [len(of_one) for of_one in token_ids], list(itertools.chain.from_iterable(token_ids))
        pool = caches[0].pool
        self._last = states = _states(pool, sum(keep))
        self._stack.forward(
            tokens, _layers(pool, tuple(pool.layers)), *self._places(caches), rows, keep, states.address
        )
        return states.hidden_RD

    def keep_states(self, caches: Sequence[KVCache], hidden_RD: Tensor, rows: Sequence[int]) -> None:
        begin, slots = _slots(caches[0].pool), [cache.slot for cache in caches]
        _native.copy_rows(self._address(hidden_RD), rows, begin, slots, self._stack.hidden_size)

    def logits(self, hidden_RD: Tensor) -> Tensor:
        return self._stack.logits(hidden_RD)

    def choose(
        self, hidden_RD: Tensor, rows: Sequence[int], temperatures: Sequence[float] = (), keys: Sequence[int] = (),
        filters: Sequence[Filters] = (),
    ) -> list[int]:  # fmt: skip
        assert not any(one.active for one in filters), "filtered choices are made elsewhere"
        return self._stack.choose(self._address(hidden_RD), rows, temperatures, keys)

    def draft(self, calls: Sequence[DraftRows]) -> list[DraftedTokens]:
        assert self._drafts is not None
        caches = [call.cache for call in calls]
        begin, row_bytes = _slots(caches[0].pool), 4 * self._stack.hidden_size
        states = [cast("Floats", begin + row_bytes * cache.slot) for cache in caches]
        return self._drafts.draft(calls, states, self._donors(caches), *self._places(caches))

    def draft_step(self, caches: Sequence[KVCache], token_ids_R: Tensor, hidden_RD: Tensor) -> DraftStep:
        assert self._drafts is not None
        inputs_R2D = torch.cat((self.target.embed(token_ids_R).float(), hidden_RD), -1)
        states_RH, projected_RD = self._drafts.step(inputs_R2D, self._donors(caches), *self._places(caches))
        return DraftStep(*self._drafts.candidates(states_RH), projected_RD)

    def _donors(self, caches: Sequence[KVCache]) -> _native.Caches:
        """Returns the donor layers in the order of the drafter's layers."""
        assert self.drafter is not None
        donors = caches[0].pool.config.donor_layers
        return _layers(caches[0].pool, tuple([donors[kind] for kind in self.drafter.config.text.layer_types]))

    def _address(self, hidden_RD: Tensor) -> Floats:
        """Returns the address of hidden states, which is known of the last call's."""
        last = self._last  # once: other threads may call with other pools
        return last.address if last is not None and last.hidden_RD is hidden_RD else floats(hidden_RD)

    def _places(self, caches: Sequence[KVCache]) -> tuple[list[_native.View], list[int]]:
        """Returns where each sequence lies in the pool, and how many rows it has."""
        pool = caches[0].pool
        assert all(cache.pool is pool for cache in caches), "sequences of one call share a pool"
        views = [(cache.handle or self._open(cache))[0] for cache in caches]
        return views, [cache.table.length for cache in caches]

    def _open(self, cache: KVCache) -> tuple[_native.View, Mapping[LayerType, Rope]]:
        """Keep the addresses of a sequence's block tables and rotary tables with it, from its first call on."""
        rope = self._rope_for(cache.table.max_length)
        sliding, full = (rope.get(kind, (None, None)) for kind in (SLIDING, FULL))
        tables = cache.table.tables
        view = _native.View(
            int32s_in(tables[SLIDING]), int32s_in(tables[FULL]),
            floats(sliding[0]), floats(sliding[1]), floats(full[0]), floats(full[1]),
        )  # fmt: skip
        cache.handle = view, rope  # which keeps its tables, even when longer ones are made
        return view, rope

    def _rope_for(self, rows: int) -> Mapping[LayerType, Rope]:
        """Returns rotary tables of so many positions and more."""
        known, tables = self._rope  # both at once: other threads may make longer ones
        if rows > known:
            known = max(rows, min(2 * rows, self.target.config.max_position_embeddings))
            tables = rope_for(self.target.config, torch.arange(known), self.kv_dtype)
            self._rope = known, tables
            return_freed_memory()
        return tables


class TargetStack:
    """A target as the native module runs it."""

    def __init__(self, target: Target) -> None:
        config, memory = target.config, Memory()
        stack = _stack_config(config)
        self._memory = memory
        self.hidden_size, self.vocab_size = config.hidden_size, config.vocab_size
        head = memory.multiplied(target.head)
        self.table = memory.matrix(target.embed_tokens.stored)  # the same where they are tied
        self.embed_scale = _rounded(config.hidden_size**0.5, target.embed_tokens.dtype)
        stack.table, stack.embed_scale = self.table, self.embed_scale
        stack.head = head
        stack.softcap = config.final_logit_softcapping or 0.0
        if P := config.hidden_size_per_layer_input:
            stack.ple = P
            stack.ple_table = memory.matrix(target.embed_tokens_per_layer.stored)
            stack.ple_embed_scale = _rounded(P**0.5, target.embed_tokens_per_layer.dtype)
            stack.ple_model_projection = memory.multiplied(target.per_layer_model_projection)
            stack.ple_model_norm = memory.vector(target.per_layer_projection_norm.weight)
        stack.norm = memory.vector(target.norm.weight)
        caches = {layer: i for i, layer in enumerate(range(config.first_kv_shared_layer))}
        layers = [
            _layer(memory, cast(DecoderLayer, layer), config, i, caches[config.kv_layer(i)])
            for i, layer in enumerate(target.layers)
        ]
        self._stack = _native.Stack(stack, layers)

    def forward(
        self, token_ids: list[int], layers: _native.Caches, views: list[_native.View], lengths: list[int],
        rows: list[int], keep: Sequence[int], out: Floats,
    ) -> None:  # fmt: skip
        """Write hidden states after the final norm, float32 [sum of keep, D]."""
        self._stack.forward(token_ids, layers, views, rows, keep, lengths, out)

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """Returns soft-capped logits, float32 [R, V]."""
        hidden_RD = hidden_RD.contiguous()
        out = torch.empty(len(hidden_RD), self.vocab_size)
        self._stack.logits(floats(hidden_RD), len(hidden_RD), floats(out))
        return out

    def choose(
        self, hidden: Floats, rows: Sequence[int], temperatures: Sequence[float], keys: Sequence[int]
    ) -> list[int]:
        """Returns the tokens of these rows of hidden states. No logits are stored."""
        return self._stack.choose(hidden, rows, temperatures, keys)


class DrafterStack:
    """A drafter as the native module runs it, beside the target that it drafts for."""

    def __init__(self, drafter: Drafter, target: TargetStack) -> None:
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
            centroids = memory.matrix(head.centroids.stored, head.centroids.activations)
            draft.centroids = _native.Centroids(config.num_centroids, head.top_k, centroids, int64s(self._ordering))
            stack.head = memory.ordered(drafter.head, self._ordering)  # cluster by cluster: each is one block
        layers = [_layer(memory, cast(DecoderLayer, layer), text, i, i) for i, layer in enumerate(drafter.layers)]
        draft.pre_projection = memory.multiplied(drafter.pre_projection)
        draft.post_projection = memory.multiplied(drafter.post_projection)
        draft.target_table, draft.target_scale, draft.backbone = target.table, target.embed_scale, self.backbone
        self._stack = _native.DraftStack(stack, layers, draft)
        self.candidate_count = self._stack.candidates()

    def step(
        self, inputs_R2D: Tensor, layers: _native.Caches, views: list[_native.View], lengths: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Run one step from concat(embedding, hidden), float32. Returns states for the head [R, H] and projected states
        [R, D]."""
        inputs = inputs_R2D.contiguous()
        state, projected = torch.empty(len(inputs), self.hidden_size), torch.empty(len(inputs), self.backbone)
        self._stack.step(floats(inputs), layers, views, lengths, floats(state), floats(projected))
        return state, projected

    def candidates(self, state_RH: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits [R, C] to choose from, and their token ids [R, C], or None where every token is a candidate."""
        rows = len(state_RH)
        logits = torch.empty(rows, self.candidate_count)
        ids = torch.empty(rows if self._ordering.numel() else 0, self.candidate_count, dtype=torch.int64)
        self._stack.score(floats(state_RH.contiguous()), rows, floats(logits), int64s(ids))
        return logits, ids if self._ordering.numel() else None

    def draft(
        self, calls: Sequence[DraftRows], states: list[Floats], layers: _native.Caches, views: list[_native.View],
        lengths: list[int],
    ) -> list[DraftedTokens]:  # fmt: skip
        """Returns the drafts of all sequences, made in one call. `states`: addresses of the states to start from."""
        counts = [call.most for call in calls]
        most, rows = max(counts), len(calls)
        out, made = array("q", bytes(8 * rows * most)), array("q", bytes(8 * rows))
        confidences = array("f", bytes(4 * rows * most))
        self._stack.draft(
            [call.last_token for call in calls], states, layers, views, lengths, counts,
            [_stop_rule(call.stop) for call in calls], [call.temperature for call in calls for _ in range(most)],
            [key for call in calls for key in (*call.keys, *[0] * (most - len(call.keys)))],
            int64s_in(out), floats_in(confidences), int64s_in(made),
        )  # fmt: skip
        drafted = []
        for begin, count, call in zip(range(0, rows * most, most), made, calls, strict=True):
            sure = [] if call.stop is None else confidences[begin : begin + count].tolist()
            drafted.append(DraftedTokens(out[begin : begin + count].tolist(), sure))
        return drafted


def _stop_rule(stop: StopRule | None) -> _native.StopRule:
    """Returns the native form of a rule; one without numbers drafts all that are asked for."""
    return _native.StopRule((), 0.0, 1.0) if stop is None else _native.StopRule(stop.least, stop.bias, stop.slope)


def _stack_config(text: TextConfig) -> _native.Config:
    stack = _native.Config()
    stack.hidden, stack.vocab, stack.window = text.hidden_size, text.vocab_size, text.sliding_window
    stack.eps, stack.first_shared = text.rms_norm_eps, text.first_kv_shared_layer
    return stack


def _layer(memory: Memory, layer: DecoderLayer, config: TextConfig, index: int, cache: int) -> _native.Layer:
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
    out, experts = _native.MoE(), moe.experts
    out.experts, out.top_k, out.width = experts.experts, moe.router.top_k, experts.down_proj.stored.shape[2]
    out.router = memory.matrix(moe.router.proj.stored, moe.router.proj.activations)
    out.gate_up, out.down = memory.matrix(experts.gate_up_proj.stored), memory.matrix(experts.down_proj.stored)
    out.router_scale = memory.vector(moe.router.scale)
    out.expert_scale = memory.vector(moe.router.per_expert_scale)
    out.post_dense = memory.vector(moe.post_feedforward_layernorm_1.weight)
    out.pre_sparse = memory.vector(moe.pre_feedforward_layernorm_2.weight)
    out.post_sparse = memory.vector(moe.post_feedforward_layernorm_2.weight)
    return out


# What follows is kept with a pool and made once: between two calls PyTorch's code is in no cache, and to make a tensor
# there takes 35 microseconds, and to ask one for its address 8.


class _States(NamedTuple):
    """Hidden states of a call, [rows, D], and their address."""

    hidden_RD: Tensor
    address: Floats
    rows: int


def _states(pool: KVPool, rows: int) -> _States:
    """Returns memory for the states of a call: that of the pool's last call, where it had as many rows."""
    known: _States | None = pool.handles.get(_States)
    if known is None or known.rows != rows:
        hidden_RD = torch.empty(rows, pool.config.hidden_size)
        pool.handles[_States] = known = _States(hidden_RD, floats(hidden_RD), rows)
    return known


def _slots(pool: KVPool) -> Floats:
    """Returns the address of the sequences' states."""
    if _slots not in pool.handles:
        pool.handles[_slots] = floats(pool.states)
    address: Floats = pool.handles[_slots]
    return address


def _layers(pool: KVPool, layers: tuple[int, ...]) -> _native.Caches:
    """Returns the addresses of some of the pool's layers, in their order."""
    if layers not in pool.handles:
        caches = _native.Caches()
        for layer in layers:
            rows = pool.layers[layer]
            caches.add(floats(rows.keys), floats(rows.values), rows.keys.shape[1])
        pool.handles[layers] = caches
    handle: _native.Caches = pool.handles[layers]
    return handle


def _rounded(value: float, dtype: torch.dtype) -> float:
    return torch.tensor(value, dtype=dtype).item()
