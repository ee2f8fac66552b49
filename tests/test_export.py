"""Exported directories: what comes back of them, what their owners' tools make of them, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import one_by_one
from models import PLE, TINY, WIDE, agreeing_pair, random_target, save_pair, wide_drafter
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from gemma_mtp import SamplingParams, load_pair
from gemma_mtp.checkpoint import load_drafter, load_target, read_config, read_headers, text_headers
from gemma_mtp.checkpoint.quantised_copy import write_quantised_copy
from gemma_mtp.cli import main
from gemma_mtp.engine.pair import bundled_directory
from gemma_mtp.errors import CheckpointError, QuantisationError
from gemma_mtp.files.safetensors import SafetensorsWriter
from gemma_mtp.interop.directory import Changed, export_directory
from gemma_mtp.interop.gguf import export_gguf
from gemma_mtp.interop.packings import PACKINGS, Integers, MlxAffine, in_words
from gemma_mtp.json_files import read_json
from gemma_mtp.model.target import Target
from gemma_mtp.weight_types import parse_weight_types

TARGET, DRAFTER = bundled_directory() / "target", bundled_directory() / "drafter"
KINDS = [(to, kind) for to, kinds in PACKINGS.items() for kind in kinds]
PACKED = [(to, kind) for to, kind in KINDS if kind not in ("BF16", "F16", "F32")]


def save_bf16(root: Path, target: Target) -> None:
    save_pair(root / "float32", target, wide_drafter(PLE))
    for part in ("target", "drafter"):
        export_directory(root / "float32" / part, root / part)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pair, bf16, wide enough for groups, with per-layer embeddings."""
    root = tmp_path_factory.mktemp("wide")
    save_bf16(root, random_target(config=PLE))
    return root


def values(directory: Path, drafter: bool = False) -> dict[str, Tensor]:
    load: Any = load_drafter if drafter else load_target
    return {name: weight.values() for name, weight in load(directory, torch.float32).checkpoint_tensors().items()}


def same(one: Path, other: Path) -> None:
    ours, theirs = values(one), values(other)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("part", ["target", "drafter"])
@pytest.mark.parametrize(("to", "kind"), KINDS, ids=str)
def test_what_comes_back(wide: Path, tmp_path: Path, to: str, kind: str, part: str) -> None:
    made = export_directory(wide / part, tmp_path / "out", to, kind)
    assert read_config(tmp_path / "out") == read_config(wide / part)
    before, after = (values(at, part == "drafter") for at in (wide / part, tmp_path / "out"))
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    if kind in ("BF16", "F32"):
        assert not changed and not made.losses and not made.packed
        return
    if kind == "F16":
        assert all(torch.equal(before[name].half().float(), after[name]) for name in before)
        return
    assert made.packed and len(changed) <= made.packed
    limit = {"W4A16": 0.12, "4BIT": 0.12, "FP8": 0.04}.get(kind, 0.01)
    for name in changed:
        assert float((before[name] - after[name]).norm() / before[name].norm()) < limit
    assert any(f"in becoming {kind}" in loss for loss in made.losses)
    card = (tmp_path / "out" / "README.md").read_text()
    assert made.losses[0][1:] in card
    assert f"--to {to} --type {kind}" in card


@pytest.mark.parametrize(("to", "kind"), [
    ("safetensors", "BF16"),
    *(pytest.param(*each, marks=[pytest.mark.slow] * (each[1] in ("W8A16", "8BIT"))) for each in PACKED),
], ids=str)  # fmt: skip
def test_drafted_equals_plain(tmp_path: Path, to: str, kind: str) -> None:
    for part, directory in (("target", TARGET), ("drafter", DRAFTER)):
        export_directory(directory, tmp_path / part, to, kind)
    pair = load_pair(tmp_path / "target", tmp_path / "drafter")
    params = SamplingParams(max_tokens=16, ignore_eos=True, logprobs=1, temperature=0.7, seed=3)
    drafted, plain = (pair.generate("def add(a, b):", params, draft_tokens=k) for k in (3, 0))
    assert (drafted.token_ids, drafted.logprobs) == (plain.token_ids, plain.logprobs)
    if kind == "BF16":
        assert load_pair().generate("def add(a, b):", params, draft_tokens=0).logprobs == plain.logprobs


