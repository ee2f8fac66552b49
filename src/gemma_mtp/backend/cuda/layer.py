"""One decoder layer on the device: its weights, and the kernels that run rows through it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gemma_mtp.backend.cuda.attention import attend
from gemma_mtp.backend.cuda.batch import Batch
from gemma_mtp.backend.cuda.experts import DeviceExperts, mixture
from gemma_mtp.backend.cuda.heads import Heads, finish_heads
from gemma_mtp.backend.cuda.launch import Launch
from gemma_mtp.backend.cuda.linear import gate_up, linear
from gemma_mtp.backend.cuda.rows import add_normed, norm, ple_gated
from gemma_mtp.backend.cuda.usable import unknown_option
from gemma_mtp.backend.cuda.weights import DeviceWeight, of_module
from gemma_mtp.config import LayerType, TextConfig
from gemma_mtp.errors import DeviceError
from gemma_mtp.kv.pool import LayerRows
from gemma_mtp.model.layers import DecoderLayer, MoE, PerLayerInput


@dataclass(frozen=True)
class DevicePerLayer:
    """A layer's part of the per-layer embeddings."""

    gate: DeviceWeight
    projection: DeviceWeight
    norm: Tensor


@dataclass(frozen=True)
class DeviceLayer:
    """A layer's weights; norms are float32. `kv`: the layer whose keys and values it reads, and stores where it has
    some."""

    kind: LayerType
    kv: int
    heads: Heads
    eps: float
    qkv: DeviceWeight
    o: DeviceWeight
    gate_up: DeviceWeight
    down: DeviceWeight
    q_norm: Tensor
    k_norm: Tensor | None
    input_norm: Tensor
    post_attention: Tensor
    pre_feedforward: Tensor
    post_feedforward: Tensor
    scalar: Tensor | None
    experts: DeviceExperts | None
    ple: DevicePerLayer | None


def device_layer(layer: DecoderLayer, config: TextConfig, index: int, kv: int) -> DeviceLayer:
    """Returns a layer's weights as the kernels read them. Raises DeviceError for what they can not."""
    if (option := unknown_option(config.options)) is not None:
        raise DeviceError(f"the GPU kernels do not know the layers' option {option}; use the reference backend.")
    attention, mlp, options = layer.self_attn, layer.mlp, config.options
    heads = Heads(
        attention.heads, attention.kv_heads, attention.head_dim, attention.key_is_value, options.value_norm,
        options.score_scale,
    )  # fmt: skip
    return DeviceLayer(
        config.layer_types[index], kv, heads, config.rms_norm_eps, of_module(attention.qkv_proj),
        of_module(attention.o_proj), of_module(mlp.gate_up_proj), of_module(mlp.down_proj),
        vector(attention.q_norm.weight), None if attention.k_norm is None else vector(attention.k_norm.weight),
        vector(layer.input_layernorm.weight), vector(layer.post_attention_layernorm.weight),
        vector(layer.pre_feedforward_layernorm.weight), vector(layer.post_feedforward_layernorm.weight),
        None if layer.layer_scalar is None else vector(layer.layer_scalar),
        None if layer.moe is None else _experts(layer.moe), None if layer.ple is None else _per_layer(layer.ple),
    )  # fmt: skip


def _per_layer(ple: PerLayerInput) -> DevicePerLayer:
    return DevicePerLayer(
        of_module(ple.per_layer_input_gate), of_module(ple.per_layer_projection),
        vector(ple.post_per_layer_input_norm.weight),
    )  # fmt: skip


def _experts(moe: MoE) -> DeviceExperts:
    return DeviceExperts(
        moe.router.proj.stored.dense().detach().bfloat16().contiguous(), vector(moe.router.scale),
        vector(moe.router.per_expert_scale),
        of_module(moe.experts.gate_up_proj), of_module(moe.experts.down_proj), moe.router.top_k,
        vector(moe.post_feedforward_layernorm_1.weight), vector(moe.pre_feedforward_layernorm_2.weight),
        vector(moe.post_feedforward_layernorm_2.weight),
    )  # fmt: skip


def vector(tensor: Tensor) -> Tensor:
    """Returns a norm's or a scalar's weight in float32."""
    return tensor.detach().float().contiguous()


def run_layer(
    launch: Launch, layer: DeviceLayer, x_RD: Tensor, residual_RD: Tensor, batch: Batch, stored: LayerRows,
    rope: tuple[Tensor, Tensor], per_layer_RP: Tensor | None, following_D: Tensor,
) -> Tensor:  # fmt: skip
    """Run rows through a layer: `residual_RD` float32 moves on in place. `x_RD` bf16 is its norm by the layer's input
    norm; returns that by `following_D`, the input norm of what comes next."""
    eps, seen = layer.eps, batch.seen[layer.kind]
    queries = finish_heads(
        launch, linear(launch, x_RD, layer.qkv), layer.heads, layer.q_norm, layer.k_norm, rope, seen.positions_R,
        seen.owners_R, seen.tables, stored.keys, stored.values, eps,
    )  # fmt: skip
    found = attend(launch, queries, stored.keys, stored.values, batch.stacks[layer.kind], seen, batch.most_rows)
    x = add_normed(
        launch, linear(launch, found, layer.o), residual_RD, layer.post_attention, eps, layer.pre_feedforward
    )
    branch = linear(launch, gate_up(launch, x, layer.gate_up), layer.down)
    if layer.experts is not None:
        sparse = norm(launch, residual_RD, layer.experts.pre_sparse, eps)
        branch = mixture(launch, residual_RD, sparse, branch, layer.experts, eps)
    if layer.ple is None or per_layer_RP is None:
        return add_normed(launch, branch, residual_RD, layer.post_feedforward, eps, following_D, layer.scalar)
    x = add_normed(launch, branch, residual_RD, layer.post_feedforward, eps, None)
    gated = ple_gated(launch, linear(launch, x, layer.ple.gate), per_layer_RP)
    branch = linear(launch, gated, layer.ple.projection)
    return add_normed(launch, branch, residual_RD, layer.ple.norm, eps, following_D, layer.scalar)
