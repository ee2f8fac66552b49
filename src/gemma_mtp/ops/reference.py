"""The operators of a Gemma 4 decoder layer in stock PyTorch.

Shape suffixes: B batch, T rows of this call, S cached rows, D hidden, H query heads, G key-value heads, d head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension, times `weight` (plain, not 1 + weight) if given.

    A weight of another dtype is multiplied with in that one, before the result is rounded to the dtype of x.
    """
    wide = x if weight is None else x.to(weight.dtype)
    return F.rms_norm(wide, x.shape[-1:], weight, eps).to(x.dtype)


def rotate(x_BTHd: Tensor, cos_Td: Tensor, sin_Td: Tensor) -> Tensor:
    """Rotary embedding. `sin_Td` carries the sign of rotate_half: its first half is negated (see `rope_tables`)."""
    cos, sin = cos_Td.unsqueeze(-2), sin_Td.unsqueeze(-2)
    return torch.addcmul(x_BTHd * cos, x_BTHd.roll(x_BTHd.shape[-1] // 2, -1), sin)


def attention(q_BTHd: Tensor, k_BGSd: Tensor, v_BGSd: Tensor) -> Tensor:
    """Grouped-query attention in which every row sees all of S. Queries carry the scale of their scores. Returns
    [B, T, H * d].

    The query heads that share a key-value head are stacked as rows, so keys and values are never repeated.
    """
    B, T, H, d = q_BTHd.shape
    G = k_BGSd.shape[1]
    q = q_BTHd.view(B, T, G, H // G, d).permute(0, 2, 3, 1, 4).reshape(B, G, H // G * T, d)
    out = F.scaled_dot_product_attention(q, k_BGSd, v_BGSd, scale=1.0)
    return out.view(B, G, H // G, T, d).permute(0, 3, 1, 2, 4).reshape(B, T, H * d)


def masked_attention(q_BTHd: Tensor, k_BGSd: Tensor, v_BGSd: Tensor, visible_TS: Tensor) -> Tensor:
    """The same for many rows, with a boolean mask and differentiable: prefill and training. Returns [B, T, H * d]."""
    q = q_BTHd.transpose(1, 2)
    out = F.scaled_dot_product_attention(q, k_BGSd, v_BGSd, attn_mask=visible_TS, scale=1.0, enable_gqa=True)
    return out.transpose(1, 2).flatten(2)


def visible_rows(query_positions_T: Tensor, row_positions_S: Tensor, window: int | None) -> Tensor:
    """[T, S] boolean: rows at or before the query, and nearer than `window` to it where the layer slides."""
    distance = query_positions_T[:, None] - row_positions_S[None, :]
    visible = distance >= 0
    return visible if window is None else visible & (distance < window)


def gated_mlp(gate_up: Tensor) -> Tensor:
    """gelu(gate) * up of the two halves of the last dimension (hidden_activation gelu_pytorch_tanh)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def softcap(logits: Tensor, cap: float | None) -> Tensor:
    """cap * tanh(logits / cap), or the logits as they are where the model has no cap."""
    return logits if cap is None else torch.tanh(logits / cap) * cap


def rope_tables(
    positions_T: Tensor, head_dim: int, theta: float, rotated_share: float, factor: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and signed sin for `rotate`, each [T, head_dim].

    Dimensions beyond `rotated_share` have frequency 0, and all frequencies are divided by `factor`; the exponent's
    denominator is the whole head_dim in all RoPE types of Gemma 4 (transformers 5.22.2,
    modeling_rope_utils._compute_proportional_rope_parameters).
    """
    rotated = int(rotated_share * head_dim // 2)
    exponents = torch.arange(0, 2 * rotated, 2, dtype=torch.float32, device=positions_T.device) / head_dim
    frequencies = torch.zeros(head_dim // 2, dtype=torch.float32, device=positions_T.device)
    frequencies[:rotated] = 1.0 / (theta**exponents) / factor
    angles = positions_T.float()[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)