@pytest.mark.parametrize("kind", ["4BIT", "8BIT"])
def test_experts_in_mlx_s_layout(tmp_path: Path, kind: str) -> None:
    """Under mlx-lm's names, gates apart: what MLX unpacks of them is what we read back, in one tensor again."""
    save_pair(tmp_path, random_target(config=WIDE["moe"]), wide_drafter(WIDE["moe"]))
    made = export_directory(tmp_path / "target", tmp_path / "out", "mlx", kind)
    assert read_config(tmp_path / "out") == read_config(tmp_path / "target") and made.packed > 20
    before, after = values(tmp_path / "target"), values(tmp_path / "out")
    name = "model.layers.1.experts.gate_up_proj"
    error = float((before[name] - after[name]).norm() / before[name].norm())
    assert 0 < error < (0.12 if kind == "4BIT" else 0.01)
    assert torch.equal(
        before["model.layers.1.router.proj.weight"].bfloat16().float(), after["model.layers.1.router.proj.weight"]
    )
    mx = pytest.importorskip("mlx.core")
    arrays, theirs = mx.load(str(tmp_path / "out" / "model.safetensors")), []
    for part in ("gate_proj", "up_proj"):
        module = f"model.layers.1.experts.switch_glu.{part}"
        scales, biases = (arrays[f"{module}.{each}"].astype(mx.float32) for each in ("scales", "biases"))
        packed = {"group_size": 64, "bits": int(kind[0])}
        theirs.append(torch.tensor(mx.dequantize(arrays[f"{module}.weight"], scales, biases, **packed).tolist()))
    torch.testing.assert_close(torch.cat(theirs, 1), after[name], rtol=1e-6, atol=1e-7)
    damaged = load_file(tmp_path / "out" / "model.safetensors")
    del damaged["model.layers.1.experts.switch_glu.up_proj.scales"]
    save_file(damaged, tmp_path / "out" / "model.safetensors")
    with pytest.raises(QuantisationError, match=r"layers\.1\.experts\.switch_glu of different shapes, or not all"):
        read_config(tmp_path / "out"), values(tmp_path / "out")


