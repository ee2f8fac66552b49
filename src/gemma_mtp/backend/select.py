"""The one place where a backend is chosen."""

from __future__ import annotations

import torch

from gemma_mtp.backend.base import Backend
from gemma_mtp.backend.cuda.usable import usable as cuda_usable
from gemma_mtp.backend.native import readable, usable
from gemma_mtp.backend.reference import ReferenceBackend
from gemma_mtp.model.drafter import Drafter
from gemma_mtp.model.target import Target


def make_backend(target: Target, drafter: Drafter | None = None) -> Backend:
    """Returns the fastest backend for loaded models: the native operators where they can run them, else PyTorch's.

    A drafter of another dtype or device than the target's must fit the same backend. The Triton kernels are taken where
    GEMMA_MTP_CUDA=1 asks for them, with a warning where they can not run the pair.
    """
    if cuda_usable(target, drafter):
        from gemma_mtp.backend.cuda.backend import CudaBackend  # which can be imported only where Triton is

        return CudaBackend(target, drafter)
    models = [model for model in (target, drafter) if model is not None]
    if all(usable(m.embed_tokens.device, m.embed_tokens.dtype) and readable(m) for m in models):
        from gemma_mtp.backend.cpu import CpuBackend  # which can be imported only where the operators were built

        return CpuBackend(target, drafter)
    return ReferenceBackend(target, drafter)


def kv_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Returns in which dtype the backend that would run models of such a device and dtype keeps keys and values."""
    if usable(device, dtype):
        from gemma_mtp.backend.cpu import CpuBackend

        return CpuBackend.kv_dtype
    return dtype  # as the reference does
