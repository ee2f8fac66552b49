"""Quantised weights through whole models: PyTorch's path, the native one, drafted and plain, and what loading takes."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import (
    PLE,
    TINY,
    VOCAB,
    WIDE,
    agreeing_pair,
    backends,
    native_only,
    open_caches,
    opened,
    play,
    random_drafter,
    random_target,
    run_rows,
    same_weights,
    save_pair,
    wide_drafter,
    zero_target,
)
from oracle import FAMILIES, build_target
from torch import Tensor

from gemma_mtp import checkpoint
from gemma_mtp.backend.base import DraftStep
from gemma_mtp.backend.cpu import CpuBackend
from gemma_mtp.backend.reference import ReferenceBackend
from gemma_mtp.checkpoint import load_drafter, load_target
from gemma_mtp.checkpoint.safetensors import SINGLE_FILE
from gemma_mtp.config import TargetConfig, TextConfig
from gemma_mtp.decoding.params import SamplingParams
from gemma_mtp.engine.pair import load_pair
from gemma_mtp.errors import QuantisationError
from gemma_mtp.model.drafter import Drafter
from gemma_mtp.model.target import Target
from gemma_mtp.weight_types import WeightTypes, parse_weight_types
from gemma_mtp.weights import grouped
from gemma_mtp.weights.grouped import Grouped
from gemma_mtp.weights.matrix import Chooser, Matrix, matrices

Checkpoints = Callable[[str], tuple[Path, Path]]
KINDS = ["int8", "int4", "int4,embeddings=int4", "q8_0,embeddings=int8,drafter-head=int4"]


def quantised_target(config: TextConfig, kinds: str, seed: int = 0) -> Target:
    target = random_target(seed, config)
    target.quantise_(parse_weight_types(kinds))
    return target


# -- which matrices


@pytest.mark.parametrize("name", WIDE)
def test_every_matrix_of_a_part_is_quantised_that_can_be(name: str) -> None:
    """All but routers, and those whose columns are no whole number of blocks; nothing of the dense weight is left."""
    target = quantised_target(WIDE[name], "int4")
    for path, matrix in target.named_modules():
        if isinstance(matrix, Matrix):
            dense = isinstance(matrix, Chooser) or matrix.stored.shape[-1] % 64 != 0
            table = "embed" in path or "lm_head" in path
            assert matrix.stored.format == ("dense" if dense else "int8" if table else "int4"), path
            assert dense == bool(list(matrix.parameters()))
    assert (name == "odd") == any(matrix.stored.shape[-1] == 96 for matrix in matrices(target))


def test_parts_are_quantised_apart() -> None:
    def kinds(model: Target | Drafter) -> dict[str, str]:
        weights = model.checkpoint_tensors().items()
        return {name: weight.format for name, weight in weights if weight.quantised}

    tables = {"model.embed_tokens.weight", "model.embed_tokens_per_layer.weight", "lm_head.weight"}
    target = kinds(quantised_target(WIDE["untied"], "embeddings=int4"))
    assert (set(target), set(target.values())) == (tables, {"int4"})
    target = kinds(quantised_target(WIDE["untied"], "target=int8"))
    assert not tables & target.keys() and set(target.values()) == {"int8"} and len(target) > 40
    drafter = wide_drafter(PLE, centroids=True)
    drafter.quantise_(WeightTypes(drafter_head="int8"))
    assert kinds(drafter) == {"model.embed_tokens.weight": "int8"}
    drafter.quantise_(WeightTypes(drafter="int4"))
    assert {name for name, kind in kinds(drafter).items() if kind == "int4"} >= {
        "pre_projection.weight", "post_projection.weight", "model.layers.3.mlp.down_proj.weight",
    }  # fmt: skip
    assert "masked_embedding.centroids.weight" not in kinds(drafter)
    with pytest.raises(QuantisationError, match="part drafter is already int4 and can not become int8"):
        drafter.quantise_(WeightTypes(drafter="int8"))


# -- what is computed


def dequantised(target: Target, config: TextConfig) -> Target:
    """A dense target of the values that the quantised one computes with."""
    dense = random_target(config=config)
    weights = target.checkpoint_tensors()
    for name, weight in dense.checkpoint_tensors().items():
        weight.copy_(weights[name].values())
    return dense


TOKENS = torch.randint(0, VOCAB, (1, 24), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("kinds", KINDS)
@torch.inference_mode()
def test_the_reference_path_is_the_dense_one_of_the_dequantised_weights(name: str, kinds: str) -> None:
    target = quantised_target(WIDE[name], kinds)
    dense = dequantised(target, WIDE[name])
    expected = dense.logits(dense.forward_sequence(TOKENS).hidden_BTD)
    ours = target.logits(target.forward_sequence(TOKENS).hidden_BTD)
    assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max()


def rounded(x: Tensor, weight: Grouped) -> Tensor:
    """x [..., K] rounded to 8 bits by row and group, as the native operators multiply it with a quantised weight."""
    groups = x.unflatten(-1, (-1, weight.group))
    largest = groups.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > 0, 127 / largest, 0)
    return ((groups * inverse).round() * (largest / 127)).flatten(-2)


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference path with the native operators' rounding of activations."""
    linear, gathered = Grouped.linear, Grouped.gathered_linear
    monkeypatch.setattr(Grouped, "linear", lambda w, x: linear(w, rounded(x, w)))
    monkeypatch.setattr(Grouped, "gathered_linear", lambda w, x, i: gathered(w, rounded(x, w), i))