@pytest.mark.parametrize("kind", ["W4A16", "W8A16", "FP8"])
@pytest.mark.parametrize("piece", [1 << 25, 40_000])
def test_experts_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, piece: int) -> None:
    """Under llm-compressor's names: what the library unpacks of them is what we read back, in one tensor again."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    save_pair(tmp_path, random_target(config=WIDE["moe"]), wide_drafter(WIDE["moe"]))
    monkeypatch.setattr("gemma_mtp.checkpoint.tensors.PIECE_BYTES", piece)  # of several experts, and of one
    made = export_directory(tmp_path / "target", tmp_path / "out", "compressed-tensors", kind)
    before, after = values(tmp_path / "target"), values(tmp_path / "out")
    assert read_config(tmp_path / "out") == read_config(tmp_path / "target") and before.keys() == after.keys()
    assert made.packed == sum(
        name.endswith("weight_scale") for name in load_file(tmp_path / "out" / "model.safetensors")
    )
    experts = [name for name, tensor in after.items() if tensor.ndim == 3]
    for name in experts:
        error = float((before[name] - after[name]).norm() / before[name].norm())
        assert 0 < error < {"W4A16": 0.12, "W8A16": 0.01, "FP8": 0.04}[kind]
    config = QuantizationConfig.model_validate(read_json(tmp_path / "out" / "config.json")["quantization_config"])
    (scheme,) = config.config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(config.format)
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        module, _, part = name.rpartition(".")
        if "experts." in name:
            modules.setdefault(module, {})[part] = tensor
    ours = {name.removesuffix(".weight"): tensor for name, tensor in one_by_one({n: after[n] for n in experts}).items()}
    assert ours.keys() == modules.keys() and len(ours) == 3 * 8 * len(experts) // 2
    assert not any("experts" in module for module in config.ignore or [])
    for module, parts in modules.items():
        theirs = compressor.decompress(dict(parts), scheme)["weight"]
        assert theirs.dtype == torch.bfloat16 and torch.equal(theirs, ours[module].bfloat16())
    params = SamplingParams(max_tokens=12, ignore_eos=True, logprobs=1)
    pair = load_pair(tmp_path / "out", tmp_path / "drafter")
    drafted, plain = (pair.generate([2, 5, 9], params, draft_tokens=k) for k in (3, 0))
    assert (drafted.token_ids, drafted.logprobs) == (plain.token_ids, plain.logprobs)


def test_a_grid_stays_as_it_is(tmp_path: Path) -> None:
    """Values on a grid of 16 levels with a bf16 step, as a model trained for them has them, are packed exactly."""
    target = random_target(config=PLE)
    generator = torch.Generator().manual_seed(5)
    for name, weight in target.checkpoint_tensors().items():
        if Integers(4).fits(name.removesuffix(".weight"), weight.shape):
            N, K = weight.shape
            steps = (torch.rand(N, K // 32, 1, generator=generator) * 0.01 + 0.01).bfloat16().float()
            numbers = torch.randint(-8, 8, (N, K // 32, 32), generator=generator)
            numbers[..., 0] = -8
            weight.copy_((numbers * steps).bfloat16().float().view(N, K))
    save_bf16(tmp_path, target)
    made = export_directory(tmp_path / "target", tmp_path / "w4", "compressed-tensors", "W4A16", strict=True)
    assert made.packed > 5 and made.changed.changed == 0 and not made.losses


def test_transformers_reads_what_is_packed(wide: Path, tmp_path: Path) -> None:
    """The same logits as its own model of the weights that we read back."""
    pytest.importorskip("compressed_tensors")
    original = AutoModelForCausalLM.from_pretrained(wide / "target", dtype=torch.float32)
    ids = torch.tensor([list(range(5, 30))])
    for kind in ("W4A16", "W8A16"):
        out = tmp_path / kind
        export_directory(wide / "target", out, "compressed-tensors", kind)
        theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        original.load_state_dict(values(out), strict=False)
        with torch.no_grad():
            assert torch.equal(theirs(ids).logits, original(ids).logits)


def test_mlx_reads_what_is_packed(wide: Path, tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core")
    for kind, bits in (("4BIT", 4), ("8BIT", 8)):
        export_directory(wide / "target", tmp_path / kind, "mlx", kind)
        arrays = mx.load(str(tmp_path / kind / "model.safetensors"))
        ours, modules = values(tmp_path / kind), [name[:-7] for name in arrays if name.endswith(".scales")]
        assert len(modules) > 5
        for module in modules:
            weight = arrays[f"{module}.weight"]
            scales, biases = (arrays[f"{module}.{part}"].astype(mx.float32) for part in ("scales", "biases"))
            theirs = mx.dequantize(weight, scales, biases, group_size=64, bits=bits)
            torch.testing.assert_close(
                torch.tensor(theirs.tolist()), ours[f"{module}.weight"], rtol=1e-6, atol=1e-7
            )  # a product and a sum, rounded once or twice


def test_no_worse_than_mlx() -> None:
    """Our numbers are at least as near as those that MLX chooses."""
    mx = pytest.importorskip("mlx.core")
    rows = torch.randn(16, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    for bits in (4, 8):
        written = MlxAffine(bits).packed("m", rows)
        dtypes = {"weight": mx.uint32, "scales": mx.bfloat16, "biases": mx.bfloat16}
        ours = [mx.array(written[f"m.{part}"].tolist(), dtype=dtype) for part, dtype in dtypes.items()]
        theirs = mx.quantize(mx.array(rows.tolist(), dtype=mx.bfloat16), group_size=64, bits=bits)
        made = (mx.dequantize(*packed, group_size=64, bits=bits).astype(mx.float32) for packed in (ours, theirs))
        ours_off, theirs_off = (float((torch.tensor(values.tolist()) - rows.float()).norm()) for values in made)
        assert ours_off <= 1.01 * theirs_off


def test_words_hold_the_first_number_lowest() -> None:
    assert in_words(torch.tensor([[1, 2, 0, 0, 0, 0, 0, 15]], dtype=torch.int32), 4).tolist() == [[0x21 - (1 << 28)]]
    assert in_words(torch.tensor([[1, 2, 3, 4]], dtype=torch.int32), 8).tolist() == [[0x04030201]]


def test_other_sources(wide: Path, tmp_path: Path) -> None:
    """A GGUF file and another tool's packed checkpoint become the official layout, as they are read."""
    export_gguf(wide / "target", tmp_path / "t.gguf", "Q8_0")
    export_directory(tmp_path / "t.gguf", tmp_path / "float", "safetensors", "F32")
    same(tmp_path / "float", tmp_path / "t.gguf")
    export_directory(wide / "target", tmp_path / "w4", "compressed-tensors", "W4A16")
    again = export_directory(tmp_path / "w4", tmp_path / "again", "compressed-tensors", "W4A16")
    assert again.changed.changed == 0
    same(tmp_path / "w4", tmp_path / "again")


