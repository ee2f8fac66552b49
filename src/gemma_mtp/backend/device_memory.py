"""What memory a device has left."""

from __future__ import annotations

import torch

from gemma_mtp.sizes.machine import free_memory

#: of a card's free memory, what the driver, activations and other work take beside keys and values
CARD_RESERVE_BYTES = 1_500_000_000
#: of the machine's free memory, what keys and values may take: rounds and other programs take some, too
HOST_SHARE = 0.9


def device_free_bytes(device: torch.device) -> int | None:
    """Returns the bytes that can still be taken on a device; None where nobody tells."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_memory() if device.type == "cpu" else None


def free_for_pool(device: torch.device) -> int | None:
    """Returns the bytes that keys and values may take on a device whose weights are loaded; None where nobody tells."""
    free = device_free_bytes(device)
    if free is None:
        return None
    return max(0, free - CARD_RESERVE_BYTES) if device.type == "cuda" else int(HOST_SHARE * free)
