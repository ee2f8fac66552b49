"""Writes a checkpoint of an official geometry whose weights are all zero and take no room on the disk.

    python tools/sparse_checkpoint.py gemma-4-31B-it /tmp/31b

The files are as long as the real ones, and sparse: what is not written reads as zeros. So whatever reads a checkpoint
can be tried at its real size.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from gemma_mtp.checkpoint import SINGLE_FILE, empty_model, stored_tensors
from gemma_mtp.checkpoint.load import ORDERING
from gemma_mtp.checkpoint.pieces import NAMES, bytes_of
from gemma_mtp.checkpoint.safetensors import INDEX_FILE
from gemma_mtp.checkpoint.save import stored_name
from gemma_mtp.config import PRESETS, DrafterConfig, TargetConfig, config_to_hf
from gemma_mtp.files.safetensors import Layout, lay_out, shards
from gemma_mtp.json_files import write_json
from gemma_mtp.weight_types import WeightTypes


def write_sparse(config: TargetConfig | DrafterConfig, directory: Path, shard_bytes: int | None = None) -> Path:
    """Write a model's directory in bfloat16, in one file or in shards of at most so many bytes. Returns it."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = stored_tensors(empty_model(config, WeightTypes(), torch.bfloat16).checkpoint_tensors())
    layout = {stored_name(name, config): (NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
    if shard_bytes is None:
        files: dict[str, Layout] = {SINGLE_FILE: layout}
    else:
        parts = list(shards(layout, shard_bytes))
        files = {f"model-{i:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts, 1)}
        weight_map = {name: file for file, part in files.items() for name in part}
        write_json(directory / INDEX_FILE, {"metadata": {}, "weight_map": weight_map})
    for file, part in files.items():
        entries = lay_out(directory / file, part, {"format": "pt"})
        if ORDERING in entries:  # the one tensor that zeros do not do for
            with (directory / file).open("r+b") as opened:
                opened.seek(entries[ORDERING].offset)
                opened.write(bytes_of(torch.arange(config.text.vocab_size)))
    raw = config_to_hf(config)
    write_json(directory / "config.json", {**raw, "dtype": "bfloat16"})
    return directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(PRESETS))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--shard-bytes", type=int, help="Write shards of at most so many bytes; default: one file.")
    args = parser.parse_args()
    print(write_sparse(PRESETS[args.name], args.directory, args.shard_bytes))


if __name__ == "__main__":
    main()
