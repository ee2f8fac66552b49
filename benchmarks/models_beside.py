"""Logits of a prompt on any backend."""

from __future__ import annotations

import torch
from torch import Tensor

from gemma_mtp.backend.base import Backend, Rows
from gemma_mtp.engine.round import forward
from gemma_mtp.kv.blocks import block_counts


@torch.inference_mode()
def prompt_logits(backend: Backend, token_ids: list[int]) -> Tensor:
    """Returns the logits of every token of a prompt, [T, V], read in one call."""
    count = len(token_ids)
    pool = backend.make_pool(block_counts(backend.target.config.sliding_window, count, count), 1)
    cache = pool.cache(count)
    cache.open()
    return backend.logits(forward(backend, [Rows(cache, token_ids, count)]))
