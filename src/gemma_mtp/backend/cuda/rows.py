"""What happens to one row between products: embeddings, norms, the residual stream, rotary positions, keys and values.

The residual stream and all sums are float32; what a product reads is bf16. Each program has one row, or a head of it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemma_mtp.backend.cuda.dots import gelu, sum_parts, table_row
from gemma_mtp.backend.cuda.launch import Launch, power_of_two
from gemma_mtp.backend.cuda.weights import DeviceWeight


@triton.jit
def normed(x, size, eps):
    """x divided by its root mean square; columns beyond `size` are zero."""
    return x * tl.rsqrt(tl.sum(x * x, 0) / size + eps)


@triton.jit
def embed_kernel(
    token_ids, table, scales, scale, residual, raw, raw_stride, D,
    KIND: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A token's scaled embedding: residual float32 [R, D], and raw bf16 at rows of `raw_stride`."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    x = table_row(table, scales, tl.load(token_ids + row).to(tl.int64), at, at < D, D, KIND, GROUP) * scale
    tl.store(residual + row * D + at, x, mask=at < D)
    tl.store(raw + row * raw_stride + at, x.to(tl.bfloat16), mask=at < D)


def embed(launch: Launch, token_ids_R: Tensor, table: DeviceWeight, scale: float, raw_RD: Tensor) -> Tensor:
    """Returns scaled embeddings, float32 [R, D], and writes them to `raw_RD`, bf16 columns of a wider matrix or not."""
    R, D = len(token_ids_R), table.columns
    residual = torch.empty(R, D, dtype=torch.float32, device=token_ids_R.device)
    block = power_of_two(D)
    launch(
        embed_kernel, (R,), token_ids_R, table.data, table.scales, scale, residual, raw_RD, raw_RD.stride(0), D,
        KIND=table.kind, GROUP=table.group, BLOCK=block, warps=row_warps(block),
    )  # fmt: skip
    return residual


@triton.jit
def norm_kernel(x, weight, out, D, eps, BLOCK: tl.constexpr):
    """out bf16: the norm of float32 rows, times the weight."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    values = normed(tl.load(x + row * D + at, mask=at < D, other=0.0), D, eps)
    values = values * tl.load(weight + at, mask=at < D, other=0.0)
    tl.store(out + row * D + at, values.to(tl.bfloat16), mask=at < D)


