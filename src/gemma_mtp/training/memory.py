"""How many sequences a block may hold: what one costs is counted, not guessed, before training starts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from gemma_mtp.errors import TrainingError
from gemma_mtp.training.step import SLAB_LOGITS, DraftStep

#: fp32 buffers of a slab that are alive at once: logits, log q, q, p, gradient and what the operators need between
SLAB_BUFFERS = 8
MEGABYTE = 1 << 20
#: what PyTorch's CPU allocator says, on Linux and macOS and on Windows, in a plain RuntimeError
ALLOCATION_FAILED = ("can't allocate memory", "not enough memory")


@dataclass(frozen=True)
class BlockPlan:
    """Sequences a block, and the bytes that are held: of the target's states, keys and values for each sequence, of
    what the drafter keeps for its backward pass for each sequence, and of one slab of logits."""

    sequences: int
    target_bytes: int
    drafter_bytes: int
    slab_bytes: int

    def blocks(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Sequences start to stop - 1 in as few blocks as fit, of sizes that differ by one at most."""
        count = -(-(stop - start) // self.sequences)
        bounds = [start + i * (stop - start) // max(1, count) for i in range(count + 1)]
        yield from pairwise(bounds)

    def describe(self, length: int, limit: int) -> str:
        parts = f"target {self._megabytes(self.target_bytes)}, drafter {self._megabytes(self.drafter_bytes)}"
        return (
            f"blocks of up to {self.sequences} x {length} tokens: {parts}, logits {self.slab_bytes / MEGABYTE:.1f} MB;"
            f" limit {limit / MEGABYTE:.0f} MB"
        )

    def _megabytes(self, each: int) -> str:
        return f"{self.sequences * each / MEGABYTE:.1f} MB"


@contextmanager
def memory_reported(where: str, advice: str) -> Iterator[None]:
    """Turn an allocation that fails inside into a TrainingError: "memory ran out {where}; {advice}."."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        typed = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not typed and not any(words in str(error) for words in ALLOCATION_FAILED):
            raise
        raise TrainingError(f"memory ran out {where}; {advice}.") from None


def plan_blocks(step: DraftStep, length: int, batch_size: int, limit: int) -> BlockPlan:
    """The most sequences of `length` tokens, up to `batch_size`, whose activations stay below `limit` bytes.

    Raises TrainingError where not even one does.
    """
    target_bytes, drafter_bytes = _bytes_of_one(step, length)
    slab_bytes = 4 * SLAB_BUFFERS * max(SLAB_LOGITS[step.device.type], step.target.config.vocab_size)
    fits = (limit - slab_bytes) // (target_bytes + drafter_bytes)
    if fits < 1:
        needed = (slab_bytes + target_bytes + drafter_bytes) / MEGABYTE
        raise TrainingError(
            f"one sequence of {length} tokens needs {needed:.0f} MB, more than --memory {limit / MEGABYTE:.0f} allows;"
            " raise it, or lower --length or --draft-steps."
        )
    return BlockPlan(min(fits, batch_size), target_bytes, drafter_bytes, slab_bytes)


def _bytes_of_one(step: DraftStep, length: int) -> tuple[int, int]:
    """Bytes held for one sequence: by the target's pass, by the drafter's steps."""
    tokens = torch.zeros(1, length, dtype=torch.int64, device=step.device)
    rows = step.compute_rows(tokens)
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        states = step.unroll(rows, length)
    parameters = sum(kept.pop(p.untyped_storage().data_ptr(), 0) for p in step.drafter.parameters())
    assert parameters >= 0
    return rows.nbytes + _passing_bytes(step, length), sum(kept.values()) + 2 * sum(s.nbytes for s in states)


def _passing_bytes(step: DraftStep, length: int) -> int:
    """What the target's pass holds beside its results: every layer's keys and values, one layer's activations."""
    config, size = step.target.config, step.drafter.norm.weight.element_size()
    heads = [2 * config.layer_kv_heads(i) * config.layer_head_dim(i) for i in range(config.first_kv_shared_layer)]
    widest = max(config.layer_intermediate_size(i) for i in range(config.num_hidden_layers))
    ple = config.num_hidden_layers * config.hidden_size_per_layer_input
    scores = config.num_attention_heads * length  # of a full layer
    return length * size * (sum(heads) + 3 * widest + 4 * config.hidden_size + 2 * ple + 2 * scores)
