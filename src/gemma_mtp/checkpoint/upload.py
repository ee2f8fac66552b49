"""The way of stored pieces to a device: through two buffers that copies do not wait for, so that the next piece is read
while one is under way. What is done with a piece, such as quantising it, is done where it then lies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

#: of a buffer; larger pieces go through in parts
BUFFER_BYTES = 64 << 20
BUFFERS = 2
#: takes a stored piece, and returns it where its weight is kept
Upload = Callable[[Tensor], Tensor]


class Copies(Protocol):
    """A device's runtime, as far as copies to it go. All it is asked for is done in order."""

    def buffer(self, nbytes: int) -> Tensor:
        """Returns memory of the host, uint8, that copies to the device read while the host goes on."""
        ...

    def copy(self, there: Tensor, here: Tensor) -> None:
        """Ask for a copy of bytes. The buffer must stay as it is until it is done."""
        ...

    def mark(self) -> Callable[[], None]:
        """Returns what waits until all that was asked for so far is done."""
        ...


class CudaCopies:
    """Pinned memory, and the current stream of a card."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def buffer(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def copy(self, there: Tensor, here: Tensor) -> None:
        there.copy_(here, non_blocking=True)

    def mark(self) -> Callable[[], None]:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event.synchronize


class Uploads:
    """Uploads pieces to one device, one after another."""

    def __init__(self, device: torch.device, copies: Copies) -> None:
        self._device, self._copies = device, copies
        self._buffers: list[Tensor] = []
        self._waits: list[Callable[[], None] | None] = []
        self._next = 0

    def __call__(self, stored: Tensor) -> Tensor:
        """Returns the same values on the device. What is passed in may change or go as soon as this returns."""
        there = torch.empty(stored.shape, dtype=stored.dtype, device=self._device)
        if not stored.numel():
            return there
        source = stored.detach().contiguous().reshape(-1).view(torch.uint8)
        target = there.view(-1).view(torch.uint8)
        for here, part in zip(source.split(BUFFER_BYTES), target.split(BUFFER_BYTES), strict=True):
            number = self._free()
            staged = self._buffers[number][: len(here)]
            staged.copy_(here)
            self._copies.copy(part, staged)
            self._waits[number] = self._copies.mark()
        return there

    def _free(self) -> int:
        """Returns a buffer that no copy reads any more."""
        number, self._next = self._next, (self._next + 1) % BUFFERS
        if number == len(self._buffers):
            self._buffers.append(self._copies.buffer(BUFFER_BYTES))
            self._waits.append(None)
        wait = self._waits[number]
        if wait is not None:
            wait()
        return number


def as_it_is(stored: Tensor) -> Tensor:
    """The way to weights in the host's own memory."""
    return stored


def uploads_to(device: torch.device) -> Upload:
    """Returns the way to a device."""
    return Uploads(device, CudaCopies(device)) if device.type == "cuda" else as_it_is
