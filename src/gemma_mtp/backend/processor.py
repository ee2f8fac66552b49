"""What a device is called: what was measured on one processor says nothing about another."""

from __future__ import annotations

import contextlib
import platform
from pathlib import Path

import torch

from gemma_mtp.sizes.machine import cores


def processor(device: torch.device) -> str:
    """The name of the processor that a device is. Virtual machines give different ones the same name ("AMD EPYC"), so
    family and model are part of it."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    facts: dict[str, str] = {}
    with contextlib.suppress(OSError):
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0]
        facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
    name = facts.get("model name") or platform.processor() or platform.machine()
    exactly = "".join(
        f", {fact.removeprefix('cpu ')} {facts[fact]}" for fact in ("cpu family", "model") if fact in facts
    )
    return f"{name}{exactly}, {cores()} cores"
