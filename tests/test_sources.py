"""Checkpoints behind `Source`: a format that is no directory serves everything that reads checkpoints."""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import random_drafter, random_target, same_weights, save_pair
from safetensors.torch import load_file
from torch import Tensor

from gemma_mtp import SamplingParams, load_pair
from gemma_mtp.checkpoint import (
    StoredTensor,
    load_drafter,
    load_target,
    open_source,
    read_config,
    read_generation_config,
    stored_dtypes,
)
from gemma_mtp.checkpoint.open import FILE_FORMATS
from gemma_mtp.checkpoint.quantised_copy import write_quantised_copy
from gemma_mtp.checkpoint.safetensors import SafetensorsSource
from gemma_mtp.checkpoint.tensors import copy_tensors, same_values
from gemma_mtp.cli import main
from gemma_mtp.errors import TokenizerError
from gemma_mtp.json_files import read_json
from gemma_mtp.measure.memory import inspect_checkpoint
from gemma_mtp.tokenizer import Tokenizer
from gemma_mtp.weight_types import parse_weight_types
from gemma_mtp.weights.dense import Dense


class OneFile:
    """A format of a test: one file in which everything lies, with tensors under numbers instead of names."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._content: dict[str, Any] = torch.load(path, weights_only=True)
        self._numbers = {name: f"t{i}" for i, name in enumerate(self._content["tensors"])}

    def config(self) -> Any:
        return self._content["config"]

    def generation_config(self) -> Any:
        return {"eos_token_id": 7}

    has_tokenizer = False

    def tokenizer(self) -> Tokenizer:
        raise TokenizerError("no tokenizer in this format.")

    def tensors(self) -> dict[str, StoredTensor]:
        names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}
        return {
            self._numbers[name]: StoredTensor(
                self.path, self._numbers[name], names[x.dtype], tuple(x.shape), x.nbytes, 0
            )
            for name, x in self._content["tensors"].items()
        }

    def places(self, needed: Collection[str], optional: Collection[str] = ()) -> dict[str, str]:
        return {name: place for name, place in self._numbers.items() if name in {*needed, *optional}}

    def read(self, pieces: Iterable[tuple[StoredTensor, slice | None]]) -> Iterator[Tensor]:
        values = {place: self._content["tensors"][name] for name, place in self._numbers.items()}
        for tensor, rows in pieces:
            yield values[tensor.name][... if rows is None else rows]

    def notes(self) -> list[str]:
        return []

    def summary(self) -> list[str]:
        return ["numbers in place of names."]

    def copy_companions(self, directory: Path) -> None:
        (directory / "companion").write_text("taken along")


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pair as directories, and beside each a file of the other format, which is one line where formats are known."""
    save_pair(tmp_path, random_target(), random_drafter(centroids=True))
    for kind in ("target", "drafter"):
        content = {"config": read_json(tmp_path / kind / "config.json")}
        torch.save(
            {**content, "tensors": load_file(tmp_path / kind / "model.safetensors")}, tmp_path / f"{kind}.onefile"
        )
    monkeypatch.setitem(FILE_FORMATS, ".onefile", OneFile)
    return tmp_path


@pytest.mark.parametrize(("kind", "load"), [("target", load_target), ("drafter", load_drafter)])
def test_the_models_are_the_same(pair: Path, kind: str, load: Any) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        ours, other = load(pair / kind, dtype), load(pair / f"{kind}.onefile", dtype, strict=True)
        same_weights(other.checkpoint_tensors(), ours.checkpoint_tensors())


def test_a_pair_generates_the_same(pair: Path) -> None:
    params = SamplingParams(max_tokens=12, ignore_eos=True, temperature=0.8, seed=3)
    loaded = [load_pair(pair / f"target{end}", pair / f"drafter{end}", device="cpu") for end in ("", ".onefile")]
    first, second = (each.generate([5, 6, 7, 8], params).token_ids for each in loaded)
    assert first == second
    assert loaded[1].tokenizer is None
    assert loaded[1].eos_token_ids == (7,)


def test_what_it_holds(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = pair / "target.onefile"
    assert read_config(file) == read_config(pair / "target")
    assert stored_dtypes(file) == stored_dtypes(pair / "target")
    assert read_generation_config(file).eos_token_ids == (7,)
    report = inspect_checkpoint(file)
    assert replace(report, read_as=[]) == inspect_checkpoint(pair / "target")
    assert report.read_as == ["numbers in place of names."]
    assert main(["inspect", str(file), str(pair / "drafter.onefile")]) == 0
    assert "pair: fits" in capsys.readouterr().out


def test_a_quantised_copy(pair: Path) -> None:
    types = parse_weight_types("int8")
    write_quantised_copy(pair / "drafter.onefile", pair / "copy", types)
    assert (pair / "copy" / "companion").read_text() == "taken along"
    expected = load_drafter(pair / "drafter", torch.float32, types=types)
    same_weights(load_drafter(pair / "copy", torch.float32).checkpoint_tensors(), expected.checkpoint_tensors())


def test_an_open_source_is_itself(pair: Path) -> None:
    source = open_source(pair / "target")
    assert open_source(source) is source
    assert isinstance(open_source(str(pair / "target.onefile")), OneFile)
    (pair / "target").rename(pair / "directory.onefile")
    assert isinstance(open_source(pair / "directory.onefile"), SafetensorsSource)


@pytest.mark.parametrize("nbytes", [1, 100, 1000, 1 << 20])
def test_pieces_of_any_size(pair: Path, nbytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is copied and compared is the same whatever is read at once."""
    monkeypatch.setattr("gemma_mtp.checkpoint.tensors.PIECE_BYTES", nbytes)
    source, stored = open_source(pair / "target"), load_file(pair / "target" / "model.safetensors")
    headers = dict(source.tensors())
    views = {name: Dense(torch.empty_like(x)) for name, x in stored.items()}
    copy_tensors(source, views, headers, {"model.norm.weight": 0.5})
    stored["model.norm.weight"] = (stored["model.norm.weight"].float() + 0.5).to(stored["model.norm.weight"].dtype)
    assert all(torch.equal(views[name].dense(), x) for name, x in stored.items())
    table = headers["model.embed_tokens.weight"]
    assert same_values(source, table, table)
    alike = [header for header in headers.values() if header.shape == headers["model.norm.weight"].shape]
    equal = {(a.name, b.name) for a in alike for b in alike if same_values(source, a, b)}
    whole = load_file(pair / "target" / "model.safetensors")
    assert equal == {(a.name, b.name) for a in alike for b in alike if torch.equal(whole[a.name], whole[b.name])}