def native_logits(target: Target, tokens: Tensor) -> Tensor:
    backend = CpuBackend(target)
    (cache,) = open_caches(backend, 1, tokens.shape[1])
    return backend.logits(run_rows(backend, cache, tokens[0].tolist()))


@native_only
@pytest.mark.usefixtures("rounding")
@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("kinds", KINDS)
@torch.inference_mode()
def test_the_native_model_is_the_reference(name: str, kinds: str) -> None:
    """To a millionth where all activations are rounded alike. One that lies halfway may go either way, and then its row
    and those after it differ by more: of the rows of short sequences some in a hundred."""
    alike = []
    for seed in range(2):
        target = quantised_target(WIDE[name], kinds, seed)
        pairs_BT = TOKENS[0, 12 * seed : 12 * seed + 12].view(6, 2)
        expected_BTV = target.logits(target.forward_sequence(pairs_BT).hidden_BTD)
        for tokens, expected in zip(pairs_BT, expected_BTV, strict=True):
            difference = (native_logits(target, tokens[None]) - expected).abs().amax(-1) / expected.abs().max()
            alike += (difference < 1e-5).flatten().tolist()
    assert sum(alike) >= 0.7 * len(alike)


@native_only
@torch.inference_mode()
def test_the_comparison_sees_activations_that_are_not_rounded() -> None:
    target = quantised_target(PLE, "int8")
    expected = target.logits(target.forward_sequence(TOKENS).hidden_BTD)
    difference = (native_logits(target, TOKENS) - expected).abs().amax(-1) / expected.abs().max()
    assert (difference > 1e-4).all()


@native_only
@pytest.mark.usefixtures("rounding")
@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("centroids", [False, True])
@torch.inference_mode()
def test_native_drafter_steps(kinds: str, centroids: bool) -> None:
    """Fed-back states and candidates' logits of one step, as above."""
    alike = []
    for seed in range(4):
        target, drafter = random_target(seed, PLE), wide_drafter(PLE, centroids, seed)
        drafter.quantise_(parse_weight_types(kinds))
        native = CpuBackend(target, drafter)
        sequence, _ = opened(native, TOKENS[0, :10].tolist(), SamplingParams())
        # both read the same rows
        start = [sequence.cache], torch.tensor([sequence.last_token]), sequence.cache.state[None]
        ours, theirs = native.draft_step(*start), ReferenceBackend(target, drafter).draft_step(*start)
        pairs = [(ours.projected_RD, theirs.projected_RD), tuple(map(by_token, (ours, theirs)))]
        alike += [bool((mine - other).abs().max() <= 1e-5 * other.abs().max()) for mine, other in pairs]
    assert sum(alike) >= 0.7 * len(alike)


