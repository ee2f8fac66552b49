"""Training for a quantised target: its rows are those that decoding with it computes, and the command trains, writes
and measures with it, from a quantised copy as with `--quantize`."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from models import PLE, VOCAB, WIDE, letters, native_only, random_target, save_pair, wide_drafter
from safetensors.torch import load_file
from test_train_gates import LENGTH, LENGTHS, STEPS, decoded, differ, training_logits
from torch import Tensor

from gemma_mtp import load_pair
from gemma_mtp.backend.base import Backend
from gemma_mtp.backend.reference import ReferenceBackend
from gemma_mtp.backend.select import make_backend
from gemma_mtp.cli import main
from gemma_mtp.engine.pair import Pair
from gemma_mtp.measure.acceptance import measure_acceptance
from gemma_mtp.model.drafter import Drafter
from gemma_mtp.model.layers import rope_for
from gemma_mtp.model.target import Target
from gemma_mtp.training import gate
from gemma_mtp.training.shapes import initialise
from gemma_mtp.training.unroll import query_rope, target_rows
from gemma_mtp.weight_types import WeightTypes, parse_weight_types
from gemma_mtp.weights import grouped
from gemma_mtp.weights.int4 import Int4
from gemma_mtp.weights.matrix import matrices

KINDS = ["int8", "int4"]
#: of the drafter's logits, root mean square relative to theirs: what rounding activations to 8 bits leaves
NATIVE_TOLERANCE = 0.0165


def full_target() -> Target:
    """Soft attention and small branches, as after training; of wholly random weights a rounding grows to any size."""
    target = Target(PLE).eval().requires_grad_(False)
    initialise(target, 0)
    return target


def quantised(kinds: str) -> Target:
    target = full_target()
    target.quantise_(parse_weight_types(kinds))
    return target


def dequantised(kinds: str) -> Target:
    target = quantised(kinds)
    target.dequantise_()
    return target


@pytest.fixture(scope="module")
def drafter() -> Drafter:
    drafter = wide_drafter(PLE)
    initialise(drafter, 1)
    return drafter


@pytest.fixture(scope="module")
def tokens_BT() -> Tensor:
    tokens = torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    tokens[1, LENGTHS[1] :] = 0
    return tokens


def training_logits_of(target: Target, drafter: Drafter, tokens_BT: Tensor) -> list[Tensor]:
    """Of all steps, each [B, T, V]."""
    rows = target_rows(target, tokens_BT, rope_for(PLE, torch.arange(LENGTH), torch.float32))
    return training_logits(drafter, rows, query_rope(drafter, LENGTH, torch.float32))


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("kinds", KINDS)
@torch.no_grad()
def test_a_dequantised_target_is_dense_and_has_the_values_decoding_computes_with(name: str, kinds: str) -> None:
    target, dense = random_target(config=WIDE[name]), random_target(config=WIDE[name])
    for model in (target, dense):
        model.quantise_(parse_weight_types(kinds))
    dense.dequantise_()
    assert all(matrix.weight.numel() and not matrix.stored.quantised for matrix in matrices(dense))
    assert not dense.weight_types and not any(p.requires_grad for p in dense.parameters())
    stored, changed = target.checkpoint_tensors(), 0
    for name, weight in dense.checkpoint_tensors().items():
        assert torch.equal(weight.dense(), stored[name].values())
        changed += stored[name].quantised
    assert changed > 10


def test_weights_are_made_dense_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = Int4.empty((3, 50, 64), torch.bfloat16)
    matrix.copy_(torch.randn(3, 50, 64, generator=torch.Generator().manual_seed(0)))
    whole = matrix.dense()
    assert torch.equal(whole, matrix.values().bfloat16())
    monkeypatch.setattr(grouped, "PIECE_ELEMENTS", 64 * 7)
    assert torch.equal(matrix.dense(), whole)


# --- the gate: training logits are decoding logits of the quantised target


@pytest.mark.parametrize("kinds", KINDS)
def test_training_logits_are_decoding_logits(kinds: str, drafter: Drafter, tokens_BT: Tensor) -> None:
    """PyTorch's operators multiply with the weights' values: the same but for float32's rounding. Negative control:
    training for the weights that were quantised."""
    of_training = training_logits_of(dequantised(kinds), drafter, tokens_BT)
    of_decoding = decoded(ReferenceBackend(quantised(kinds), drafter), tokens_BT)
    assert differ(of_decoding, of_training) < 1e-4
    assert differ(of_decoding, training_logits_of(full_target(), drafter, tokens_BT)) > 0.1


def relative_error(backend: Backend, tokens_BT: Tensor, of_training: list[Tensor]) -> float:
    """Root mean square of the difference to decoding's logits, over that of those."""
    error, size = 0.0, 0.0
    for b, (length, of_decoding) in enumerate(zip(LENGTHS, decoded(backend, tokens_BT), strict=True)):
        for i in range(STEPS):
            ours, theirs = of_training[i][b, : length - 1 - i], of_decoding[i][: length - 1 - i]
            error, size = error + float((ours - theirs).square().sum()), size + float(theirs.square().sum())
    return float((error / size) ** 0.5)


@native_only
@pytest.mark.parametrize("kinds", KINDS)
def test_training_logits_are_the_native_ones_within_what_rounded_activations_leave(
    kinds: str, drafter: Drafter, tokens_BT: Tensor
) -> None:
    """Negative control as above."""
    backend = make_backend(quantised(kinds), drafter)
    of_training = training_logits_of(dequantised(kinds), drafter, tokens_BT)
    assert relative_error(backend, tokens_BT, of_training) < NATIVE_TOLERANCE
    of_full = training_logits_of(full_target(), drafter, tokens_BT)
    assert relative_error(backend, tokens_BT, of_full) > NATIVE_TOLERANCE * (1.2 if kinds == "int8" else 5)


