"""A dense Gemma 4 pair as GGUF, for llama.cpp (architectures `gemma4` and `gemma4-assistant`).

There is no tokenizer inside: the files are driven by token ids.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from gemma_mtp.interop.gguf import export_gguf

#: part of a file's name: another recipe writes other files
RECIPE = 2


def gguf_pair(target: Path, drafter: Path, kind: str, cache: Path) -> tuple[Path, Path]:
    """Both files, of matrices of type `kind` (F32, BF16, Q8_0, Q4_0), written to `cache` at the first call.

    llama.cpp scores a drafter's whole vocabulary: a centroid head's tensors are left out.
    """
    return _written(target, "target", kind, cache), _written(drafter, "drafter", kind, cache)


def _written(directory: Path, role: str, kind: str, cache: Path) -> Path:
    """The file of a checkpoint's present content, by its path, size and time of change."""
    state = [
        [str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(directory.iterdir())
    ]
    key = hashlib.sha256(json.dumps([RECIPE, state]).encode()).hexdigest()[:12]
    file = cache / "gguf" / f"{role}-{kind}-{key}.gguf"
    if not file.exists():
        export_gguf(directory, file, kind, tokenizer=None)
    return file
