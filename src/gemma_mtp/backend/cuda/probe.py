"""A first kernel on a card: whether Triton can build, load and run one there at all."""

from __future__ import annotations

import functools

import torch

from gemma_mtp.backend.cuda.launch import on_device
from gemma_mtp.backend.cuda.rows import added


@functools.cache
def failed_launch(device: torch.device) -> str | None:
    """Returns why a small kernel does not run on a card, as the part of a sentence, or None where it does.

    What may be missing is more than can be listed: a driver as new as Triton's code, a cache that can be written, a
    compiler that works.
    """
    try:
        found = added(on_device, torch.ones(3, 2, 16, device=device)).tolist()
    except Exception as error:  # whatever it is, the reference backend still runs
        said = next(iter(str(error).splitlines()), "")
        return f"a first kernel does not run ({type(error).__name__}: {said})"
    return None if found == [[3.0] * 16] * 2 else "a first kernel gives wrong numbers"
