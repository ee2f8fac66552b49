"""Attention over whole training rows as plain matrix products, which a CPU runs several times faster than its fused
attention with a mask: sliding layers in chunks of a window or more, each seeing the chunk before it and itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gemma_mtp.config import LayerType, TextConfig
from gemma_mtp.ops import reference as ops


@dataclass
class TrainingKeyValues:
    """What `SequenceKeyValues` computes (the tests hold them equal), for rows of T tokens from position 0."""

    config: TextConfig
    length: int
    stored: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    masks: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def attend(self, layer: int, q_BTHd: Tensor, k_BTGd: Tensor | None, v_BTGd: Tensor | None) -> Tensor:
        if k_BTGd is not None and v_BTGd is not None:
            self.stored[layer] = k_BTGd, v_BTGd
        window = self.config.sliding_window if self.config.is_sliding(layer) else None
        return windowed_attention(q_BTHd, *self.stored[self.config.kv_layer(layer)], window, self.masks)

    def donor_kv(self) -> dict[LayerType, tuple[Tensor, Tensor]]:
        """The donor layers' keys and values, each [B, T, G, d]."""
        return {kind: self.stored[layer] for kind, layer in self.config.donor_layers.items()}


@dataclass
class TrainingDonorKeyValues:
    """What `CommittedKeyValues` shows a drafter while decoding, for every row of whole sequences at once.

    Row t drafts from query position t + 1, so it sees the target's rows up to t, and of those in a sliding layer the
    ones nearer than `sliding_window` to t + 1: one fewer than the target's own row t sees.
    """

    config: TextConfig
    stored: Mapping[LayerType, tuple[Tensor, Tensor]]
    masks: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def attend(self, layer: int, q_BTHd: Tensor, k_BTGd: Tensor | None, v_BTGd: Tensor | None) -> Tensor:
        window = self.config.sliding_window - 1 if self.config.is_sliding(layer) else None
        return windowed_attention(q_BTHd, *self.stored[self.config.layer_types[layer]], window, self.masks)


def windowed_attention(
    q_BTHd: Tensor, k_BTGd: Tensor, v_BTGd: Tensor, window: int | None, masks: dict[tuple[int, int], Tensor]
) -> Tensor:
    """Causal attention of T rows, nearer than `window` where given; `masks` keeps what one call builds for the next."""
    length = q_BTHd.shape[1]
    chunk = next((c for c in range(window, 2 * window + 1) if length % c == 0), length) if window else length
    key = (chunk, window or 0)
    if key not in masks:
        positions = torch.arange(chunk, device=q_BTHd.device)
        keys = positions if chunk == length else torch.arange(-chunk, chunk, device=q_BTHd.device)
        visible = ops.visible_rows(positions, keys, window)
        masks[key] = torch.zeros(visible.shape, dtype=q_BTHd.dtype, device=q_BTHd.device)
        masks[key].masked_fill_(~visible, -torch.inf)
    return chunked_attention(q_BTHd, k_BTGd, v_BTGd, chunk, masks[key])


def chunked_attention(q_BTHd: Tensor, k_BTGd: Tensor, v_BTGd: Tensor, chunk: int, mask_CS: Tensor) -> Tensor:
    """Grouped-query attention in chunks of queries, scale 1. Returns [B, T, H * d].

    With S = 2 * chunk the keys are those of the previous chunk and its own. The first chunk's previous keys are zeros
    and must be masked too: they lie before position 0.
    """
    B, T, H, d = q_BTHd.shape
    G, C = k_BTGd.shape[2], T // chunk
    S = mask_CS.shape[1]
    # queries of one group stacked as rows, so that keys are not repeated: [B, C, G, (H / G) * chunk, d]
    q = q_BTHd.view(B, C, chunk, G, H // G, d).permute(0, 1, 3, 4, 2, 5).reshape(B * C * G, H // G * chunk, d)
    k, v = (_with_previous(x, chunk, S).reshape(B * C * G, S, d) for x in (k_BTGd, v_BTGd))
    scores = torch.bmm(q, k.transpose(1, 2)).view(B, C, G, H // G, chunk, S) + _first_masked(mask_CS, C, chunk)
    out = torch.bmm(scores.softmax(-1).view(B * C * G, H // G * chunk, S), v)
    return out.view(B, C, G, H // G, chunk, d).permute(0, 1, 4, 2, 3, 5).reshape(B, T, H * d)


def _with_previous(x_BTGd: Tensor, chunk: int, S: int) -> Tensor:
    """[B, C, G, S, d]: each chunk's keys, after those of the chunk before it where S asks for them."""
    B, T, G, d = x_BTGd.shape
    x = x_BTGd.view(B, T // chunk, chunk, G, d).transpose(2, 3)
    if S == chunk:
        return x
    previous = torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), dim=1)
    return torch.cat((previous, x), dim=3)


def _first_masked(mask_CS: Tensor, chunks: int, chunk: int) -> Tensor:
    """[chunks, 1, 1, chunk, S]: the mask of every chunk; the first has nothing before it."""
    masks = mask_CS.expand(chunks, 1, 1, *mask_CS.shape)
    if mask_CS.shape[1] == chunk:
        return masks
    masks = masks.clone()
    masks[0, :, :, :, :chunk] = -torch.inf
    return masks
