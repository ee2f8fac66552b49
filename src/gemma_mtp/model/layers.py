"""A Gemma decoder layer (transformers 5.22.2, models/gemma4/modeling_gemma4.py; for others see `LayerOptions`).

Shape suffixes: B batch, T rows of this call, S cached rows, D hidden, H query heads, G key-value heads, d head size,
P per-layer embedding size, E experts, I expert width.

Projections that read the same input are stored fused; `checkpoint_tensors` gives their parts under the official names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from gemma_mtp.config import LayerOptions, LayerType, TextConfig
from gemma_mtp.ops import reference as ops
from gemma_mtp.weight_types import Quantisation
from gemma_mtp.weights.base import Weight
from gemma_mtp.weights.dense import Dense
from gemma_mtp.weights.matrix import Chooser, Linear, Matrix

#: (cos, signed sin), each [T, d], for one layer type; see `ops.reference.rope_tables`
Rope = tuple[Tensor, Tensor]
NamedWeights = Iterator[tuple[str, Weight]]
Castable = TypeVar("Castable", bound=nn.Module)
#: rows that experts are gathered for, row by row; of more, an expert's rows are multiplied together
GATHERED_ROWS = 16


class KeyValues(Protocol):
    """Where a layer's keys and values live: a cache when decoding, the call's own rows when training."""

    def attend(self, layer: int, q_BTHd: Tensor, k_BTGd: Tensor | None, v_BTGd: Tensor | None) -> Tensor:
        """Store this call's keys and values, if given, and attend; returns [B, T, H * d]."""
        ...


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)

    @property
    def stored(self) -> Weight:
        return Dense(self.weight)


class Attention(nn.Module):
    """Query, key and value projections, per-head norms, RoPE, attention over `KeyValues`, output projection."""

    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.eps = config.rms_norm_eps
        self.heads = config.num_attention_heads
        self.kv_heads = 0 if config.is_kv_shared(layer) else config.layer_kv_heads(layer)
        self.key_is_value = config.key_is_value(layer)
        self.head_dim = config.layer_head_dim(layer)
        self.options = config.options
        value_heads = 0 if self.key_is_value else self.kv_heads
        self.qkv_proj = Linear(config.hidden_size, (self.heads + self.kv_heads + value_heads) * self.head_dim)
        self.o_proj = Linear(self.heads * self.head_dim, config.hidden_size)
        self.q_norm = RMSNorm(self.head_dim, self.eps)
        self.k_norm = RMSNorm(self.head_dim, self.eps) if self.kv_heads else None

    def forward(self, x_BTD: Tensor, rope: Rope, kv: KeyValues) -> Tensor:
        B, T, _ = x_BTD.shape
        H, G = self.heads, self.kv_heads
        heads = self.qkv_proj(x_BTD).view(B, T, -1, self.head_dim)
        if self.k_norm is None:
            q = self._scaled(ops.rotate(self.q_norm(heads), *rope))
            return self.o_proj(kv.attend(self.layer, q, None, None))
        # one norm for all heads: queries and keys then take their own weights, values have none
        weights = torch.cat((self.q_norm.weight.expand(H, -1), self.k_norm.weight.expand(G, -1)))
        normed = ops.rms_norm(heads.to(weights.dtype), None, self.eps)
        qk = ops.rotate((normed[:, :, : H + G] * weights).to(heads.dtype), *rope)
        values = normed.to(heads.dtype) if self.options.value_norm else heads
        v = values[:, :, H:] if self.key_is_value else values[:, :, H + G :]
        return self.o_proj(kv.attend(self.layer, self._scaled(qk[:, :, :H]), qk[:, :, H:], v))

    def _scaled(self, q_BTHd: Tensor) -> Tensor:
        """Queries that carry the scale of their scores."""
        return q_BTHd if self.options.score_scale == 1.0 else q_BTHd * self.options.score_scale

    def checkpoint_tensors(self) -> NamedWeights:
        d, H, G = self.head_dim, self.heads, self.kv_heads
        q, k, v = self.qkv_proj.stored.split([H * d, G * d, 0 if self.key_is_value else G * d])
        yield "q_proj.weight", q
        yield "q_norm.weight", self.q_norm.stored
        yield "o_proj.weight", self.o_proj.stored
        if self.k_norm is not None:
            yield "k_proj.weight", k
            yield "k_norm.weight", self.k_norm.stored
            if not self.key_is_value:
                yield "v_proj.weight", v


