"""What memory a device has left."""

from __future__ import annotations

import threading

import torch

from gemma_mtp.sizes.machine import free_memory

#: of a card's free memory, what activations and other work of PyTorch's operators take beside keys and values
CARD_RESERVE_BYTES = 1_500_000_000
#: of the machine's free memory, what keys and values may take: rounds and other programs take some, too
HOST_SHARE = 0.9
#: held by who waits for a card as a whole and gives its memory back, which nobody may while a CUDA graph is recorded
WHOLE_CARD = threading.Lock()


def give_back(device: torch.device) -> None:
    """Wait until a card has done all it was asked for, and give back what PyTorch keeps of its memory for later."""
    with WHOLE_CARD, torch.cuda.device(device):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def device_free_bytes(device: torch.device) -> int | None:
    """Returns the bytes that can still be taken on a device; None where nobody tells. What PyTorch keeps of a card for
    later is free."""
    if device.type == "cuda":
        give_back(device)
        return int(torch.cuda.mem_get_info(device)[0])
    return free_memory() if device.type == "cpu" else None


def free_for_pool(device: torch.device, workspace: int) -> int | None:
    """Returns the bytes that keys and values may take on a device whose weights are loaded, where decoding takes
    `workspace` of a card beside them; None where nobody tells."""
    free = device_free_bytes(device)
    if free is None:
        return None
    return max(0, free - workspace) if device.type == "cuda" else int(HOST_SHARE * free)
