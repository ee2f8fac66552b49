"""What the figures were measured on: the processor, what is installed, and how fast memory can be read."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gemma_mtp.engine import cost_cache
from gemma_mtp.ops.native import module

BANDWIDTH_BYTES = 512 << 20


def processor() -> str:
    return cost_cache.processor(torch.device("cpu"))


def instruction_set() -> str:
    """The native operators' own, chosen by the machine or GEMMA_MTP_ISA."""
    return "none (PyTorch's operators)" if module() is None else module().isa()


def describe() -> dict[str, Any]:
    """Everything about this process and machine that a figure depends on."""
    return {
        "machine": processor(), "threads": torch.get_num_threads(), "isa": instruction_set(),
        "python": platform.python_version(), "torch": torch.__version__,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "unset"),
        "load_average": os.getloadavg()[0],
    }  # fmt: skip


@dataclass
class CpuClock:
    """How busy the machine is beside the processes that are measured (Linux; elsewhere it tells nothing)."""

    ours: Sequence[int]
    started: float = field(default_factory=time.perf_counter)
    before: float = 0.0

    def __post_init__(self) -> None:
        self.before = self._elsewhere()

    def share_elsewhere(self) -> float | None:
        """Share of all cores' time since the start that other processes, or other machines on this host, took."""
        if not Path("/proc/stat").exists():
            return None
        seconds = (time.perf_counter() - self.started) * (os.cpu_count() or 1)
        return max(0.0, self._elsewhere() - self.before) / seconds

    def _elsewhere(self) -> float:
        if not Path("/proc/stat").exists():
            return 0.0
        user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
        ours = sum(_process_ticks(process) for process in self.ours)
        return (user + nice + system + irq + softirq + steal - ours) / os.sysconf("SC_CLK_TCK")


def _process_ticks(process: int) -> int:
    """User and system time; the name before them may hold spaces, but ends with a parenthesis."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def read_bandwidth(repeats: int = 7) -> float:
    """Bytes a second at which this process reads memory: the best of several sums over half a gigabyte."""
    buffer = torch.ones(BANDWIDTH_BYTES // 4)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        buffer.sum()
        seconds.append(time.perf_counter() - started)
    return BANDWIDTH_BYTES / min(seconds)
