"""What the figures were measured on: the processor, what is installed, and how fast memory can be read."""

from __future__ import annotations

import os
import platform
import time
from typing import Any

import torch

from gemma_mtp.backend import processor as processors
from gemma_mtp.backend.native import native_available

BANDWIDTH_BYTES = 512 << 20


def processor() -> str:
    return processors.processor(torch.device("cpu"))


def instruction_set() -> str:
    """The native operators' own, chosen by the machine or GEMMA_MTP_ISA."""
    if not native_available():
        return "none (PyTorch's operators)"
    from gemma_mtp import _native

    return _native.isa()


def describe() -> dict[str, Any]:
    """Everything about this process and machine that a figure depends on."""
    return {
        "machine": processor(), "threads": torch.get_num_threads(), "isa": instruction_set(),
        "python": platform.python_version(), "torch": torch.__version__,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "unset"),
        "load_average": os.getloadavg()[0],
    }  # fmt: skip


def read_bandwidth(repeats: int = 7) -> float:
    """Bytes a second at which this process reads memory: the best of several sums over half a gigabyte."""
    buffer = torch.ones(BANDWIDTH_BYTES // 4)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        buffer.sum()
        seconds.append(time.perf_counter() - started)
    return BANDWIDTH_BYTES / min(seconds)
