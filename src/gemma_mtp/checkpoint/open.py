"""Decides which format a checkpoint is in: the one place that knows all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gemma_mtp.checkpoint.adapter import AdaptedSource, Adapter
from gemma_mtp.checkpoint.gguf import SUFFIX, GgufSource, gguf_in
from gemma_mtp.checkpoint.quantisations.source import readable
from gemma_mtp.checkpoint.safetensors import SafetensorsSource
from gemma_mtp.checkpoint.source import Location, Source
from gemma_mtp.errors import CheckpointError
from gemma_mtp.locate import Role, locate

#: formats that are one file, by the end of its name; all else is a directory in the Hugging Face layout
FILE_FORMATS: dict[str, Callable[[Path], Source]] = {SUFFIX: GgufSource}


def open_source(location: Location, role: Role = "target", adapter: str | Path | None = None) -> Source:
    """Returns the checkpoint that lies there, or that has this name (`locate`), of which `role` says which model is
    meant where a name stands for a pair. One that is open already is returned as it is.

    A directory without safetensors files may hold a file of another format. `adapter` is the directory of a PEFT
    adapter, which is merged into its weights as they are read. Raises CheckpointError where there is no checkpoint, or
    an adapter that can not be merged.
    """
    source = _opened(location, role)
    if adapter is None:
        return source
    if isinstance(source, GgufSource):
        raise CheckpointError(f"{source.path} is a GGUF file, into which no adapter is merged; give its safetensors.")
    return AdaptedSource(source, Adapter(adapter))


def _opened(location: Location, role: Role) -> Source:
    if not isinstance(location, str | Path):
        return location
    path = locate(location, role)
    if path.is_dir():
        file = None if any(path.glob("*.safetensors")) else gguf_in(path)
        return readable(SafetensorsSource(path)) if file is None else GgufSource(file)
    opened = FILE_FORMATS.get(path.suffix)
    return readable(SafetensorsSource(path)) if opened is None else opened(path)
