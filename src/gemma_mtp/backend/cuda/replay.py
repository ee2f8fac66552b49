"""What a round on the device needs of its runtime: recorded work, memory that copies do not wait for, and a mark to
wait for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Replays(Protocol):
    """A runtime that plays recorded work again, into the same memory."""

    def capture(self, body: Callable[[], None]) -> Callable[[], None]:
        """Record what a function asks of the device, without doing it. Returns what does it, each time anew."""
        ...

    def staging(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Returns memory of the host for copies from and to the device that nobody waits for."""
        ...

    def mark(self) -> Callable[[], None]:
        """Returns what waits until everything asked for so far is done. Each call of it is a host wait."""
        ...


class CudaReplays:
    """CUDA's graphs, in one pool of memory: they are played one after another, and keep nothing in it in between."""

    def __init__(self) -> None:
        self._memory = torch.cuda.graph_pool_handle()

    def capture(self, body: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            body()
        return graph.replay

    def staging(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, pin_memory=True)

    def mark(self) -> Callable[[], None]:
        event = torch.cuda.Event()
        event.record()
        return event.synchronize
