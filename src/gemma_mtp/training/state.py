"""Checkpoints of a training run: one safetensors file, replaced whole, so that a kill at any moment leaves the last."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from gemma_mtp.checkpoint.tensor_files import load_tensors, save_tensors
from gemma_mtp.errors import CheckpointError, TrainingError
from gemma_mtp.files.safetensors import read_header
from gemma_mtp.training.optim import Masters, Optimiser


def save_state(
    path: Path, masters: Masters, optimiser: Optimiser, facts: Mapping[str, Any], more: Mapping[str, Tensor]
) -> None:
    """Write weights, optimiser state, `facts` (JSON values) and `more` tensors."""
    tensors = {f"masters.{name}": p.detach() for name, p in masters.fp32.items()}
    tensors |= {f"optimiser.{name}": tensor for name, tensor in optimiser.tensors().items()}
    tensors |= {f"more.{name}": tensor for name, tensor in more.items()}
    save_tensors(path, tensors, {"facts": json.dumps(facts)})


def load_facts(path: Path) -> dict[str, Any]:
    """The `facts` of a checkpoint alone. Raises TrainingError where there are none."""
    try:
        facts: dict[str, Any] = json.loads(read_header(path).metadata["facts"])
        facts["recipe"]
    except (CheckpointError, KeyError, TypeError, ValueError) as error:
        raise TrainingError(f"{path} can not be resumed ({error}); remove it to start anew.") from None
    return facts


def load_state(path: Path, masters: Masters, optimiser: Optimiser) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Take up what `save_state` wrote. Returns its `facts` and `more`. Raises TrainingError where it does not fit."""
    parts: dict[str, dict[str, Tensor]] = {"masters": {}, "optimiser": {}, "more": {}}
    try:
        tensors, metadata = load_tensors(path)
        facts = json.loads(metadata["facts"])
        for key, tensor in tensors.items():
            part, name = key.split(".", 1)
            parts[part][name] = tensor
        masters.load(parts["masters"])
        optimiser.load(parts["optimiser"])
    except (CheckpointError, KeyError, ValueError, RuntimeError) as error:
        raise TrainingError(
            f"{path} can not be resumed ({error}); it belongs to another run: remove it to start anew."
        ) from None
    return facts, parts["more"]
