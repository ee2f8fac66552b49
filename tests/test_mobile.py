"""Google's mobile checkpoints: weights of 2, 4 and 8 bits, and activations rounded by static scales.

`mobile_checkpoint` was written by transformers 5.24.0, whose own layers computed its logits
(`interop/make_mobile.py`; `test_interop` makes others).
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import test_engine
import torch
from mixed_load import play as play_load
from mixed_load import requests
from models import VOCAB, backends, letters, native_only, open_caches, play, random_drafter, run_rows, save_pair
from safetensors.torch import load_file, save_file
from torch import Tensor

from gemma_mtp.backend.native import Memory, floats
from gemma_mtp.backend.reference import ReferenceBackend
from gemma_mtp.backend.select import make_backend
from gemma_mtp.checkpoint import load_drafter, load_target, open_source, read_target_config, save_target
from gemma_mtp.checkpoint.quantised_copy import write_quantised_copy
from gemma_mtp.decoding.params import SamplingParams
from gemma_mtp.engine.pair import Pair, load_pair
from gemma_mtp.errors import CheckpointError, GemmaMtpError, QuantisationError, TrainingError
from gemma_mtp.interop.directory import export_directory
from gemma_mtp.measure.memory import inspect_checkpoint
from gemma_mtp.measure.plan_models import held_of, planned
from gemma_mtp.model.target import Target
from gemma_mtp.training.settings import check_unquantised
from gemma_mtp.weight_types import WeightTypes, parse_weight_types
from gemma_mtp.weights.activations import ActivationScales, rounded
from gemma_mtp.weights.base import Weight
from gemma_mtp.weights.dense import Dense
from gemma_mtp.weights.grouped import Grouped
from gemma_mtp.weights.int2 import Int2
from gemma_mtp.weights.int4 import Int4
from gemma_mtp.weights.int8 import Int8
from gemma_mtp.weights.int8x32 import Int8x32
from gemma_mtp.weights.matrix import Linear, matrices
from gemma_mtp.weights.panels import Panels

CHECKPOINT = Path(__file__).parent / "mobile_checkpoint"
Q_PROJ = "model.layers.0.self_attn.q_proj"
F32 = torch.float32
LONG, OTHER = [(7 * i * i + i) % VOCAB for i in range(60)], [(5 * i + 3) % VOCAB for i in range(45)]


@pytest.fixture(scope="module")
def target() -> Target:
    return load_target(CHECKPOINT, F32, strict=True)


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return load_file(CHECKPOINT / "expected.safetensors")


def check_alike(ours: Tensor, theirs: Tensor) -> None:
    """Equal but for the last bits of float32. An activation that lies between two steps may go to either, which moves
    the rows after it by a step: few may."""
    apart = (ours - theirs).abs().amax(-1)
    assert (apart < 1e-4).float().mean() >= 0.8
    assert apart.max() < 0.3
    assert (ours.argmax(-1) == theirs.argmax(-1)).float().mean() > 0.9


@torch.inference_mode()
def test_logits_are_transformers(target: Target, expected: dict[str, Tensor]) -> None:
    (ids,), (logits,) = expected["ids"], expected["logits"]
    check_alike(target.logits(target.forward_sequence(expected["ids"]).hidden_BTD)[0], logits)
    for backend in backends(target).values():
        (cache,) = open_caches(backend, 1, len(ids))
        check_alike(backend.logits(run_rows(backend, cache, ids.tolist())), logits)
    # so close that the scales of activations must be in it
    free = load_target(CHECKPOINT, F32)
    for matrix in matrices(free):
        matrix.activations = ()
    without = free.logits(free.forward_sequence(expected["ids"]).hidden_BTD)[0]
    assert (without - logits).abs().median() > 0.05


def unpacked(packed: Tensor, bits: int) -> Tensor:
    """Number by number."""
    if bits == 8:
        return packed
    each = range(0, 8, bits)
    rows = [[(byte >> i) % 2**bits - 2 ** (bits - 1) for byte in row for i in each] for row in packed.tolist()]
    return torch.tensor(rows, dtype=torch.int8)


def test_no_value_is_changed(target: Target) -> None:
    """Every number times its scale, whatever it is kept as, and all rows are looked up so."""
    stored, weights = load_file(CHECKPOINT / "model.safetensors"), target.checkpoint_tensors()
    counted = 0
    for name, scale in stored.items():
        for end, other in ((".weight_scale", ".weight"), (".embedding_scale", ".embedding_quantized")):
            if name.endswith(end):
                packed, ours = stored[name.removesuffix(end) + other], weights[name.removesuffix(end) + ".weight"]
                bits = ours.shape[1] and 8 * packed.shape[1] // ours.shape[1]
                numbers = unpacked(packed, bits).float()
                exact = (numbers.unflatten(1, (scale.shape[1], -1)) * scale[..., None]).flatten(1)
                assert torch.equal(ours.values(), exact) and torch.equal(ours.dense(), exact)
                counted += bits
    assert counted == 8 * 2 + 19 * 4 + 9 * 8


def test_numbers_stay_as_they_are_stored(target: Target) -> None:
    forms = {type(matrix.stored) for matrix in matrices(target)}
    assert {Int2, Int4, Int8} <= forms
    dense = [matrix for matrix in matrices(target) if isinstance(matrix.stored, Dense)]
    assert all(matrix.stored.shape[-1] == 32 for matrix in dense) and dense
    # float32 by itself, in which what is not kept is exact too
    assert load_pair(CHECKPOINT, use_drafter=False, device="cpu").target.embed_tokens.dtype == F32
    lines = inspect_checkpoint(CHECKPOINT).read_as
    assert "stay as they are stored" in lines[0] and "rounded to 8 bits by static scales" in lines[1]


# -- drafting and batches


def draftable(root: Path, write: Callable[[dict[str, Tensor]], None] = lambda tensors: None) -> Pair:
    """The checkpoint, changed, with a drafter that fits."""
    tensors = load_file(CHECKPOINT / "model.safetensors")
    write(tensors)
    shutil.copytree(CHECKPOINT, root / "target", dirs_exist_ok=True)
    save_file(tensors, root / "target" / "model.safetensors")
    drafter = random_drafter(read_target_config(root / "target").text)
    save_pair(root / "made", load_plain_target(), drafter)
    return load_pair(root / "target", root / "made" / "drafter", device="cpu")


def load_plain_target() -> Target:
    """One of this checkpoint's geometry, as floats without scales, that can be saved."""
    return Target(read_target_config(CHECKPOINT).text).requires_grad_(False)


