"""Measured round costs kept between runs: one small JSON file for each machine, pair and way to run it.

A cache that is missing, unreadable, damaged or can not be written never stops a run: the costs are measured again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from gemma_mtp.backend.base import Backend
from gemma_mtp.decoding.params import ChoiceKind
from gemma_mtp.decoding.round_costs import LONGEST, RoundCosts
from gemma_mtp.errors import CheckpointError
from gemma_mtp.json_files import write_json

#: of the file's layout and of what is measured; a file of another version is measured anew
VERSION = 4
#: costs older than a day are measured anew: the machine may have been slower then
MAX_AGE_SECONDS = 24 * 3600.0

log = logging.getLogger(__name__)
Key = dict[str, str | int]


def cache_directory() -> Path | None:
    """$GEMMA_MTP_CACHE, where 0 means none, else gemma-mtp in $XDG_CACHE_HOME or in ~/.cache."""
    chosen = os.environ.get("GEMMA_MTP_CACHE", "")
    if chosen:
        return None if chosen == "0" else Path(chosen)
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    with contextlib.suppress(RuntimeError):  # no home directory
        return (base if base.is_absolute() else Path.home() / ".cache") / "gemma-mtp"
    return None


def cost_key(backend: Backend, choice: ChoiceKind = "argmax", sequences: int = 1) -> Key:
    """Returns what the costs depend on: the machine, how it is used, and both models' geometry and weight types."""
    target, drafter = backend.target, backend.drafter
    assert drafter is not None
    return {
        **backend.identity, "choice": choice, "sequences": sequences, "torch": torch.__version__,
        "target": _digest(target, target.config), "drafter": _digest(drafter, drafter.config),
    }  # fmt: skip


def load_costs(directory: Path, key: Key) -> RoundCosts | None:
    """The costs stored for a key, or None where there are none, or none to trust."""
    path = _path(directory, key)
    try:
        if time.time() - path.stat().st_mtime > MAX_AGE_SECONDS:
            return None
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not _usable(content, key):
        return None
    return RoundCosts(dict(enumerate(content["seconds"])), dict(enumerate(content["drafting"])))


def store_costs(directory: Path, key: Key, costs: RoundCosts) -> None:
    """Write costs under a temporary name, then rename the file into place; where that fails, a log line says so."""
    content = {"version": VERSION, "key": key, "seconds": costs.seconds, "drafting": costs.drafting}
    try:
        write_json(_path(directory, key), content)
    except CheckpointError as error:
        log.info("measured round costs are not kept: %s", error)


def _path(directory: Path, key: Key) -> Path:
    return directory / f"costs-{_hash([json.dumps(key, sort_keys=True)])}.json"


def _usable(content: Any, key: Key) -> bool:
    if not isinstance(content, dict) or content.get("version") != VERSION or content.get("key") != key:
        return False
    seconds, drafting = _durations(content.get("seconds")), _durations(content.get("drafting"))
    return bool(seconds and drafting) and min(seconds) > 0


def _durations(values: Any) -> list[float]:
    """Returns the seconds of 0 to LONGEST drafts; none where the values are something else."""
    right = isinstance(values, list) and len(values) == LONGEST + 1 and all(map(_is_duration, values))
    return values if right else []


def _is_duration(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value) and value >= 0


def _digest(model: torch.nn.Module, config: Any) -> str:
    """Of a model's geometry and of its tensors' names, shapes and types; not of their values."""
    tensors = sorted((name, tuple(t.shape), str(t.dtype)) for name, t in model.state_dict().items())
    return _hash([json.dumps(dataclasses.asdict(config), sort_keys=True, default=str), *map(str, tensors)])


def _hash(texts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
