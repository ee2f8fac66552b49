"""What is looked at before a pair is loaded: which drafter belongs to a target, and whether the weights fit."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from gemma_mtp import checkpoint
from gemma_mtp.backend.device_memory import device_free_bytes
from gemma_mtp.checkpoint import Location
from gemma_mtp.config import TargetConfig
from gemma_mtp.config.pairing import pair_verdict
from gemma_mtp.errors import CheckpointError
from gemma_mtp.locate import drafter_places, find_drafter
from gemma_mtp.sizes.weights import weight_bytes
from gemma_mtp.units import shown_bytes
from gemma_mtp.weight_types import UNIFORM, WeightTypes

logger = logging.getLogger("gemma_mtp")


def drafter_of(target: Location, config: TargetConfig) -> str | Path | None:
    """Returns where the drafter of a target lies, found by the target's name. Where there is none, or where what is
    there does not fit, None, and a warning says so."""
    if not isinstance(target, str | Path):
        target = target.path
    found = find_drafter(target)
    if found is None:
        looked = " and ".join(map(str, drafter_places(target)))
        logger.warning(
            "no drafter of %s was found%s, so decoding is plain: give --drafter, or --no-drafter to go without.",
            target, f" ({looked})" if looked else "",
        )  # fmt: skip
        return None
    misfit = pair_verdict(config, checkpoint.read_drafter_config(found))
    if misfit is not None:
        logger.warning("%s is not used, so decoding is plain: %s", found, misfit)
        return None
    logger.info("drafter %s, found by the target's name", found)
    return found


def check_weights_fit(
    path: Path, config: TargetConfig, types: WeightTypes, dtype: torch.dtype, device: torch.device,
    held: int | None = None,
) -> None:  # fmt: skip
    """Raise CheckpointError where a target's weights are larger than what the device has left, saying what would fit.
    `held`: the bytes that they take where some stay as they are stored."""
    free = device_free_bytes(device)
    size = weight_bytes(config, types, dtype.itemsize) if held is None else held
    if free is None or size <= free:
        return
    smaller = {kind: weight_bytes(config, UNIFORM[kind], dtype.itemsize) for kind in ("int8", "int4")}
    fitting = [f"--quantize {kind} takes {shown_bytes(n)}" for kind, n in smaller.items() if n <= min(free, size - 1)]
    advice = " and ".join(fitting) if fitting and not types else "use a smaller model or more memory"
    raise CheckpointError(
        f"{path}: the target's weights take {shown_bytes(size)}, but {shown_bytes(free)} of memory are free; {advice}."
    )
