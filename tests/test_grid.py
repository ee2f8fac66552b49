"""Values that lie on a grid of 16 levels: int4 keeps them, and says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import PLE, random_target
from torch import Tensor

from gemma_mtp.checkpoint import save_target
from gemma_mtp.cli import main
from gemma_mtp.config import TargetConfig
from gemma_mtp.weights import grid
from gemma_mtp.weights.int4 import Int4


def on_grid(rows: int, columns: int, seed: int, dtype: torch.dtype) -> Tensor:
    """As Q4_0: levels -8 to 7 times a step of float16, which is below zero where the largest is above."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randn(rows, columns // 32, 32, generator=generator)
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    step = (largest / -8).half().float()
    levels = (groups / step).round().clamp(-8, 7)
    return (levels * step).flatten(1).to(dtype)


@given(st.integers(0, 1 << 20), st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
def test_no_value_changes(seed: int, dtype: torch.dtype) -> None:
    weight = on_grid(4, 128, seed, dtype)
    kept = Int4.empty(weight.shape)
    kept.copy_(weight)
    assert torch.equal(kept.values().to(dtype), weight)


@given(st.integers(0, 1 << 20), st.sampled_from([torch.bfloat16, torch.float16]))
def test_a_grid_is_found_by_its_first_groups(seed: int, dtype: torch.dtype) -> None:
    """Trying no grid where there are too many magnitudes finds the same grids as trying all."""
    groups = torch.cat(
        [
            on_grid(2, 64, seed, dtype),
            torch.randn(2, 64, generator=torch.Generator().manual_seed(seed)).to(dtype),
            torch.zeros(1, 64, dtype=dtype),
        ]
    )
    every = grid._found(groups.view(-1, 32)).exact.view(5, 2)
    found = grid.grid_of(groups, 32)
    assert found is not None and torch.equal(found.exact, every)
    assert grid.grid_of(groups[2:], 32) is None


def test_groups_that_are_off_the_grid_are_rounded_as_ever() -> None:
    weight = on_grid(4, 128, 1, torch.bfloat16)
    noise = torch.randn(2, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    weight[1:3, 64:] = noise
    mixed, alone = Int4.empty(weight.shape), Int4.empty(noise.shape)
    mixed.copy_(weight)
    alone.copy_(noise)
    assert torch.equal(mixed.values()[1:3, 64:], alone.values())
    assert torch.equal(mixed.values()[:, :64].bfloat16(), weight[:, :64])


@pytest.mark.parametrize("trained", [True, False])
def test_a_copy_says_how_many_values_changed(trained: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = random_target(config=PLE)
    if trained:
        for name, weight in target.checkpoint_tensors().items():
            if weight.ndim == 2 and weight.shape[1] % 64 == 0:
                weight.copy_(on_grid(weight.shape[0], weight.shape[1], len(name), torch.bfloat16).float())
    save_target(target, TargetConfig(PLE), tmp_path / "qat", torch.bfloat16)
    assert main(["quantize", str(tmp_path / "qat"), "--quantize", "target=int4,embeddings=int4",
                 "--out", str(tmp_path / "int4")]) == 0  # fmt: skip
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "changed" in line)
    assert line.startswith("0 of ") == trained