def norm(launch: Launch, x_RD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Returns the norm of float32 rows times a float32 weight, bf16 [R, D]."""
    R, D = x_RD.shape
    out = torch.empty(R, D, dtype=torch.bfloat16, device=x_RD.device)
    block = power_of_two(D)
    launch(norm_kernel, (R,), x_RD, weight_D, out, D, eps, BLOCK=block, warps=row_warps(block))
    return out


@triton.jit(do_not_specialize=["R"])
def add_kernel(
    branch, residual, post, scalar, following, out, R, D, eps,
    PARTS: tl.constexpr, SCALED: tl.constexpr, NORMED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """residual += norm(branch) * post, times the scalar with SCALED. out bf16: that, or its norm with NORMED."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    mask, places = at < D, row * D + at
    x = normed(sum_parts(branch, places, mask, R.to(tl.int64) * D, PARTS), D, eps)
    x = tl.load(residual + places, mask=mask, other=0.0) + x * tl.load(post + at, mask=mask, other=0.0)
    if SCALED:
        x = x * tl.load(scalar)
    tl.store(residual + places, x, mask=mask)
    if NORMED:
        x = normed(x, D, eps) * tl.load(following + at, mask=mask, other=0.0)
    tl.store(out + places, x.to(tl.bfloat16), mask=mask)


def add_normed(
    launch: Launch, branch_PRD: Tensor, residual_RD: Tensor, post_D: Tensor, eps: float, following_D: Tensor | None,
    scalar: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Add the norm of a branch, given in parts, to the residual in place, and multiply by `scalar` if given.

    Returns bf16 [R, D] for the next product: the new residual, normed by `following_D` if given.
    """
    parts, R, D = branch_PRD.shape
    out = torch.empty(R, D, dtype=torch.bfloat16, device=residual_RD.device)
    block = power_of_two(D)
    launch(
        add_kernel, (R,), branch_PRD, residual_RD, post_D, post_D if scalar is None else scalar,
        post_D if following_D is None else following_D, out, R, D, eps,
        PARTS=parts, SCALED=scalar is not None, NORMED=following_D is not None, BLOCK=block, warps=row_warps(block),
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["R", "L"])
def ple_kernel(
    token_ids, projected, table, scales, weight, out, R, P, L, scale, projection_scale, eps,
    PARTS: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row's per-layer input of one layer: its own embedding and the normed projection, float32 [L, R, P]."""
    row, layer, at = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK)
    mask, width = at < P, L * P
    x = sum_parts(projected, row * width + layer * P + at, mask, R.to(tl.int64) * width, PARTS) * projection_scale
    x = normed(x, P, eps) * tl.load(weight + at, mask=mask, other=0.0)
    token = tl.load(token_ids + row).to(tl.int64)
    x += table_row(table, scales, token, layer * P + at, mask, width, KIND, GROUP) * scale
    tl.store(out + (layer * R + row) * P + at, x * 0.7071067811865476, mask=mask)


def per_layer_inputs(
    launch: Launch, token_ids_R: Tensor, projected_SRW: Tensor, table: DeviceWeight, weight_P: Tensor, scale: float,
    projection_scale: float, eps: float,
) -> Tensor:  # fmt: skip
    """Returns per-layer inputs, float32 [L, R, P], from the projection [parts, R, L * P] and the per-layer table."""
    parts, R, width = projected_SRW.shape
    P = len(weight_P)
    out = torch.empty(width // P, R, P, dtype=torch.float32, device=token_ids_R.device)
    launch(
        ple_kernel, (R, width // P), token_ids_R, projected_SRW, table.data, table.scales, weight_P, out, R, P,
        width // P, scale, projection_scale, eps, PARTS=parts, KIND=table.kind, GROUP=table.group,
        BLOCK=power_of_two(P), warps=2,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["R"])
def ple_gate_kernel(gate, inputs, out, R, P, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """out bf16 [R, P]: gelu(gate) times the layer's own input."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    mask, places = at < P, row * P + at
    x = gelu(sum_parts(gate, places, mask, R.to(tl.int64) * P, PARTS))
    tl.store(out + places, (x * tl.load(inputs + places, mask=mask, other=0.0)).to(tl.bfloat16), mask=mask)


def ple_gated(launch: Launch, gate_SRP: Tensor, inputs_RP: Tensor) -> Tensor:
    """Returns gelu of the gate, given in parts, times a layer's per-layer inputs: bf16 [R, P]."""
    parts, R, P = gate_SRP.shape
    out = torch.empty(R, P, dtype=torch.bfloat16, device=inputs_RP.device)
    launch(ple_gate_kernel, (R,), gate_SRP, inputs_RP, out, R, P, PARTS=parts, BLOCK=power_of_two(P), warps=2)
    return out


def row_warps(block: int) -> int:
    """Returns the warps of a program of one row. They follow from the row's size: sums depend on them."""
    return 8 if block >= 4096 else 4


@triton.jit(do_not_specialize=["R"])
def added_kernel(parts, out, R, D, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """out float32 [R, D]: parts added in order."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    tl.store(out + row * D + at, sum_parts(parts, row * D + at, at < D, R.to(tl.int64) * D, PARTS), mask=at < D)


def added(launch: Launch, parts_SRD: Tensor) -> Tensor:
    """Returns the sum of a product's parts, float32 [R, D]."""
    parts, R, D = parts_SRD.shape
    out = torch.empty(R, D, dtype=torch.float32, device=parts_SRD.device)
    block = power_of_two(D)
    launch(added_kernel, (R,), parts_SRD, out, R, D, PARTS=parts, BLOCK=block, warps=row_warps(block))
    return out
