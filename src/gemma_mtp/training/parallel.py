"""Several processes of one run, started by torchrun: who am I, and sums over all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

#: rank 0 writes text and measures in the engine while the others wait
PATIENCE = timedelta(hours=24)


@dataclass(frozen=True)
class World:
    """This process's rank among `size`."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def part(self, count: int) -> tuple[int, int]:
        """This process's share of `count` things, start and stop: shares differ by one at most."""
        return self.rank * count // self.size, (self.rank + 1) * count // self.size

    def sum_(self, tensors: list[Tensor]) -> None:
        """Replace each tensor by its sum over all processes, in one message a dtype."""
        if self.size == 1:
            return
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):  # in the same order everywhere
            group = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.reshape(-1) for tensor in group])
            dist.all_reduce(flat)
            for tensor, part in zip(group, flat.split([tensor.numel() for tensor in group]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def from_leader(self, value: Any) -> Any:
        """Rank 0's value, in every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


@contextmanager
def joined_world(device: torch.device) -> Iterator[World]:
    """The world that torchrun's environment describes; one process without it."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    # Its functions take the group of the moment of their import as a default: imported later, as by an optimiser's
    # first step, they would keep the group beyond its end, and its threads. One of these that lets go of a message's
    # tensors while Python ends aborts the process.
    from torch.distributed.nn import functional  # noqa: F401

    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield World(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()
