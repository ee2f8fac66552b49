"""What a round on the device needs of its runtime: recorded work, memory that copies do not wait for, and a mark to
wait for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from gemma_mtp.backend.device_memory import WHOLE_CARD, give_back


class Replays(Protocol):
    """A runtime that plays recorded work again, into the same memory."""

    def capture(self, body: Callable[[], None]) -> Callable[[], None]:
        """Record what a function asks of the device, without doing it. Returns what does it, each time anew.

        Raises RuntimeError where it can not be recorded, for lack of memory or for another reason. Then nothing was
        done, and what is asked for next is done as before."""
        ...

    def staging(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Returns memory of the host for copies from and to the device that nobody waits for."""
        ...

    def mark(self) -> Callable[[], None]:
        """Returns what waits until everything asked for so far is done. Each call of it is a host wait."""
        ...

    def give_back(self) -> None:
        """Wait until everything is done, and give the memory back that nobody uses any more. Raises RuntimeError where
        the device does nothing any more."""
        ...


class CudaReplays:
    """CUDA's graphs, in one pool of memory: they are played one after another, and keep nothing in it in between."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._begin()

    def _begin(self) -> None:
        self._memory = torch.cuda.graph_pool_handle()
        # PyTorch's own stream for this is of the card that first recorded something
        self._stream = torch.cuda.Stream(self._device)

    def capture(self, body: Callable[[], None]) -> Callable[[], None]:
        # recording begins by waiting for the card and giving memory back
        with WHOLE_CARD, torch.cuda.device(self._device):
            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
            try:
                # "thread_local": other threads may go on allocating and waiting meanwhile
                with torch.cuda.graph(graph, self._memory, self._stream, "thread_local"):
                    body()
            except BaseException:
                self._leave(graph)
                raise
            finally:
                torch.cuda.set_stream(stream)  # PyTorch leaves its own current where a recording does not end well
        return graph.replay

    def _leave(self, graph: torch.cuda.CUDAGraph) -> None:
        """Undo what a failed recording leaves: up to 2.12, PyTorch goes on allocating for it where CUDA does not end
        it. The next one begins in memory of its own."""
        with contextlib.suppress(RuntimeError):  # it has ended
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._memory)
        with contextlib.suppress(RuntimeError):
            graph.reset()
        self._begin()

    def staging(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, pin_memory=True)

    def mark(self) -> Callable[[], None]:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event.synchronize

    def give_back(self) -> None:
        give_back(self._device)