def by_token(step: DraftStep) -> Tensor:
    """The logits of the whole vocabulary, that of a token which is no candidate far below all others."""
    if step.token_ids_RC is None:
        return step.logits_RC
    assert len(step.token_ids_RC[0].unique()) == step.token_ids_RC.shape[1]
    return torch.full((1, VOCAB), -1e4).scatter(-1, step.token_ids_RC, step.logits_RC)


@pytest.mark.parametrize(("kinds", "backend_name", "name"), [
    (KINDS[2], "reference", "ple"),
    *(pytest.param(KINDS[2], "reference", name, marks=pytest.mark.slow) for name in WIDE if name != "ple"),
    *(pytest.param(kinds, "native", name, marks=native_only) for kinds in KINDS for name in ("ple", "moe")),
    *(pytest.param(KINDS[2], "native", name, marks=native_only) for name in ("untied", "odd")),
    *(pytest.param(kinds, "native", name, marks=[native_only, pytest.mark.slow])
      for kinds in KINDS if kinds != KINDS[2] for name in ("untied", "odd")),
])  # fmt: skip
def test_drafted_tokens_are_plain_tokens(name: str, kinds: str, backend_name: str) -> None:
    config, accepted = WIDE[name], 0
    target, drafter = quantised_target(config, kinds), wide_drafter(config, centroids=name == "ple")
    drafter.quantise_(parse_weight_types(kinds))
    backend = backends(target, drafter)[backend_name]
    for temperature in (0.0, 1.0):
        params = SamplingParams(max_tokens=40 if backend_name == "native" else 12, temperature=temperature, seed=3)
        plain = play(backend, [5, 6, 7], params, 0)
        for draft_tokens in (1, 4):
            drafted = play(backend, [5, 6, 7], params, draft_tokens)
            assert drafted.tokens == plain.tokens
            accepted += sum(drafted.accepted)
    assert accepted > 0


# -- loading


@pytest.mark.parametrize(("kinds", "family"), [
    *(pytest.param("int8", family, marks=[pytest.mark.slow] * (family not in ("e2b", "26b"))) for family in FAMILIES),
    ("int4", "e2b"),
])  # fmt: skip
def test_quantised_while_loading_is_quantised_after(
    checkpoints: Checkpoints, family: str, kinds: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits, whatever pieces the file is read in."""
    types = parse_weight_types(kinds)
    loaders: tuple[Callable[..., Target | Drafter], ...] = (load_target, load_drafter)
    for directory, load in zip(checkpoints(family), loaders, strict=True):
        expected = load(directory, torch.float32)
        expected.quantise_(types)
        same_weights(load(directory, torch.float32, types=types).checkpoint_tensors(), expected.checkpoint_tensors())
        with monkeypatch.context() as small:
            small.setattr("gemma_mtp.checkpoint.tensors.PIECE_BYTES", 3000)
            small.setattr(grouped, "PIECE_ELEMENTS", 1000)
            loaded = load(directory, torch.float32, types=types)
        same_weights(loaded.checkpoint_tensors(), expected.checkpoint_tensors())


@torch.inference_mode()
def test_eight_bits_stay_near_transformers(checkpoints: Checkpoints) -> None:
    """The quantised target's logits beside those of transformers' own model of the full weights."""
    tokens = torch.randint(3, 256, (1, 12), generator=torch.Generator().manual_seed(0))
    for family in ("e2b", "31b", "26b"):
        expected = build_target(family)(tokens).logits
        errors = []
        for kinds in ("int8", "int4,embeddings=int4"):
            target = load_target(checkpoints(family)[0], torch.float32, types=parse_weight_types(kinds))
            ours = target.logits(target.forward_sequence(tokens).hidden_BTD)
            errors.append(float((ours - expected).abs().mean() / expected.abs().mean()))
        assert errors[0] < 0.15 < errors[1], family


MEASURE = """
import sys, torch
from pathlib import Path
from gemma_mtp.backend.select import make_backend
from gemma_mtp.checkpoint import load_target, stored_tensors
from gemma_mtp.weight_types import parse_weight_types

def peak():  # not ru_maxrss, which a child inherits from its parent across exec
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines()
                if line.startswith("VmHWM"))