@pytest.mark.parametrize("native", [False, pytest.param(True, marks=native_only)])
def test_drafted_equals_plain(native: bool, tmp_path: Path) -> None:
    pair = draftable(tmp_path)
    backend = pair.backend if native else ReferenceBackend(pair.target, pair.drafter)
    for temperature, count in ((0.0, 24 if native else 7), (1.0, 24 if native else 5)):
        params = SamplingParams(max_tokens=count, temperature=temperature, seed=5, ignore_eos=True)
        plain = play(backend, LONG[:19], params, 0).tokens
        for drafts in (1, 3, 6) if native else (3,):
            played = play(backend, LONG[:19], params, drafts, chunk_rows=3 + drafts)
            assert played.tokens == plain and any(played.drafted)


@native_only
def test_batches_and_preemption_change_nothing(tmp_path: Path) -> None:
    pair = dataclasses.replace(draftable(tmp_path), tokenizer=letters(tmp_path))
    played = play_load(pair, requests([LONG, OTHER], 8, seed=3, longest=24), test_engine.CRAMPED)
    assert played.mismatches == []


# -- the operators


ROUNDED = [
    (ActivationScales(48, 0.25, 0.0),), (ActivationScales(48, 0.0, 0.3),), (ActivationScales(48, 0.02, 0.7),),
    (ActivationScales(16, 0.25, 0.5), ActivationScales(16, 0.5, 0.0), ActivationScales(16, 0.0, 0.1)),
]  # fmt: skip


