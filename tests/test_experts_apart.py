"""Experts stored one by one, in floats: what is read is what the checkpoint has of them in one tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from foreign import EXPERTS, ONE_BY_ONE, SINGLE, one_by_one
from models import random_target, save_pair, wide_drafter
from safetensors.torch import load_file, save_file
from torch import Tensor

from gemma_mtp.checkpoint import load_target, stored_dtypes
from gemma_mtp.cli import main
from gemma_mtp.decoding.params import SamplingParams
from gemma_mtp.engine.pair import load_pair
from gemma_mtp.errors import CheckpointError
from gemma_mtp.measure.memory import inspect_checkpoint

FIRST = "model.layers.0.experts."


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    save_pair(tmp_path / "whole", random_target(config=EXPERTS), wide_drafter(EXPERTS))
    return tmp_path / "whole"


def apart(whole: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]] = one_by_one) -> Path:
    """The target of the pair with other tensors, in place."""
    file = whole / "target" / SINGLE
    save_file(change(load_file(file)), file)
    return whole / "target"


@pytest.mark.parametrize("between", ["", "moe."])
@pytest.mark.parametrize("prefix", ["model.", "model.language_model.", "language_model.model."])
@pytest.mark.parametrize("piece", [1 << 25, 9000, 1])
def test_they_are_put_together(
    between: str, prefix: str, piece: int, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the text model is, and however few of them are read at once."""
    before = {
        name: weight.dense()
        for name, weight in load_target(whole / "target", torch.float32).checkpoint_tensors().items()
    }
    target = apart(whole, lambda tensors: {
        name.replace("model.", prefix, 1): tensor for name, tensor in one_by_one(tensors, between).items()
    })  # fmt: skip
    monkeypatch.setattr("gemma_mtp.checkpoint.tensors.PIECE_BYTES", piece)
    after = load_target(target, torch.float32, strict=True).checkpoint_tensors()
    assert before.keys() == after.keys() and sum(tensor.ndim == 3 for tensor in before.values()) == 4
    assert all(torch.equal(tensor, after[name].dense()) for name, tensor in before.items())
    found = inspect_checkpoint(target)
    assert (found.read_as, found.notes) == ([ONE_BY_ONE], []) and stored_dtypes(target) == {"F32"}


def test_a_pair_says_the_same(whole: Path) -> None:
    params = SamplingParams(max_tokens=40, temperature=0.8, seed=3, ignore_eos=True)
    before = load_pair(whole / "target", whole / "drafter").generate([2, 5, 9], params, draft_tokens=0)
    apart(whole)
    pair = load_pair(whole / "target", whole / "drafter")
    for k in (0, 3):
        after = pair.generate([2, 5, 9], params, draft_tokens=k)
        assert (after.token_ids, after.logprobs) == (before.token_ids, before.logprobs)


def test_parts_of_two_dtypes_are_float32_together(whole: Path) -> None:
    half = f"{FIRST}1.up_proj.weight"

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        made = {name: tensor.bfloat16() for name, tensor in one_by_one(tensors).items()}
        return {**made, half: made[half].float() * 1.001}

    target = apart(whole, change)
    expected = load_file(target / SINGLE)[half]
    rows = load_target(target, torch.float32).checkpoint_tensors()[f"{FIRST}gate_up_proj"].dense()
    assert torch.equal(rows[1, len(expected) :], expected) and stored_dtypes(target) == {"BF16", "F32"}


FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "a part of one is missing": (
        lambda made: {name: tensor for name, tensor in made.items() if name != f"{FIRST}1.up_proj.weight"},
        r"experts of model\.layers\.0 one by one, but lacks up_proj of expert 1;",
    ),
    "one is missing": (
        lambda made: {name: tensor for name, tensor in made.items() if not name.startswith(f"{FIRST}0.")},
        r"lacks gate_proj of expert 0;",
    ),
    "the last is missing": (
        lambda made: {name: tensor for name, tensor in made.items() if f"{FIRST}2." not in name},
        r"layers\.0\.experts\.gate_up_proj of shape \[2, 128, 64\], but config\.json calls for \[3, 128, 64\]",
    ),
    "one more": (
        lambda made: {**made, **{
            name.replace("experts.2.", "experts.3."): tensor.clone()
            for name, tensor in made.items() if "experts.2." in name
        }},
        r"of shape \[4, 128, 64\], but config\.json calls for \[3, 128, 64\]",
    ),
    "one far away": (
        lambda made: {**made, f"{FIRST}999999.up_proj.weight": torch.zeros(64, 64)}, r"lacks gate_proj of expert 3;",
    ),
    "another shape": (
        lambda made: {**made, f"{FIRST}2.up_proj.weight": torch.zeros(64, 32)},
        r"has model\.layers\.0\.experts\.2\.up_proj\.weight of shape \[64, 32\] and .*gate_proj\.weight of \[64, 64\]",
    ),
    "no matrix": (
        lambda made: {**made, f"{FIRST}0.gate_proj.weight": torch.zeros(64)}, r"gate_proj\.weight of shape \[64\] and",
    ),
    "whole too": (
        lambda made: {**made, f"{FIRST}down_proj": torch.zeros(3, 64, 64)},
        r"holds model\.layers\.0\.experts\.down_proj twice, whole and one by one;",
    ),
    "twice": (
        lambda made: {**made, "model.layers.0.moe.experts.1.up_proj.weight": torch.zeros(64, 64)},
        r"experts\.1\.up_proj\.weight twice, also as",
    ),
    "twice by number": (
        lambda made: {**made, f"{FIRST}01.up_proj.weight": torch.zeros(64, 64)}, r"up_proj\.weight twice, also as",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_named(fault: str, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, said = FAULTS[fault]
    target = apart(whole, lambda tensors: change(one_by_one(tensors)))
    with pytest.raises(CheckpointError, match=said):
        load_target(target, torch.float32)
    assert main(["inspect", str(target)]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_number_that_none_has_is_no_expert(whole: Path) -> None:
    """Its name is one that the model has no use for."""
    odd = f"{FIRST}{'9' * 30}.up_proj.weight"
    target = apart(whole, lambda tensors: {**one_by_one(tensors), odd: torch.zeros(64, 64)})
    (note,) = inspect_checkpoint(target).notes
    assert odd in note