# --- the command


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with target, drafter and data, and quantised copies of the target and the drafter."""
    root = tmp_path_factory.mktemp("tiny")
    save_pair(root, full_target(), wide_drafter(PLE))
    letters(root / "target")
    generator = torch.Generator().manual_seed(0)
    texts = ["".join(chr(ord("A") + i) for i in torch.randint(0, 58, (40,), generator=generator)) for _ in range(15)]
    (root / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for name, kinds in (("target", "int8"), ("target", "int4"), ("drafter", "int8")):
        assert main(["quantize", str(root / name), "--out", str(root / f"{name}-{kinds}"), "--quantize", kinds]) == 0
    return root


def train(tiny: Path, target: str, out: Path, *more: object) -> int:
    fixed = ["train", "--target", tiny / target, "--data", tiny / "data.jsonl", "--out", out, "--length", 48,
             "--written-tokens", 300, "--gate-tokens", 12, "--dtype", "float32", "--draft-steps", 3, "--batch", 4,
             "--steps", 5, "--threads", 1, "--force"]  # fmt: skip
    return main([str(argument) for argument in (*fixed, *more)])


def tensors(out: Path, name: str) -> dict[str, Tensor]:
    return load_file(out / "training" / name)


@pytest.mark.parametrize("kinds", [pytest.param("int8", marks=pytest.mark.slow), "int4"])
def test_a_drafter_is_trained_for_a_quantised_copy_and_the_same_with_quantize(
    tiny: Path, tmp_path: Path, kinds: str, capfd: pytest.CaptureFixture[str]
) -> None:
    copy, loading, full, new = tmp_path / "copy", tmp_path / "loading", tmp_path / "full", ["--new", "--hidden", 64]
    options = [*new, "--heads", 4, "--lr", 0.01, "--cache", tmp_path / "cache"]
    assert train(tiny, f"target-{kinds}", copy, *options) == 0, capfd.readouterr().err
    assert train(tiny, "target", loading, *options, "--quantize", kinds) == 0
    assert train(tiny, "target", full, *options) == 0
    assert len(list((tmp_path / "cache").iterdir())) == 3, "no text of one target is taken for another's"
    # text, weights and gate are those of the quantised target, the weights that decoding has bit for bit
    for name, differs in (("examples.safetensors", kinds == "int4"), ("checkpoint.safetensors", True)):
        ours, theirs, others = (tensors(out, name) for out in (copy, loading, full))
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        # eight bits may change no token of so little text, but they change what is computed
        assert differs <= any(not torch.equal(ours[key], others[key]) for key in ours)
    gates = [json.loads((out / "training" / "gate.json").read_text()) for out in (copy, loading)]
    assert gates[0]["start"] == gates[1]["start"]
    rows = list(csv.DictReader((copy / "training" / "drafter.csv").open()))
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    assert "target=" + kinds in (loading / "MODEL_CARD.md").read_text()
    pair = load_pair(tiny / f"target-{kinds}", copy)
    assert pair.target.weight_types.target == kinds
    drafted, plain = (pair.generate(list(range(3, 12)), draft_tokens=k).token_ids for k in (4, 0))
    assert drafted == plain


def test_the_gate_measures_the_drafter_as_decoding_will_quantise_it(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[WeightTypes, WeightTypes]] = []
    real = measure_acceptance

    def record(pair: Pair, *rest: object, **named: object) -> object:
        assert pair.drafter is not None
        seen.append((pair.target.weight_types, pair.drafter.weight_types))
        return real(pair, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(gate, "measure_acceptance", record)
    options = ["--drafter", tiny / "drafter", "--steps", 1, "--quantize", "int8,drafter-head=int4"]
    assert train(tiny, "target-int8", tmp_path, *options) == 0
    assert set(seen) == {(WeightTypes("int8", "int8"), WeightTypes(drafter="int8", drafter_head="int4"))}
    exported = load_file(tmp_path / "model.safetensors")
    assert all(t.is_floating_point() for t in exported.values()), "what is exported is not quantised"


def test_a_run_is_not_resumed_for_another_quantisation(tiny: Path, tmp_path: Path, capfd) -> None:  # type: ignore[no-untyped-def]
    options = ["--drafter", tiny / "drafter", "--steps", 1, "--as-is"]
    assert train(tiny, "target", tmp_path, *options, "--quantize", "int8") == 0
    assert train(tiny, "target", tmp_path, *options, "--quantize", "int4", "--resume") == 2
    assert "with other settings: --quantize was " in capfd.readouterr().err


@pytest.mark.parametrize(
    ("target", "options", "says"),
    [
        (
            "target",
            ["--drafter", "{root}/drafter-int8"],
            "drafter-int8 is a quantised drafter, which can not be trained",
        ),
        ("target-int8", ["--new", "--quantize", "int4"], "part target is already int8 and can not become int4"),
        ("target", ["--new", "--quantize", "int3"], "quantize 'int3' is not known"),
    ],
)
def test_what_can_not_be_quantised_so_is_refused(
    tiny: Path, tmp_path: Path, target: str, options: list[str], says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    filled = [option.replace("{root}", str(tiny)) for option in options]
    assert train(tiny, target, tmp_path / "out", *filled) == 2
    assert says in " ".join(capfd.readouterr().err.split())
    assert not (tmp_path / "out").exists()
