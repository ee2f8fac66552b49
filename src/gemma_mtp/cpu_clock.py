"""How busy the machine is with other things while something is measured."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path


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
