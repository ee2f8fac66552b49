"""What glibc does with memory that this process frees. Other C libraries are left as they are."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

#: glibc's mallopt parameters (malloc.h)
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> None:
    """Keep freed blocks, instead of returning them to the system and faulting them in again at each step of training:
    single steps took up to eight seconds instead of 1.6."""
    mallopt = _glibc("mallopt")
    if mallopt is not None:
        for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 256 << 20)):
            mallopt(parameter, value)


def return_freed_memory() -> None:
    """Return freed blocks to the system, such as what rotary tables were computed from: 46 MB of 1,073 for a pair of
    112 M parameters."""
    malloc_trim = _glibc("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def _glibc(function: str) -> Any:
    """The function, or None where the C library does not have it."""
    return getattr(ctypes.CDLL(None), function, None) if sys.platform.startswith("linux") else None