def test_heads_and_tables_are_left_to_their_tools(wide: Path, tmp_path: Path) -> None:
    """A module of a tied head exists in other programs; they must not look for its packed weight."""
    export_directory(wide / "target", tmp_path / "out", "compressed-tensors", "FP8")
    ignored = read_json(tmp_path / "out" / "config.json")["quantization_config"]["ignore"]
    stored = {name: header.dtype for name, header in read_headers(tmp_path / "out").items()}
    assert {"lm_head", "model.embed_tokens"} <= set(ignored)
    assert stored["model.embed_tokens.weight"] == "BF16"
    assert not [name for name in ignored if stored.get(f"{name}.weight", "BF16") != "BF16"]


def test_towers_and_companions_go_along(tmp_path: Path) -> None:
    """What belongs to images is copied as it is, under its name, and is no linear to unpack."""
    target, drafter = agreeing_pair()
    save_pair(tmp_path, target, drafter)
    source = tmp_path / "target"
    raw = read_json(source / "config.json")
    text = {**raw, "model_type": "gemma4_text"}
    (source / "config.json").write_text(json.dumps({
        "model_type": "gemma4", "architectures": ["Gemma4ForConditionalGeneration"], "text_config": text,
        "vision_config": {"model_type": "gemma4_vision"}, "tie_word_embeddings": True}))  # fmt: skip

    tensors = {
        name.replace("model.", "model.language_model."): t
        for name, t in load_file(source / "model.safetensors").items()
    }
    tower = {"model.vision_tower.layer.weight": torch.randn(8, 32), "model.embed_vision.bias": torch.randn(8)}
    save_file({**tensors, **tower}, source / "model.safetensors")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    export_directory(source, tmp_path / "out", "compressed-tensors", "FP8")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in tower.items())
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    quantised = read_json(tmp_path / "out" / "config.json")
    assert "model.vision_tower.layer" in quantised["quantization_config"]["ignore"]
    assert quantised["vision_config"] == {"model_type": "gemma4_vision"}
    assert read_config(tmp_path / "out") == read_config(source)


def test_a_drafter_takes_a_tokenizer_along(tmp_path: Path) -> None:
    export_directory(DRAFTER, tmp_path / "out", "mlx", "BF16", tokenizer=TARGET)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (TARGET / "tokenizer.json").read_bytes()
    own = read_json(DRAFTER / "generation_config.json")
    assert read_json(tmp_path / "out" / "generation_config.json") == own != read_json(TARGET / "generation_config.json")