class GatedMLP(nn.Module):
    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.intermediate = intermediate
        self.gate_up_proj = Linear(hidden, 2 * intermediate)
        self.down_proj = Linear(intermediate, hidden)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(ops.gated_mlp(self.gate_up_proj(x)))
        return out

    def checkpoint_tensors(self) -> NamedWeights:
        gate, up = self.gate_up_proj.stored.split([self.intermediate, self.intermediate])
        yield "gate_proj.weight", gate
        yield "up_proj.weight", up
        yield "down_proj.weight", self.down_proj.stored


class Router(nn.Module):
    """Chooses each row's experts; soft-maxes over all of them, then renormalises the chosen ones."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.eps, self.top_k = config.rms_norm_eps, config.top_k_experts
        self.proj = Chooser(config.hidden_size, config.num_experts)
        self.scale = nn.Parameter(torch.ones(config.hidden_size))
        self.per_expert_scale = nn.Parameter(torch.ones(config.num_experts))

    def forward(self, x_RD: Tensor) -> tuple[Tensor, Tensor]:
        """Returns expert weights and expert indices, each [R, top_k]."""
        x = ops.rms_norm(x_RD, None, self.eps) * self.scale * x_RD.shape[-1] ** -0.5
        weights, experts = self.proj(x).softmax(-1, dtype=torch.float32).topk(self.top_k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        return weights * self.per_expert_scale[experts], experts


class Experts(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        E, D, I = config.num_experts, config.hidden_size, config.moe_intermediate_size  # noqa: E741
        self.experts = E
        self.gate_up_proj = Matrix(E, 2 * I, D)
        self.down_proj = Matrix(E, D, I)

    def forward(self, x_RD: Tensor, weights_RK: Tensor, experts_RK: Tensor) -> Tensor:
        few = len(x_RD) <= GATHERED_ROWS
        return (self._row_by_row if few else self._grouped)(x_RD, weights_RK, experts_RK)

    def _row_by_row(self, x_RD: Tensor, weights_RK: Tensor, experts_RK: Tensor) -> Tensor:
        """Decode: gather one row's experts at a time, so that no row's result depends on the others' choice."""
        rows = zip(x_RD.split(1), weights_RK, experts_RK, strict=True)
        return torch.cat([self._one_row(x_1D, weights_K, experts_K) for x_1D, weights_K, experts_K in rows])

    def _one_row(self, x_1D: Tensor, weights_K: Tensor, experts_K: Tensor) -> Tensor:
        x_KD = x_1D.expand(len(experts_K), -1)
        hidden = ops.gated_mlp(self.gate_up_proj.stored.gathered_linear(x_KD, experts_K))
        out_KD = self.down_proj.stored.gathered_linear(hidden, experts_K)
        return (out_KD * weights_K[:, None]).to(x_1D.dtype).sum(0, keepdim=True)

    def _grouped(self, x_RD: Tensor, weights_RK: Tensor, experts_RK: Tensor) -> Tensor:
        """Prefill and training: each expert's weights are read once for all of its rows."""
        out = torch.zeros_like(x_RD)
        gate_up, down = self.gate_up_proj.stored, self.down_proj.stored
        for expert in experts_RK.unique().tolist():
            rows, slots = torch.where(experts_RK == expert)
            hidden = ops.gated_mlp(gate_up[expert].linear(x_RD[rows]))
            scaled = down[expert].linear(hidden) * weights_RK[rows, slots, None]
            out = out.index_add(0, rows, scaled.to(out.dtype))
        return out


class MoE(nn.Module):
    """The expert branch beside the dense MLP (26B-A4B), with its own norms around both branches."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.router = Router(config)
        self.experts = Experts(config)
        self.post_feedforward_layernorm_1 = RMSNorm(D, eps)
        self.pre_feedforward_layernorm_2 = RMSNorm(D, eps)
        self.post_feedforward_layernorm_2 = RMSNorm(D, eps)

    def forward(self, residual_BTD: Tensor, dense_BTD: Tensor) -> Tensor:
        rows = residual_BTD.flatten(0, -2)
        sparse = self.experts(self.pre_feedforward_layernorm_2(rows), *self.router(rows)).view_as(residual_BTD)
        return self.post_feedforward_layernorm_1(dense_BTD) + self.post_feedforward_layernorm_2(sparse)

    def checkpoint_tensors(self) -> NamedWeights:
        yield "router.proj.weight", self.router.proj.stored
        yield "router.scale", Dense(self.router.scale)
        yield "router.per_expert_scale", Dense(self.router.per_expert_scale)
        yield "experts.gate_up_proj", self.experts.gate_up_proj.stored
        yield "experts.down_proj", self.experts.down_proj.stored
        for name in ("post_feedforward_layernorm_1", "pre_feedforward_layernorm_2", "post_feedforward_layernorm_2"):
            yield f"{name}.weight", Dense(self.get_parameter(f"{name}.weight"))


class PerLayerInput(nn.Module):
    """Adds the token's per-layer embedding, gated by the hidden state (E2B, E4B)."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        P, D = config.hidden_size_per_layer_input, config.hidden_size
        self.per_layer_input_gate = Linear(D, P)
        self.per_layer_projection = Linear(P, D)
        self.post_per_layer_input_norm = RMSNorm(D, config.rms_norm_eps)

    def forward(self, x_BTD: Tensor, per_layer_BTP: Tensor) -> Tensor:
        gate = torch.nn.functional.gelu(self.per_layer_input_gate(x_BTD), approximate="tanh")
        return x_BTD + self.post_per_layer_input_norm(self.per_layer_projection(gate * per_layer_BTP))

    def checkpoint_tensors(self) -> NamedWeights:
        yield "per_layer_input_gate.weight", self.per_layer_input_gate.stored
        yield "per_layer_projection.weight", self.per_layer_projection.stored
        yield "post_per_layer_input_norm.weight", self.post_per_layer_input_norm.stored


