"""What memory a device has left."""

from __future__ import annotations

import torch

from gemma_mtp.sizes.machine import free_memory


def device_free_bytes(device: torch.device) -> int | None:
    """Returns the bytes that can still be taken on a device; None where nobody tells."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_memory() if device.type == "cpu" else None