directory, warm_up, types = sys.argv[1], sys.argv[2], parse_weight_types(sys.argv[3])
make_backend(load_target(warm_up, torch.bfloat16, types=types))  # imports and pools that any load takes
before = peak()
target = load_target(directory, torch.bfloat16, types=types)
backend = make_backend(target)
print(peak() - before, sum(tensor.nbytes for tensor in stored_tensors(target.checkpoint_tensors()).values()))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target of 250 MB in bf16, of which two tensors alone are larger than what may be mapped at once."""
    config = dataclasses.replace(
        PLE, vocab_size=50_000, vocab_size_per_layer_input=50_000, hidden_size=1024, intermediate_size=8192,
        num_hidden_layers=2, layer_types=TINY.layer_types[1:3], num_kv_shared_layers=0, use_double_wide_mlp=False,
        hidden_size_per_layer_input=256,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("large")
    checkpoint.save_target(zero_target(config), TargetConfig(config), directory)
    assert (directory / SINGLE_FILE).stat().st_size > 240e6
    return directory


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux' /proc")
@pytest.mark.parametrize("kinds", [pytest.param("int8", marks=pytest.mark.slow), "int4,embeddings=int4"])
def test_peak_memory_of_loading(large: Path, tmp_path: Path, kinds: str) -> None:
    """The quantised weights, 32 MB of mapped file and 32 MB for the piece that is quantised; pages of mapped files
    count as resident. The full weights would not fit in that. One thread works on pieces: several keep some 50 MB more,
    freed blocks of theirs among it."""
    save_pair(tmp_path, random_target(config=PLE), random_drafter(PLE))
    command = [sys.executable, "-c", MEASURE, str(large), str(tmp_path / "target"), kinds]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=alone)
    assert ran.returncode == 0, ran.stderr
    growth, weights = map(int, ran.stdout.split())
    limit = weights + (64 << 20)
    figures = f"{kinds}: peak grew by {growth / 1e6:.0f} MB, weights {weights / 1e6:.0f} MB, limit {limit / 1e6:.0f} MB"
    assert limit < (large / SINGLE_FILE).stat().st_size
    assert weights <= growth <= limit, figures
    print(figures)


def test_load_pair(tmp_path: Path) -> None:
    target, drafter = agreeing_pair(3)
    save_pair(tmp_path, target, drafter)
    pair = load_pair(tmp_path / "target", tmp_path / "drafter", quantize="int8,drafter=none")
    assert pair.drafter is not None
    assert pair.target.weight_types == WeightTypes(target="int8", embeddings="int8")
    assert pair.drafter.weight_types == WeightTypes(drafter_head="int8")
    with pytest.raises(QuantisationError, match="quantize 'int3' is not known"):
        load_pair(tmp_path / "absent", quantize="int3")


@native_only
def test_the_bundled_pair_quantised() -> None:
    """Native and by PyTorch's path: most greedy tokens agree with those of the full weights."""
    params = SamplingParams(max_tokens=48, ignore_eos=True)
    prompt = "import os\n\ndef walk(path):\n"
    full = load_pair().generate(prompt, params)
    for kinds in ("int8", "int4"):
        pair = load_pair(quantize=kinds)
        plain, drafted = (pair.generate(prompt, params, draft_tokens=k) for k in (0, 4))
        assert plain.token_ids == drafted.token_ids
        assert drafted.mean_acceptance_length > 2
        if kinds == "int8":
            assert plain.token_ids[:8] == full.token_ids[:8]