class DecoderLayer(nn.Module):
    layer_scalar: Tensor | None

    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config, layer)
        self.mlp = GatedMLP(D, config.layer_intermediate_size(layer))
        self.moe = MoE(config) if config.enable_moe_block else None
        self.ple = PerLayerInput(config) if config.hidden_size_per_layer_input else None
        self.input_layernorm = RMSNorm(D, eps)
        self.post_attention_layernorm = RMSNorm(D, eps)
        self.pre_feedforward_layernorm = RMSNorm(D, eps)
        self.post_feedforward_layernorm = RMSNorm(D, eps)
        self.register_buffer("layer_scalar", torch.ones(1) if config.options.layer_scalar else None)

    def forward(self, x_BTD: Tensor, rope: Rope, kv: KeyValues, per_layer_BTP: Tensor | None = None) -> Tensor:
        x = x_BTD + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x_BTD), rope, kv))
        out = self.mlp(self.pre_feedforward_layernorm(x))
        if self.moe is not None:
            out = self.moe(x, out)
        x = x + self.post_feedforward_layernorm(out)
        if self.ple is not None and per_layer_BTP is not None:
            x = self.ple(x, per_layer_BTP)
        return x if self.layer_scalar is None else x * self.layer_scalar

    def checkpoint_tensors(self) -> NamedWeights:
        for name, tensor in self.self_attn.checkpoint_tensors():
            yield f"self_attn.{name}", tensor
        for name, tensor in self.mlp.checkpoint_tensors():
            yield f"mlp.{name}", tensor
        for branch in (self.moe, self.ple):
            if branch is not None:
                yield from branch.checkpoint_tensors()
        for name in ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
                     "post_feedforward_layernorm"):  # fmt: skip
            yield f"{name}.weight", Dense(self.get_parameter(f"{name}.weight"))
        if self.layer_scalar is not None:
            yield "layer_scalar", Dense(self.layer_scalar)


def rope_for(config: TextConfig, positions_T: Tensor, dtype: torch.dtype) -> dict[LayerType, Rope]:
    """Rotary tables of both layer types at the given positions."""
    tables: dict[LayerType, Rope] = {}
    for layer, kind in enumerate(config.layer_types):
        if kind not in tables:
            rope = config.rope(kind)
            tables[kind] = ops.rope_tables(
                positions_T, config.layer_head_dim(layer), rope.rope_theta, rope.partial_rotary_factor, rope.factor,
                dtype,
            )  # fmt: skip
    return tables


def cast_(model: Castable, dtype: torch.dtype, options: LayerOptions) -> Castable:
    """Bring a model's numbers into a dtype, but for norms that its family keeps in float32."""
    model = model.to(dtype)
    for module in model.modules():
        if options.float32_norms and isinstance(module, RMSNorm):
            module.float()
    return model


def quantise_matrices(modules: Iterable[nn.Module | None], kind: Quantisation | None) -> None:
    """Quantise every matrix among the modules whose columns allow; None leaves all as they are."""
    for module in list(modules):
        if kind is not None and isinstance(module, Matrix):
            module.quantise_(kind)


def slice_rope(tables: Mapping[LayerType, Rope], start: int, stop: int) -> dict[LayerType, Rope]:
    """Returns the rows of positions start .. stop-1."""
    return {kind: (cos[start:stop], sin[start:stop]) for kind, (cos, sin) in tables.items()}