def test_bytes_done_are_told(wide: Path, tmp_path: Path) -> None:
    """Of what is written, and of what is read again."""
    size = sum(header.nbytes for header in text_headers(wide / "target").values())
    told: dict[str, list[tuple[int, int]]] = {"gguf": [], "directory": [], "checked": []}
    export_gguf(wide / "target", tmp_path / "t.gguf", tokenizer=None, on_bytes=lambda *done: told["gguf"].append(done))
    export_directory(
        wide / "target", tmp_path / "out", on_bytes=lambda *done: told["directory"].append(done),
        on_checked=lambda *done: told["checked"].append(done),
    )  # fmt: skip
    for of_one in told.values():
        assert len(of_one) > 20 and of_one == sorted(of_one) and of_one[-1] == (size, size)


def test_refusals_leave_nothing(wide: Path, tmp_path: Path) -> None:
    def refused(sentence: str, *arguments: Any, error: Any = QuantisationError, **named: Any) -> None:
        with pytest.raises(error, match=sentence):
            export_directory(*arguments, **named)
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))

    refused("type 'W3' can not be written as mlx; use one of", wide / "target", tmp_path / "out", "mlx", "W3")
    write_quantised_copy(wide / "target", tmp_path / "int8", parse_weight_types("int8"))
    refused("is quantised already", tmp_path / "int8", tmp_path / "out")
    export_gguf(wide / "target", tmp_path / "q8.gguf", "Q8_0")
    refused("values were rounded", tmp_path / "q8.gguf", tmp_path / "out", error=CheckpointError, strict=True)
    moe = dataclasses.replace(TINY, enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=16)
    save_pair(tmp_path, random_target(config=moe), wide_drafter(PLE))
    refused(r"packs experts whose rows are whole groups", tmp_path / "target", tmp_path / "out", "compressed-tensors",
            "W4A16")  # fmt: skip
    export_directory(tmp_path / "target", tmp_path / "moe")
    assert read_config(tmp_path / "moe") == read_config(tmp_path / "target")
    large = random_target(config=PLE)
    large.checkpoint_tensors()["model.norm.weight"].copy_(torch.full((large.config.hidden_size,), 1e30))
    shutil.rmtree(tmp_path / "target")
    save_pair(tmp_path, large, wide_drafter(PLE))
    refused(
        "out of the type's range", tmp_path / "target", tmp_path / "out", "safetensors", "F16", error=CheckpointError
    )


@pytest.mark.parametrize("fault", ["zeros", "shifted"])
def test_a_fault_in_writing_is_found(wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """The check after writing is no formality: damaged bytes, or numbers in another order, are refused."""
    if fault == "zeros":
        write = SafetensorsWriter.write

        def damaged(self: Any, name: str, data: memoryview, first: int = 0) -> None:
            write(self, name, memoryview(bytes(len(data))) if "q_proj" in name and "packed" in name else data, first)

        monkeypatch.setattr(SafetensorsWriter, "write", damaged)
    else:
        packed = Integers.packed
        monkeypatch.setattr(Integers, "packed", lambda self, module, rows: packed(self, module, rows.roll(1, 1)))
    with pytest.raises(CheckpointError, match="is off by"):
        export_directory(wide / "target", tmp_path / "out", "compressed-tensors", "W4A16")
    assert not (tmp_path / "out").exists()


def test_the_count_of_changes() -> None:
    counted = Changed()
    counted.count(torch.tensor([1.0, 2.0], dtype=torch.bfloat16), torch.tensor([1.001, 3.0]))
    assert (counted.values, counted.changed) == (2, 1)
    assert counted.error == pytest.approx((1.000001 / 5) ** 0.5)


def test_on_the_command_line(wide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["export", str(wide / "target"), "--out", str(tmp_path / "out"), "--to", "compressed-tensors"]
    assert main(arguments) == 0
    assert "matrices as W4A16" in capsys.readouterr().out
    assert main(arguments) == 2  # it is there already
    assert "is no empty directory" in capsys.readouterr().err
    assert main([*arguments, "--type", "fp7"]) == 2
    assert "use one of W4A16, W8A16, FP8" in capsys.readouterr().err
    assert main([*arguments[:3], str(tmp_path / "t.gguf")]) == 0
    assert (tmp_path / "t.md").read_text().startswith("---\nlicense: ")
    mask = os.umask(0)
    os.umask(mask)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o666 & ~mask}
