"""Memory in huge pages, where the system has them: the addresses of many small pages take time to look up."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

HUGE_PAGE_BYTES = 2 << 20
#: what is asked for at a time for small tensors; what of it is not used is never there
CHUNK_BYTES = 16 << 20
#: where tensors begin
LINE_BYTES = 64


def zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Returns zeros on the CPU, in huge pages where they fill some. Raises MemoryError."""
    size = math.prod(shape) * dtype.itemsize
    if size < HUGE_PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(*shape, dtype=dtype)
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(error.strerror) from None
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(*shape)  # keeps the memory alive


class SideBySide:
    """Room for tensors that stay as long as one another: small ones share huge pages."""

    def __init__(self) -> None:
        self._room = torch.empty(0, dtype=torch.uint8)

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Returns zeros on the CPU."""
        size = math.prod(shape) * dtype.itemsize
        if size >= CHUNK_BYTES:
            return zeros(shape, dtype)
        lines = -(-size // LINE_BYTES) * LINE_BYTES
        if lines > len(self._room):
            self._room = zeros([CHUNK_BYTES], torch.uint8)
        taken, self._room = self._room[:size], self._room[lines:]
        return taken.view(dtype).view(*shape)
