"""Directories of checkpoints, and the JSON files in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gemma_mtp.errors import CheckpointError
from gemma_mtp.files.replace import replace_text

#: what a checkpoint may be
EXPECTED = "a directory in the Hugging Face layout, or a GGUF file, whose name ends in .gguf"


def shown(value: Any) -> str:
    """A value of a JSON file in a message, cut off where it is long."""
    return repr(value)[:80]


def existing(directory: str | Path) -> Path:
    """The directory as a path. Raises CheckpointError where it is none."""
    path = Path(directory)
    if not path.is_dir():
        what = "is a file of another kind" if path.exists() else "does not exist"
        raise CheckpointError(f"checkpoint {path} {what}; give {EXPECTED}.")
    return path


def read_json(path: Path) -> Any:
    """A JSON file's content. Raises CheckpointError naming the file, and the line where it is malformed."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} has no {path.name}; give"
            f" {EXPECTED if path.name == 'config.json' else 'a directory in the Hugging Face layout'}."
        ) from None
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{path} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}."
        ) from None
    except (OSError, ValueError, RecursionError) as error:  # not UTF-8, a number too long, nested too deep
        raise CheckpointError(f"{path} can not be read: {error}.") from None


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file under a temporary name, then rename it into place. Raises CheckpointError."""
    replace_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
