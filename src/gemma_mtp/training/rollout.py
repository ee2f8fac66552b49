"""Text written by the target itself, in large batches: what the drafter meets when it decodes."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from gemma_mtp.config import TextConfig
from gemma_mtp.model.layers import rope_for, slice_rope
from gemma_mtp.model.target import Target
from gemma_mtp.ops import reference as ops
from gemma_mtp.training import data


@dataclass
class BatchCache:
    """Keys and values of rows that all have the same length; every call appends the same number of tokens to each."""

    config: TextConfig
    capacity: int
    length: int = 0
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)

    def attend(self, layer: int, q_BTHd: Tensor, k_BTGd: Tensor | None, v_BTGd: Tensor | None) -> Tensor:
        end = self.length + q_BTHd.shape[1]
        if k_BTGd is not None and v_BTGd is not None:
            self._append(layer, k_BTGd, v_BTGd)
        own = self.config.kv_layer(layer)
        window = self.config.sliding_window if self.config.is_sliding(layer) else None
        first = 0 if window is None else max(0, self.length + 1 - window)
        queries, rows = torch.arange(self.length, end), torch.arange(first, end)
        k, v = self.keys[own][:, :, first:end], self.values[own][:, :, first:end]
        return ops.masked_attention(q_BTHd, k, v, ops.visible_rows(queries, rows, window))

    def _append(self, layer: int, k_BTGd: Tensor, v_BTGd: Tensor) -> None:
        B, T, G, d = k_BTGd.shape
        if layer not in self.keys:
            self.keys[layer], self.values[layer] = k_BTGd.new_zeros(2, B, G, self.capacity, d).unbind(0)
        self.keys[layer][:, :, self.length : self.length + T] = k_BTGd.transpose(1, 2)
        self.values[layer][:, :, self.length : self.length + T] = v_BTGd.transpose(1, 2)


@torch.inference_mode()
def continue_rows(
    target: Target, prompts_BT: Tensor, length: int, temperature: float, generator: torch.Generator
) -> Tensor:
    """Continue each prompt to `length` tokens, by argmax where `temperature` is 0. Returns int64 [B, length].

    Rows go on after an end of text: the next document begins in them as in the training rows.
    """
    rope = rope_for(target.config, torch.arange(length), target.norm.weight.dtype)
    cache = BatchCache(target.config, length)
    rows, new = prompts_BT, prompts_BT
    while rows.shape[1] < length:
        hidden = target(new, slice_rope(rope, cache.length, cache.length + new.shape[1]), cache, last_only=True)
        cache.length += new.shape[1]
        new = _choose(target.logits(hidden)[:, -1].float(), temperature, generator)
        rows = torch.cat((rows, new), dim=1)
    return rows


def _choose(logits_BV: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    if temperature == 0:
        return logits_BV.argmax(-1, keepdim=True)
    return torch.multinomial((logits_BV / temperature).softmax(-1), 1, generator=generator)


def written_by_target(
    target: Target,
    corpus_NT: data.TokenArray,
    batches: int,
    batch_size: int,
    prompt_lengths: tuple[int, ...] = (128, 224, 320),
    temperatures: tuple[float, ...] = (0.0, 0.0, 0.7),
    seed: int = 0,
) -> data.TokenArray:
    """Rows as long as the corpus's, begun by corpus rows and continued by the target. uint16 [batches * B, T]."""
    chooser, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    parts = []
    for i in range(batches):
        chosen = np.sort(chooser.choice(len(corpus_NT), batch_size, replace=False))
        prompts = torch.from_numpy(corpus_NT[chosen, : prompt_lengths[i % len(prompt_lengths)]].astype(np.int64))
        temperature = temperatures[i % len(temperatures)]
        written = continue_rows(target, prompts, corpus_NT.shape[1], temperature, generator)
        parts.append(written.numpy().astype(np.uint16))
        print(f"target-written text: {i + 1} of {batches} batches of {batch_size} rows", flush=True)
    return np.concatenate(parts)