def exact_product(weight: Weight, x: Tensor, parts: tuple[ActivationScales, ...]) -> Tensor:
    """In float64, but for where activations are rounded: as float32 has them there."""
    products = []
    for rows, part in zip(weight.split([part.rows for part in parts]), parts, strict=True):
        wide = x.double() if part.input == 0 else (x / part.input).round().clamp(-128, 127).double()
        product = (wide @ rows.values().double().T * (part.input or 1.0)).float()
        products.append(product if part.output == 0 else (product / part.output).round().clamp(-128, 127) * part.output)
    return torch.cat(products, -1)


@pytest.mark.parametrize("parts", ROUNDED)
def test_a_matrix_rounds_its_products(parts: tuple[ActivationScales, ...]) -> None:
    """Whatever it is kept as; a step may go either way where a product lies in the middle."""
    generator = torch.Generator().manual_seed(0)
    layer = Linear(128, 48).requires_grad_(False)
    layer.weight.copy_(torch.randn(48, 128, generator=generator))
    x = 3 * torch.randn(2, 5, 128, generator=generator)
    layer.activations = parts
    for form in (Dense, Int8, Int4, Int2):
        layer.convert_(form)
        exact = exact_product(layer.stored, x, parts)
        off = (layer(x) - exact).abs() > 1e-4
        assert off.float().mean() < 0.01
        if len(parts) == 1:  # rows that are picked for each input
            picked = layer.gathered_product(x[0], torch.tensor([[0, 47, 5]]).expand(5, -1))
            torch.testing.assert_close(picked, layer(x[0])[:, [0, 47, 5]])
        layer.dequantise_()


def test_rounding_is_to_even_within_8_bits() -> None:
    x = torch.tensor([0.5, 1.5, -0.5, -2.5, 126.5, 127.5, 1e9, -128.5, -129.0, -1e9]) * 0.25
    assert (rounded(x, 0.25) / 0.25).tolist() == [0, 2, 0, -2, 126, 127, 127, -128, -128, -128]
    assert rounded(x, 0.0) is x


