"""What a machine has: cores, memory, how fast it is read, and which PyTorch. None of it imports PyTorch."""

from __future__ import annotations

import functools
import math
import os
import sys
import threading
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np

#: of PyTorch
Build = Literal["cpu", "cuda"]
CGROUP = Path("/sys/fs/cgroup")
#: of an array that no cache holds, in bytes a thread, and how often it is read
PROBE_BYTES, PROBE_REPEATS = 64 << 20, 5


def cores() -> int:
    """Returns the cores that this process may use: those that it may run on, or its container's share of them."""
    allowed = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    share = _cgroup_cores()
    return allowed if share is None else max(1, min(allowed, math.ceil(share)))


def total_memory() -> int | None:
    """Returns the bytes of memory that this process may have: the machine's, or its container's where that is less.

    None where the system does not tell.
    """
    found = [size for size in (_meminfo().get("MemTotal"), _cgroup_limit()) if size]
    return min(found, default=None)


def free_memory() -> int | None:
    """Returns the bytes that can still be taken without anything being swapped out; None where nobody tells."""
    found = [size for size in (_meminfo().get("MemAvailable"), _cgroup_free()) if size is not None]
    return min(found, default=None)


def read_bandwidth(threads: int | None = None) -> float:
    """Returns bytes a second that all cores together read of memory: the best of a few passes over arrays."""
    count = threads or cores()
    arrays = [np.ones(PROBE_BYTES // 4, dtype=np.float32) for _ in range(count)]
    best = 0.0
    for _ in range(PROBE_REPEATS):
        workers = [threading.Thread(target=np.maximum.reduce, args=(array,)) for array in arrays]
        began = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best = max(best, count * PROBE_BYTES / (time.perf_counter() - began))
    return best


@functools.cache
def torch_build() -> Build:
    """Returns which build of PyTorch this Python would import, by its libraries; "cpu" where there is none."""
    spec = find_spec("torch")
    folders = (spec.submodule_search_locations if spec else None) or ()
    return "cuda" if any(next(Path(folder, "lib").glob("*torch_cuda.*"), None) for folder in folders) else "cpu"


def _meminfo() -> Mapping[str, int]:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        pages = [os.sysconf_names.get(name) for name in ("SC_PHYS_PAGES", "SC_PAGE_SIZE")]
        if None in pages:
            return {}
        return {"MemTotal": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")}
    return {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}


def _cgroup_cores() -> float | None:
    """How many cores' time the container has; None where it is not limited."""
    try:
        quota, period = (CGROUP / "cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        quota, period = (str(_number(CGROUP / f"cpu/cpu.cfs_{name}_us")) for name in ("quota", "period"))
    if not (quota.isdigit() and period.isdigit() and int(period)):
        return None
    return int(quota) / int(period)


def _cgroup_limit() -> int | None:
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        limit = _number(CGROUP / name)
        if limit is not None and limit < 1 << 60:
            return limit
    return None


def _cgroup_free() -> int | None:
    """What the container may still take; files that it has in the page cache are given up for it."""
    limit = _cgroup_limit()
    for name, stat in (("memory.current", "memory.stat"), ("memory/memory.usage_in_bytes", "memory/memory.stat")):
        used = _number(CGROUP / name)
        if limit is not None and used is not None:
            return max(0, limit - used + _inactive_files(CGROUP / stat))
    return None


def _inactive_files(path: Path) -> int:
    try:
        entries = dict(line.split() for line in path.read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        return 0
    return int(entries.get("total_inactive_file", entries.get("inactive_file", 0)))


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
