"""Writes a quantised copy of a checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gemma_mtp.checkpoint.load import load_drafter, load_target
from gemma_mtp.checkpoint.open import open_source
from gemma_mtp.checkpoint.read import read_config, stored_dtypes
from gemma_mtp.checkpoint.save import save_drafter, save_target
from gemma_mtp.checkpoint.source import Location
from gemma_mtp.config import TargetConfig
from gemma_mtp.errors import CheckpointError, QuantisationError
from gemma_mtp.json_files import write_json
from gemma_mtp.weight_types import WeightTypes, weight_types_to_hf


def write_quantised_copy(location: Location, out: str | Path, types: WeightTypes, strict: bool = False) -> WeightTypes:
    """Write a target's text model, or a drafter, to the new directory `out`, quantised, with its tokenizer's files.

    `config.json` is the source's, with a `quantization_config`. Returns how the parts of the copy are quantised. The
    copy gives bit for bit what quantising the source while loading gives. Nothing is left where it fails. Peak memory
    is that of `load_target`, and `strict` as there. Raises CheckpointError, ConfigError or QuantisationError.
    """
    source = open_source(location)
    config = read_config(source)
    kind = "target" if isinstance(config, TargetConfig) else "drafter"
    wanted = types.of_target() if isinstance(config, TargetConfig) else types.of_drafter()
    if not wanted:
        raise QuantisationError(f"{source.path} is a {kind}, and no part of a {kind} was asked to be quantised.")
    dtype = _dtype(stored_dtypes(source))
    with _new_directory(Path(out)) as directory:
        if isinstance(config, TargetConfig):
            target = load_target(source, dtype, types=wanted, strict=strict)
            save_target(target, config, directory, dtype)
            made, tied = target.weight_types, target.lm_head is None
        else:
            drafter = load_drafter(source, dtype, types=wanted, strict=strict)
            save_drafter(drafter, config, directory, dtype)
            made, tied = drafter.weight_types, drafter.lm_head is None
        written: dict[str, Any] = {
            "quantization_config": weight_types_to_hf(made), "dtype": str(dtype).removeprefix("torch."),
        }  # fmt: skip
        if tied != config.text.tie_word_embeddings:  # the weights decided otherwise
            written["tie_word_embeddings"] = tied
        write_json(directory / "config.json", {**source.config(), **written})
        source.copy_companions(directory)
    return made


def _dtype(stored: set[str]) -> torch.dtype:
    """One that holds every stored one's values."""
    dtypes = {"BF16": torch.bfloat16, "F16": torch.float16}
    return dtypes.get(next(iter(stored)), torch.float32) if len(stored) == 1 else torch.float32


@contextmanager
def _new_directory(path: Path) -> Iterator[Path]:
    """A directory to fill beside `path`, renamed to it at the end, or removed where filling it fails."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise CheckpointError(f"{path} is there already and is no empty directory; give a new one.")
    partial = path.with_name(f".{path.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        partial.replace(path)
    except OSError as error:
        raise CheckpointError(f"{path} can not be written: {error}.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
