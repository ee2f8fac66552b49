"""Checkpoints of official sizes, and larger than memory: sparse files, opened where memory is limited."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import PLE, TINY, random_target, same_weights
from safetensors.torch import load_file
from sparse_checkpoint import write_sparse

from gemma_mtp.checkpoint import SINGLE_FILE, load_target, read_headers, save_target
from gemma_mtp.checkpoint.pieces import NAMES
from gemma_mtp.checkpoint.quantised_copy import write_quantised_copy
from gemma_mtp.checkpoint.safetensors import INDEX_FILE
from gemma_mtp.config import PRESETS, TargetConfig
from gemma_mtp.errors import CheckpointError
from gemma_mtp.files.safetensors import lay_out
from gemma_mtp.json_files import read_json
from gemma_mtp.measure.memory import inspect_checkpoint
from gemma_mtp.sizes.machine import torch_build
from gemma_mtp.sizes.run import PROCESS_BYTES
from gemma_mtp.weight_types import parse_weight_types

linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux' /proc")
SIZES = ["E2B", "E4B", "12B", "26B-A4B", "31B"]
#: bytes of the official drafters' files (FACTS of the hub), which the sparse ones have to the byte
OFFICIAL_BYTES = {"E2B": 157_565_344, "E4B": 159_138_208, "12B": 845_719_296, "31B": 939_042_560}

#: one large token table, and a few small layers
TABLE = dataclasses.replace(
    TINY, vocab_size=131_072, hidden_size=1024, num_hidden_layers=2, layer_types=TINY.layer_types[1:3],
    num_kv_shared_layers=0, use_double_wide_mlp=False, hidden_size_per_layer_input=0,
)  # fmt: skip
TABLE_BYTES = 2 * 131_072 * 1024


def measured(script: str, *arguments: object) -> list[int]:
    """Numbers that a process of its own prints, with `peak` and `limit_memory` at hand."""
    command = [sys.executable, "-c", MEMORY + script, *map(str, arguments)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    return [int(word) for line in ran.stdout.splitlines() if not line.startswith("{") for word in line.split()]


MEMORY = """
import resource, sys
from pathlib import Path

def status(name):
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines()
                if line.startswith(name))

def peak():  # not ru_maxrss, which a child inherits from its parent across exec
    return status("VmHWM")

def limit_memory(nbytes):  # of addresses, which count what is mapped too
    limit = status("VmSize") + nbytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
"""

INSPECT = """
import contextlib, io
from gemma_mtp.cli import main
with contextlib.redirect_stdout(io.StringIO()):
    codes = [main(["inspect", *sys.argv[i : i + 2]]) for i in range(1, len(sys.argv), 2)]
assert set(codes) == {0}, codes
print(peak())
"""

QUANTISE = """
import mmap
import torch
from gemma_mtp.checkpoint import load_target
from gemma_mtp.checkpoint.quantised_copy import write_quantised_copy
from gemma_mtp.cli import main
from gemma_mtp.errors import CheckpointError
from gemma_mtp.weight_types import parse_weight_types

small, source, out = map(Path, sys.argv[1:])
types = parse_weight_types("int8")
write_quantised_copy(small, out / "small-copy", types)  # imports and pools that any run takes
load_target(small, torch.bfloat16, types=types)
before = peak()
limit_memory(240 << 20)
with (source / "model.safetensors").open("rb") as file:
    try:
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError:
        pass
    else:
        raise AssertionError("the limit is none")
assert main(["inspect", str(source), "--json"]) == 0
write_quantised_copy(source, out / "copy", types)
print(peak() - before)
loaded = load_target(source, torch.bfloat16, types=types)
print(sum(weight.nbytes for weight in loaded.checkpoint_tensors().values()), peak() - before)
del loaded
try:
    load_target(source, torch.bfloat16)
except CheckpointError as error:
    assert "source takes 270 MB of memory, which cpu does not give" in str(error), error
    assert "quantise it while loading" in str(error)
else:
    raise AssertionError("it fits")
