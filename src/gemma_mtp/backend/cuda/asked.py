"""Whether the environment asks for the Triton kernels. Needs neither PyTorch nor Triton, for who only counts."""

from __future__ import annotations

import os

#: asks for the kernels: they have been seen on no card yet, so nothing runs on them unasked
ASKED_BY = "GEMMA_MTP_CUDA"


def asked() -> bool:
    """Whether models on a card are to run by the kernels."""
    return os.environ.get(ASKED_BY) == "1"
