"""Safetensors files of tensors that are wholly in memory: what a training run keeps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from gemma_mtp.checkpoint.pieces import NAMES, bytes_of, read_pieces
from gemma_mtp.files.replace import replace_file
from gemma_mtp.files.safetensors import SafetensorsWriter, read_header


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a file of tensors, whole or not at all. Raises CheckpointError."""
    layout = {name: (NAMES[tensor.dtype], tensor.shape) for name, tensor in tensors.items()}

    def write(partial: Path) -> None:
        with SafetensorsWriter(partial, layout, metadata) as writer:
            for name, tensor in tensors.items():
                writer.write(name, bytes_of(tensor))

    replace_file(path, write)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns a file's tensors and its metadata. Raises CheckpointError where it is missing or damaged."""
    header = read_header(path)
    values = read_pieces((tensor, None) for tensor in header.tensors.values())
    return dict(zip(header.tensors, values, strict=True)), header.metadata