@native_only
@pytest.mark.parametrize("form", [Dense, Panels, Int8, Int8x32, Int4, Int2], ids=lambda form: form.format)
def test_native_products_are_the_formulas(form: type[Weight]) -> None:
    """Bit for bit where every sum is exact: numbers that fill the format, -128 among weights and activations, and
    scales of weights that are powers of two. A row's bits do not depend on how many there are."""
    from gemma_mtp import _native as native

    generator = torch.Generator().manual_seed(1)
    lowest = -2 if form is Int2 else -8 if form is Int4 else -128
    numbers = torch.randint(lowest, -lowest, (48, 128), generator=generator).to(torch.int8)
    numbers[:, ::3] = lowest
    x = 40 * torch.randn(11, 128, generator=generator)
    x[:, ::4] = -1e4
    if issubclass(form, Grouped):
        scales = torch.tensor([0.5, 2.0, 0.25]).repeat(16)[:, None].expand(48, 128 // form.group).contiguous()
        weight: Weight = form(form.packed(numbers), scales)
    else:
        weight = form.of(Dense(numbers.bfloat16() * 0.5))
    for parts in ROUNDED:
        if any(part.input == 0 for part in parts):
            parts = tuple(part._replace(input=part.input or 0.75) for part in parts)
        exact = exact_product(weight, x, parts)
        memory = Memory()
        handed = memory.matrix(weight, parts)
        for isa in native.isas():
            for rows in (11, 1, 2, 5, 7):
                out = torch.full((rows, 48), torch.nan)
                native.linear(isa, handed, floats(x[:rows].contiguous()), rows, floats(out))
                assert torch.equal(out, exact[:rows]), (isa, rows, parts)


@native_only
def test_the_same_bits_in_any_call(target: Target, expected: dict[str, Tensor]) -> None:
    """Rows alone and together, in shares of several threads."""
    from gemma_mtp import _native as native

    backend, ids = make_backend(target), expected["ids"][0].tolist()
    found = []
    for calls, threads in (([1] * 24, 1), ([24], 1), ([5, 19], 2), ([16, 8], 3)):
        native.set_threads(threads)
        (cache,) = open_caches(backend, 1, len(ids))
        parts = [run_rows(backend, cache, part.tolist()) for part in torch.tensor(ids).split(calls)]
        found.append(backend.logits(torch.cat(parts)))
    native.set_threads(1)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_other_parts_and_a_tied_head_round_too(tmp_path: Path) -> None:
    """Of a tied pair, the head's scales are of products, and rows that are looked up have none."""

    def tie(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.embedding_quantized"].clone()
        tensors["lm_head.weight_scale"] = tensors["model.embed_tokens.embedding_scale"].clone()

    draftable(tmp_path, tie)
    raw = json.loads((CHECKPOINT / "config.json").read_text())
    loaded = {}
    for tied in (True, False):
        (tmp_path / "target" / "config.json").write_text(json.dumps({**raw, "tie_word_embeddings": tied}))
        loaded[tied] = load_target(tmp_path / "target", F32, strict=True)
    assert loaded[True].lm_head is None and loaded[True].head.activations == loaded[False].head.activations != ()
    ids = torch.tensor([LONG[:9]])
    with torch.inference_mode():
        one, other = (each.logits(each.forward_sequence(ids).hidden_BTD) for each in loaded.values())
    assert torch.equal(one, other)


# -- what else is done with such a checkpoint


def test_quantised_while_loading_they_round_all_the_same(target: Target) -> None:
    quantised = load_target(CHECKPOINT, F32, types=parse_weight_types("int8"))
    assert [m.activations for m in matrices(quantised)] == [m.activations for m in matrices(target)]
    assert {type(m.stored) for m in matrices(quantised)} == {Int8, Dense}
    dense = load_target(CHECKPOINT, F32)
    dense.dequantise_()  # as training does
    ids = torch.tensor([LONG[:12]])
    with torch.inference_mode():
        one, other = (each.logits(each.forward_sequence(ids).hidden_BTD) for each in (target, dense))
    check_alike(one[0], other[0])


def test_what_would_lose_the_scales_is_refused(tmp_path: Path, target: Target) -> None:
    with pytest.raises(QuantisationError, match="input_activation_scale"):
        write_quantised_copy(CHECKPOINT, tmp_path / "copy", parse_weight_types("int8"))
    assert not (tmp_path / "copy").exists()
    with pytest.raises(CheckpointError, match="static scales"):
        save_target(target, read_target_config(CHECKPOINT), tmp_path)
    with pytest.raises(CheckpointError, match="static scales"):
        export_directory(CHECKPOINT, tmp_path / "out", strict=True)
    made = export_directory(CHECKPOINT, tmp_path / "out")
    assert any("static scales" in loss for loss in made.losses)


def test_an_adapter_is_refused(tmp_path: Path) -> None:
    name, rank = "base_model.model.model.layers.0.self_attn.q_proj", 2
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_modules": ["q_proj"]})
    )
    save_file(
        {f"{name}.lora_A.weight": torch.ones(rank, 64), f"{name}.lora_B.weight": torch.ones(64, rank)},
        tmp_path / "adapter_model.safetensors",
    )
    with pytest.raises(CheckpointError, match="static scales"):
        load_pair(CHECKPOINT, use_drafter=False, adapter=tmp_path, device="cpu")


def test_a_drafter_of_that_kind_decodes_and_is_not_trained(tmp_path: Path, target: Target) -> None:
    """Its projections of 4 bits with scales."""
    drafter = random_drafter(target.config)
    save_pair(tmp_path, load_plain_target(), drafter)
    file = tmp_path / "drafter" / "model.safetensors"
    tensors = load_file(file)
    weight = tensors.pop("pre_projection.weight")
    numbers = torch.randint(-8, 8, weight.shape, generator=torch.Generator().manual_seed(0))
    lanes = (numbers + 8).to(torch.uint8).unflatten(1, (-1, 2))
    tensors |= {
        "pre_projection.weight": lanes[..., 0] | lanes[..., 1] << 4,
        "pre_projection.weight_scale": torch.full((len(weight), 1), 0.02),
        "pre_projection.input_activation_scale": torch.tensor(0.05),
        "pre_projection.output_activation_scale": torch.tensor(0.07),
    }
    save_file(tensors, file)
    config = json.loads((tmp_path / "drafter" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gemma"}
    (tmp_path / "drafter" / "config.json").write_text(json.dumps(config))
    loaded = load_drafter(tmp_path / "drafter", F32, strict=True)
    assert isinstance(loaded.pre_projection.stored, Int4)
    assert loaded.pre_projection.activations == (
        ActivationScales(len(weight), *(float(torch.tensor(s)) for s in (0.05, 0.07))),
    )
    pair = load_pair(CHECKPOINT, tmp_path / "drafter", device="cpu")
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    assert (
        pair.generate(LONG, params, draft_tokens=3).token_ids == pair.generate(LONG, params, draft_tokens=0).token_ids
    )
    with pytest.raises(TrainingError, match="quantised drafter"):
        check_unquantised(tmp_path / "drafter")


@pytest.mark.parametrize(("change", "said"), [
    ({f"{Q_PROJ}.input_activation_scale": torch.tensor(-1.0)}, r"q_proj.input_activation_scale = -1.0"),
    ({f"{Q_PROJ}.output_activation_scale": torch.tensor(torch.inf)}, "= inf"),
    ({f"{Q_PROJ}.input_activation_scale": torch.ones(2)}, "was expected"),
    ({"model.norm.input_activation_scale": torch.tensor(1.0)}, "model.norm, whose weights are not quantised"),
])  # fmt: skip
def test_scales_that_can_not_be(change: dict[str, Tensor], said: str, tmp_path: Path) -> None:
    with pytest.raises(GemmaMtpError, match=said):
        draftable(tmp_path, lambda tensors: tensors.update(change))


def test_bits_are_those_of_the_leftmost_pattern(tmp_path: Path) -> None:
    """As one regular expression of all alternatives finds it, not the first pattern that is found anywhere."""
    raw = json.loads((CHECKPOINT / "config.json").read_text())
    patterns = {"q_proj": {"num_bits": 2}, **raw["quantization_config"]["module_quant_configs"], r"layers\.0\.self": {}}
    raw["quantization_config"]["module_quant_configs"] = patterns
    shutil.copytree(CHECKPOINT, tmp_path / "target")
    (tmp_path / "target" / "config.json").write_text(json.dumps(raw))
    source = open_source(tmp_path / "target")
    assert source.tensors()["model.layers.0.self_attn.q_proj.weight"].shape == (64, 64)


def test_memory_counts_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pair that fits as it is stored is not refused for what it would take as floats; a plan says the same."""
    from gemma_mtp.engine import start

    kept = sum(weight.nbytes for weight in load_target(CHECKPOINT, F32).checkpoint_tensors().values())
    monkeypatch.setattr(start, "device_free_bytes", lambda device: int(1.02 * kept))
    assert load_pair(CHECKPOINT, use_drafter=False, device="cpu").drafter is None
    monkeypatch.setattr(start, "device_free_bytes", lambda device: int(0.98 * kept))
    with pytest.raises(CheckpointError, match="weights take"):
        load_pair(CHECKPOINT, use_drafter=False, device="cpu")
    plan = planned(str(CHECKPOINT), no_drafter=True, others=True)
    assert held_of(plan, WeightTypes(), "float32", fp8=False).target == kept
