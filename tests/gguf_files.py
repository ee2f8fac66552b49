"""GGUF files made by the `gguf` package, for tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

#: values of metadata by key, in place of those of a file; None leaves a key out
Changed = Mapping[str, Any]


def rewritten(
    source: Path,
    out: Path,
    tensors: Mapping[str, tuple[np.ndarray, str] | None] | None = None,
    metadata: Changed | None = None,
    architecture: str | None = None,
) -> Path:
    """Read a file and write it again, both by the package, with some tensors and values of metadata replaced.

    A tensor is its array and its type, blocks as their bytes; None leaves it out. An architecture renames its keys.
    """
    reader = gguf.GGUFReader(source)
    old = str(reader.fields["general.architecture"].contents())
    writer = gguf.GGUFWriter(out, architecture or old)
    values = {key: (field.contents(), field.types) for key, field in reader.fields.items() if "." in key}
    for key, (value, types) in values.items():
        if key not in (metadata or {}) and key != "general.architecture":
            name = key.replace(f"{old}.", f"{architecture or old}.", 1)
            writer.add_key_value(name, value, types[0], types[1] if len(types) > 1 else None)
    for key, value in (metadata or {}).items():
        if value is not None:
            add(writer, key, value)
    kept: dict[str, tuple[np.ndarray, str]] = {
        tensor.name: (np.array(tensor.data), tensor.tensor_type.name) for tensor in reader.tensors
    }
    for name, tensor in {**kept, **(tensors or {})}.items():
        if tensor is not None:
            writer.add_tensor(name, tensor[0], raw_dtype=gguf.GGMLQuantizationType[tensor[1]])
    close(writer)
    return out


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """One value of metadata, of the type that fits."""
    if isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_array(key, value)


def close(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def blocks(kind: str, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Random rows of blocks, uint8, whose float16 scales are small numbers."""
    values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    rng = np.random.default_rng(seed)
    made = rng.integers(0, 256, (rows * columns // values, size), dtype=np.uint8)
    scales = (rng.random((len(made), 2)) / 500).astype(np.float16).view(np.uint8)
    if kind == "Q6_K":
        made[:, -2:] = scales[:, :2]
    else:
        made[:, : 4 if kind.endswith("_K") else 2] = scales[:, : 4 if kind.endswith("_K") else 2]
    return made.reshape(rows, -1)