"""


@linux
def test_inspecting_official_sizes_takes_less_than_decoding(tmp_path: Path) -> None:
    """Together 160 GB of files, which take next to no room on the disk. What a process takes that decodes, its models
    left out, is PyTorch but for some 70 MB."""
    names = [f"gemma-4-{size}-it{kind}" for size in SIZES for kind in ("", "-assistant")]
    paths = [write_sparse(PRESETS[name], tmp_path / name) for name in names]
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors")) > 150e9
    assert sum(512 * path.stat().st_blocks for path in tmp_path.rglob("*")) < 20e6
    (most,) = measured(INSPECT, *paths)
    print(f"peak {most / 1e6:.0f} MB")
    assert most < PROCESS_BYTES[torch_build()]


@pytest.mark.parametrize("size", OFFICIAL_BYTES)
def test_sparse_drafters_are_as_long_as_the_official_files(size: str, tmp_path: Path) -> None:
    directory = write_sparse(PRESETS[f"gemma-4-{size}-it-assistant"], tmp_path)
    assert (directory / SINGLE_FILE).stat().st_size == OFFICIAL_BYTES[size]


def with_a_tower(directory: Path, nbytes: int) -> Path:
    """The same checkpoint with a vision tower of so many bytes of zeros."""
    layout = {name: (header.dtype, header.shape) for name, header in read_headers(directory).items()}
    lay_out(directory / SINGLE_FILE, {**layout, "model.vision_tower.weight": ("BF16", (nbytes // 2048, 1024))})
    return directory


@linux
def test_quantising_a_file_larger_than_memory(tmp_path: Path) -> None:
    """A file of 64 GB, of which a table of 268 MB is read, where 240 MB of addresses may be had, those of maps too.
    What would not fit is refused in a sentence."""
    source = with_a_tower(write_sparse(TargetConfig(TABLE, "gemma4"), tmp_path / "source"), 64 << 30)
    few_rows = dataclasses.replace(TABLE, vocab_size=512)
    small = write_sparse(TargetConfig(few_rows, "gemma4"), tmp_path / "small")
    shown = measured(QUANTISE, small, source, tmp_path)
    copying, weights, loading = shown[-3:]
    print(
        f"peak grew by {copying / 1e6:.0f} MB, and loading {weights / 1e6:.0f} MB of weights by {loading / 1e6:.0f} MB"
    )
    assert copying < 140e6  # two pieces of 32 MB, and what is made of one
    assert loading < weights + 90e6
    tensors = load_file(tmp_path / "copy" / SINGLE_FILE)
    table = tensors["model.language_model.embed_tokens.weight"]
    assert (table.dtype, table.nbytes) == (torch.int8, TABLE_BYTES // 2) and not table.any()
    assert "model.vision_tower.weight" not in tensors


@pytest.mark.parametrize("kinds", ["int8", "int4", "target=int4,embeddings=int4"])
def test_a_copy_in_shards(kinds: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written in pieces to many files, it is what is loaded in one go, bit for bit."""
    types = parse_weight_types(kinds)
    save_target(random_target(config=PLE), TargetConfig(PLE, "gemma4"), tmp_path / "source")
    expected = load_target(tmp_path / "source", torch.bfloat16, types=types).checkpoint_tensors()
    monkeypatch.setattr("gemma_mtp.checkpoint.tensors.PIECE_BYTES", 3000)
    monkeypatch.setattr("gemma_mtp.checkpoint.save.SHARD_BYTES", 20_000)
    write_quantised_copy(tmp_path / "source", tmp_path / "copy", types)
    same_weights(load_target(tmp_path / "copy", torch.bfloat16).checkpoint_tensors(), expected)
    index = read_json(tmp_path / "copy" / INDEX_FILE)
    files = sorted((tmp_path / "copy").glob("*.safetensors"))
    assert [path.name for path in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, 1 + len(files))
    ]
    assert len(files) > 3
    held = {path.name: load_file(path) for path in files}
    assert index["weight_map"] == {name: file for file, tensors in held.items() for name in tensors}
    sizes = [[tensor.nbytes for tensor in tensors.values()] for tensors in held.values()]
    assert index["metadata"]["total_size"] == sum(map(sum, sizes))
    assert all(sum(nbytes) <= 20_000 or len(nbytes) == 1 for nbytes in sizes)


def test_a_tensor_that_two_shards_have(tmp_path: Path) -> None:
    directory = write_sparse(TargetConfig(TINY, "gemma4"), tmp_path, shard_bytes=5000)
    files = sorted(directory.glob("*.safetensors"))
    name = next(iter(load_file(files[0])))
    layout = {key: (NAMES[tensor.dtype], tensor.shape) for key, tensor in load_file(files[1]).items()}
    lay_out(files[1], {**layout, name: ("BF16", (1,))})
    with pytest.raises(CheckpointError, match=rf"holds {name} twice, in {files[0].name} and in {files[1].name}"):
        inspect_checkpoint(directory)
