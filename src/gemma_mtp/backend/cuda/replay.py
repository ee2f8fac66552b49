"""What a round on the device needs of its runtime: recorded work, memory that copies do not wait for, and a mark to
wait for."""

from __future__ import annotations

import threading
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


#: recording begins by waiting for the card and giving memory back, which nobody may do while another thread records
_RECORDING = threading.Lock()


class CudaReplays:
    """CUDA's graphs, in one pool of memory: they are played one after another, and keep nothing in it in between."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # PyTorch's own for this is of the card that first recorded something

    def capture(self, body: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # "thread_local": other threads may go on allocating and waiting meanwhile
        recording = torch.cuda.graph(graph, self._memory, self._stream, "thread_local")
        with _RECORDING, torch.cuda.device(self._device), recording:
            body()
        return graph.replay

    def staging(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, pin_memory=True)

    def mark(self) -> Callable[[], None]:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event.synchronize
