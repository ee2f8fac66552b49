"""How many sequences a block may hold, and rows a slab: what one costs is counted, not guessed, before training starts.

Blocks and slabs follow from the settings and the model alone, never from the memory that happens to be free: another
division sums in another order, so a run could not be repeated bit for bit.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from gemma_mtp.errors import TrainingError
from gemma_mtp.training.step import PRODUCT_VALUES, DraftStep
from gemma_mtp.training.unroll import trained_head
from gemma_mtp.units import shown_bytes

#: buffers of a tile, of fp32 size, that are alive at once: log q, q, gradient and what the operators need between;
#: where top-k or top-p sort the vocabulary, 64-bit keys, places and masses
TILE_BUFFERS, SORTED_TILE_BUFFERS = 6, 14
MEGABYTE = 10**6
#: what PyTorch's CPU allocator says, on Linux and macOS and on Windows, in a plain RuntimeError
ALLOCATION_FAILED = ("can't allocate memory", "not enough memory")


@dataclass(frozen=True)
class BlockPlan:
    """Sequences a block, rows a slab, and the bytes that are held: of the target's states, keys and values for each
    sequence, of what the drafter keeps for its backward pass for each sequence, of one slab of logits, and of the
    gradients, of which that of the drafter's output table is nearly all."""

    sequences: int
    slab_rows: int
    target_bytes: int
    drafter_bytes: int
    slab_bytes: int
    gradient_bytes: int

    @property
    def nbytes(self) -> int:
        return self.sequences * (self.target_bytes + self.drafter_bytes) + self.slab_bytes + self.gradient_bytes

    def blocks(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Sequences start to stop - 1 in as few blocks as fit, of sizes that differ by one at most."""
        count = -(-(stop - start) // self.sequences)
        bounds = [start + i * (stop - start) // max(1, count) for i in range(count + 1)]
        yield from pairwise(bounds)

    def describe(self, length: int, limit: int) -> str:
        target, drafter, slab, gradients = (
            shown_bytes(count)
            for count in (self.sequences * self.target_bytes, self.sequences * self.drafter_bytes, self.slab_bytes,
                          self.gradient_bytes)
        )  # fmt: skip
        return (
            f"blocks of up to {self.sequences} x {length} tokens: target {target}, drafter {drafter}, logits of"
            f" {self.slab_rows} rows {slab}, gradients {gradients}; limit {shown_bytes(limit)}"
        )


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
    """The most sequences of `length` tokens, up to `batch_size`, that stay below `limit` bytes beside a slab. A slab
    has as many rows as make it fast, where they leave room for one sequence: they gain more than larger blocks do.

    Raises TrainingError where not even one sequence and the smallest slab fit.
    """
    target_bytes, drafter_bytes = _bytes_of_one(step, length)
    each, gradient_bytes = target_bytes + drafter_bytes, _gradient_bytes(step)

    def slab_bytes(rows: int) -> int:
        return rows * _row_bytes(step) + min(rows, step.tile_rows) * _tile_row_bytes(step)

    room, least = limit - gradient_bytes, step.objective.steps
    most = max(least, min(step.best_slab_rows, batch_size * length))
    slab_rows = max(least, bisect_right(range(most + 1), room - each, key=slab_bytes) - 1)
    fits = (room - slab_bytes(slab_rows)) // each
    if fits < 1:
        needed = (gradient_bytes + slab_bytes(least) + each) / MEGABYTE
        raise TrainingError(
            f"one sequence of {length} tokens needs {math.ceil(needed)} MB, more than --memory"
            f" {limit / MEGABYTE:.0f} allows; raise it, or lower --length or --draft-steps."
        )
    return BlockPlan(
        min(fits, batch_size), slab_rows, target_bytes, drafter_bytes, slab_bytes(slab_rows), gradient_bytes
    )


def _row_bytes(step: DraftStep) -> int:
    """What a slab holds for each of its rows: logits, in whose place comes their gradient, and the target's
    probabilities."""
    size = step.drafter.norm.weight.element_size()
    return step.target.config.vocab_size * (size + _wide(size))


def _tile_row_bytes(step: DraftStep) -> int:
    objective = step.objective
    buffers = SORTED_TILE_BUFFERS if objective.top_k > 0 or objective.top_p < 1 else TILE_BUFFERS
    return step.target.config.vocab_size * buffers * _wide(step.drafter.norm.weight.element_size())


def _gradient_bytes(step: DraftStep) -> int:
    """The masters' gradients. Beside them a block has its own of all parameters but the table; of the table a piece and
    its wider copy, where bf16 is trained."""
    count, table = sum(p.numel() for p in step.drafter.parameters()), trained_head(step.drafter)
    size, wide = table.element_size(), _wide(table.element_size())
    piece = min(PRODUCT_VALUES, table.numel()) * (size + wide) if size < wide else 0
    return count * wide + (count - table.numel()) * size + piece


def _wide(size: int) -> int:
    """Bytes of what losses are computed in."""
    return max(4, size)


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
