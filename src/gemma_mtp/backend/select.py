"""The one place where a backend is chosen."""

from __future__ import annotations

from gemma_mtp.backend.base import Backend
from gemma_mtp.backend.native import usable
from gemma_mtp.backend.reference import ReferenceBackend
from gemma_mtp.model.drafter import Drafter
from gemma_mtp.model.target import Target


def make_backend(target: Target, drafter: Drafter | None = None) -> Backend:
    """Returns the fastest backend for loaded models: the native operators where they can run them, else PyTorch's.

    A drafter of another dtype or device than the target's must fit the same backend.
    """
    if usable(target.embed_tokens.weight) and (drafter is None or usable(drafter.embed_tokens.weight)):
        from gemma_mtp.backend.cpu import CpuBackend  # which can be imported only where the operators were built

        return CpuBackend(target, drafter)
    return ReferenceBackend(target, drafter)
