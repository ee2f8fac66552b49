"""How kernels are launched: all the same way, so that no launch forgets rule R3."""

from __future__ import annotations

from typing import Any, Protocol

import torch


class Launch(Protocol):
    """Runs a kernel over a grid. Arguments are those of the kernel, constants by name."""

    def __call__(self, kernel: Any, grid: tuple[int, ...], *args: Any, warps: int = 4, stages: int = 2,
                 **constants: Any) -> None: ...  # fmt: skip


def on_device(
    kernel: Any, grid: tuple[int, ...], *args: Any, warps: int = 4, stages: int = 2, **constants: Any
) -> None:
    """Launch on the current stream of the first argument's device. Triton asks for the thread's current one, which in a
    new thread is the first card."""
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args, **constants, num_warps=warps, num_stages=stages, enable_fp_fusion=False)


def power_of_two(size: int) -> int:
    """Returns the smallest power of two that is no less."""
    return 1 << (size - 1).bit_length()
