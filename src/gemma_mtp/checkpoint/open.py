"""Decides which format a checkpoint is in: the one place that knows all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gemma_mtp.checkpoint.safetensors import SafetensorsSource
from gemma_mtp.checkpoint.source import Location, Source
from gemma_mtp.locate import Role, locate

#: formats that are one file, by the end of its name; all else is a directory in the Hugging Face layout
FILE_FORMATS: dict[str, Callable[[Path], Source]] = {}


def open_source(location: Location, role: Role = "target") -> Source:
    """Returns the checkpoint that lies there, or that has this name (`locate`), of which `role` says which model is
    meant where a name stands for a pair. One that is open already is returned as it is.

    Raises CheckpointError where there is none.
    """
    if not isinstance(location, str | Path):
        return location
    path = locate(location, role)
    opened = None if path.is_dir() else FILE_FORMATS.get(path.suffix)
    return SafetensorsSource(path) if opened is None else opened(path)
