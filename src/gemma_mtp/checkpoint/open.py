"""Decides which format a checkpoint is in: the one place that knows all of them."""

from __future__ import annotations

from pathlib import Path

from gemma_mtp.checkpoint.safetensors import SafetensorsSource
from gemma_mtp.checkpoint.source import Location, Source


def open_source(location: Location) -> Source:
    """Returns the checkpoint that lies there; one that is open already is returned as it is.

    Raises CheckpointError where there is none.
    """
    if not isinstance(location, str | Path):
        return location
    return SafetensorsSource(Path(location))
