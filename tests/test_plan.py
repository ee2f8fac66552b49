"""What `gemma-mtp plan` says: sizes against the models themselves, Google's own figures, and what the engine takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import TINY, WIDE, agreeing_pair, random_drafter, random_target, save_pair, wide_drafter
from test_cli import refused

from gemma_mtp.backend.native import native_available
from gemma_mtp.backend.select import make_backend
from gemma_mtp.checkpoint import empty_model, open_source, save_target, stored_tensors
from gemma_mtp.cli import main
from gemma_mtp.cli.doctor_checks import as_loaded
from gemma_mtp.config import PRESETS, DrafterConfig, TargetConfig
from gemma_mtp.config.generation import GenerationDefaults
from gemma_mtp.engine.engine import Engine
from gemma_mtp.engine.loaded import LoadedPair
from gemma_mtp.engine.pair import choose_dtype, load_pair
from gemma_mtp.engine.pool_size import largest_context as largest_in_pool
from gemma_mtp.engine.pool_size import most_sequences as most_in_pool
from gemma_mtp.engine.pool_size import pool_blocks, pool_bytes, sequence_blocks
from gemma_mtp.engine.settings import EngineSettings
from gemma_mtp.errors import EngineError, GemmaMtpError
from gemma_mtp.interop.gguf import export_gguf
from gemma_mtp.measure.memory import inspect_checkpoint
from gemma_mtp.measure.plan import (
    Load,
    best_gain,
    engine_settings,
    gains,
    kv_read_bytes,
    largest_context,
    most_sequences,
    takes,
)
from gemma_mtp.measure.plan_models import known_name, planned
from gemma_mtp.sizes import machine
from gemma_mtp.sizes.machine import Build, cores, free_memory, read_bandwidth, total_memory
from gemma_mtp.sizes.run import PROCESS_BYTES, Loaded, Operators
from gemma_mtp.sizes.weights import target_read_bytes, weight_bytes, wide_copies
from gemma_mtp.units import parse_bytes, shown_bytes
from gemma_mtp.weight_types import UNIFORM, WeightTypes, parse_weight_types

SIZES = ("E2B", "E4B", "12B", "26B-A4B", "31B")
#: FACTS: bytes of the drafters' files, of parameters and a header of some kilobytes
DRAFTER_FILES = {"E2B": 157_565_344, "E4B": 159_138_208, "12B": 845_719_296, "31B": 939_042_560}
#: FACTS: documented gigabytes in BF16, and bytes of the BF16 files, with vision and audio
DOCUMENTED = {"E2B": 11.4, "E4B": 17.9, "12B": 26.7, "26B-A4B": 57.7, "31B": 69.9}
FILES = {"E2B": 10_246_621_918, "E4B": 15_992_595_884, "26B-A4B": 51_612_009_916, "31B": 62_546_338_248}


def preset(size: str) -> tuple[TargetConfig, DrafterConfig]:
    target, drafter = PRESETS[f"gemma-4-{size}-it"], PRESETS[f"gemma-4-{size}-it-assistant"]
    assert isinstance(target, TargetConfig) and isinstance(drafter, DrafterConfig)
    return target, drafter


def loaded(size: str, kinds: str = "none", **changed: Any) -> Loaded:
    target, drafter = preset(size)
    return replace(Loaded(target, drafter, parse_weight_types(kinds), 2, 4, "native", 2), **changed)


@pytest.mark.parametrize(("kinds", "dtype"), [
    ("none", torch.float32), ("none", torch.bfloat16), ("int8", torch.bfloat16), ("int4", torch.float32),
    ("int4", torch.bfloat16), ("target=int4", torch.bfloat16), ("embeddings=int8,drafter-head=int4", torch.bfloat16),
    *(pytest.param(kinds, torch.float32, marks=pytest.mark.slow)
      for kinds in ("int8", "target=int4", "embeddings=int8,drafter-head=int4")),
])  # fmt: skip
def test_weights_are_those_of_the_models(kinds: str, dtype: torch.dtype) -> None:
    """All official geometries, and small ones whose rows can not all be quantised."""
    types = parse_weight_types(kinds)
    small = [TargetConfig(config) for config in (TINY, *WIDE.values())]
    drafters = [random_drafter(TINY, centroids=True).config, wide_drafter(WIDE["ple"]).config]
    for config in (*PRESETS.values(), *small, *drafters):
        model = empty_model(config, WeightTypes(), dtype)
        model.quantise_(types)
        tensors = stored_tensors(model.checkpoint_tensors()).values()
        assert weight_bytes(config, types, dtype.itemsize) == sum(tensor.nbytes for tensor in tensors), (
            config.model_type
        )


@pytest.mark.parametrize("size", DRAFTER_FILES)
def test_drafters_are_as_large_as_their_official_files(size: str) -> None:
    header = DRAFTER_FILES[size] - weight_bytes(preset(size)[1], WeightTypes(), 2)
    assert 0 < header < 8192


@pytest.mark.parametrize("size", SIZES)
def test_targets_against_googles_documented_memory(size: str) -> None:
    """Google's figures are 1.12 times the files, which have vision and audio towers: 0.3 to 1.2 GB of E2B to 31B."""
    ours = weight_bytes(preset(size)[0], WeightTypes(), 2)
    towers = FILES.get(size, ours) - ours
    assert 0 <= towers < 1.3e9
    assert FILES.get(size, 23.92e9) * 1.12 == pytest.approx(1e9 * DOCUMENTED[size], rel=0.01)
    assert 0.8 < ours / (1e9 * DOCUMENTED[size]) < 0.9


def test_what_native_operators_keep_beside_the_weights() -> None:
    if not native_available():
        pytest.skip("no native operators")
    from gemma_mtp.backend.cpu import CpuBackend

    target, drafter = random_target(), random_drafter(centroids=True)
    backend = make_backend(target.to(torch.bfloat16), drafter.to(torch.bfloat16))
    assert isinstance(backend, CpuBackend)
    for config, memory in (
        (TargetConfig(TINY), backend._stack._memory), (drafter.config, backend._drafts._memory),  # type: ignore[union-attr]
    ):  # fmt: skip
        own = {t.untyped_storage().data_ptr() for m in (target, drafter) for t in (*m.parameters(), *m.buffers())}
        kept = {
            t.untyped_storage().data_ptr(): t.nbytes
            for t in memory.tensors
            if t.untyped_storage().data_ptr() not in own
        }
        scalars = 4 * config.text.num_hidden_layers  # a number each, which is no tensor
        assert sum(kept.values()) == wide_copies(config, 2) - scalars


@pytest.mark.parametrize(("sequences", "context"), [(1, 40), (3, 200), (8, 1000)])
def test_the_engine_takes_what_was_planned(sequences: int, context: int) -> None:
    target, drafter = agreeing_pair()
    backend = make_backend(target, drafter)
    pair = LoadedPair(backend, None, GenerationDefaults(()))
    operators: Operators = "reference" if not native_available() else "native"
    run = Loaded(TargetConfig(TINY), drafter.config, WeightTypes(), 4, 4, operators)
    load = Load(sequences, context, 4)
    assert run.chunk_rows == backend.chunk_rows
    pool = Engine(pair, engine_settings(run, load)).pool
    allocated = {
        kind: sum(2 * rows.keys.nbytes for i, rows in pool.layers.items() if TINY.layer_types[i] == kind)
        for kind in ("full_attention", "sliding_attention")
    }
    taken = takes(run, load)
    assert (taken.kv_full, taken.kv_sliding) == (allocated["full_attention"], allocated["sliding_attention"])
    caches = [pool.cache(context + 17) for _ in range(sequences)]
    for cache in caches:  # each has room for all of its tokens at once
        cache.open()
        for begin in range(0, context, 64):
            rows = min(64, context - begin)
            cache.table.reserve(rows)
            cache.table.commit(rows)


def test_what_fits_is_the_largest_that_does() -> None:
    run, memory = loaded("31B", "int4"), 24e9
    tokens = largest_context(run, Load(1, 1, 4), memory)
    assert takes(run, Load(1, tokens, 4)).total <= memory < takes(run, Load(1, tokens + 64, 4)).total
    assert tokens > 1024
    count = most_sequences(run, Load(1, 1024, 4), memory)
    assert takes(run, Load(count, 1024, 4)).total <= memory < takes(run, Load(count + 1, 1024, 4)).total
    assert largest_context(loaded("31B"), Load(1, 1, 4), memory) == 0
    assert most_sequences(loaded("31B"), Load(1, 1, 4), memory) == 0
    assert largest_context(loaded("E2B", "int8"), Load(1, 1, 4), memory) == 131072


def test_parts_grow_with_what_they_depend_on() -> None:
    base = takes(loaded("E2B"), Load(2, 8192, 4))
    assert base.total == sum(v for k, v in base.to_dict().items() if k not in ("kv", "total", "drafter_share"))
    longer, more = takes(loaded("E2B"), Load(2, 16384, 4)), takes(loaded("E2B"), Load(4, 8192, 4))
    assert longer.kv_full == pytest.approx(2 * base.kv_full, rel=0.01)
    assert longer.kv_sliding == base.kv_sliding
    assert more.kv == 2 * base.kv
    assert takes(loaded("E2B", kv_bytes=2), Load(2, 8192, 4)).kv == base.kv // 2
    assert takes(loaded("E2B"), Load(2, 8192, 16)).activations > base.activations
    none = takes(loaded("E2B", drafter=None), Load(2, 8192, 4))
    assert none.drafter == 0 and none.weights == base.weights
    assert 0 < base.drafter_share < 0.05


def test_gains_are_those_of_the_bytes_read() -> None:
    """Dense: a round reads the weights once, so its time hardly grows. Experts: every row chooses others."""
    dense, moe = loaded("31B"), loaded("26B-A4B")
    plain = target_read_bytes(dense.target, WeightTypes(), 2, 1)
    assert plain == target_read_bytes(dense.target, WeightTypes(), 2, 9)
    found = gains(dense, Load(1, 1024, 4), 0.8, 100e9)
    cache = kv_read_bytes(dense.target.text, 1024, 4)
    assert found[0].round_seconds == pytest.approx((plain + cache) / 100e9)
    assert [gain.draft_tokens for gain in found] == list(range(9))
    assert found[2].tokens_per_round == pytest.approx(1 + 0.8 + 0.64)
    best = best_gain(found, 0.8)
    assert best.speedup == max(gain.speedup for gain in found) > 2.5
    few, many = best_gain(gains(moe, Load(1, 1024, 4), 0.8, 100e9), 0.8), gains(moe, Load(8, 1024, 4), 0.8, 100e9)
    assert 1 < few.speedup < 1.6, "Google: it may not gain at batch 1"
    assert best_gain(many, 0.8).speedup > few.speedup, "and gains more at batch 4 to 8"
    assert best_gain(gains(dense, Load(1, 1024, 4), 0.0, 100e9), 0.0).draft_tokens == 0
    doubled = gains(dense, Load(1, 1024, 4), 0.8, 200e9)
    assert doubled[3].tokens_per_second == pytest.approx(2 * found[3].tokens_per_second)
    assert doubled[3].speedup == pytest.approx(found[3].speedup)


def test_shared_layers_read_the_keys_of_others() -> None:
    text = preset("E2B")[0].text
    full, sliding = 7 * 2 * 512 * 10_000 * 4, 28 * 2 * 256 * 512 * 4
    assert kv_read_bytes(text, 10_000, 4) == full + sliding


# the pool


def test_a_pool_of_given_memory_has_the_same_tokens_for_all() -> None:
    text, chunk = preset("E2B")[0].text, 128
    for sequences, tokens in ((1, 4096), (5, 20_000), (16, 131072)):
        counts = sequence_blocks(text, tokens, chunk, sequences)
        mb = pool_bytes(text, counts, 4) / 10**6
        settings = EngineSettings(max_running=sequences, kv_memory_mb=mb)
        assert pool_blocks(text, settings, tokens, chunk, 4) == counts
        assert largest_in_pool(text, sequences, pool_bytes(text, counts, 4), chunk, 4) >= tokens
        assert most_in_pool(text, tokens, pool_bytes(text, counts, 4), chunk, 4) == sequences
        more = pool_blocks(text, replace(settings, kv_memory_mb=2 * mb), tokens, chunk, 4)
        assert all(more[kind] == pytest.approx(2 * counts[kind], rel=0.01) for kind in counts), "for prompts to come"


def test_an_open_pool_keeps_within_free_memory() -> None:
    text, chunk, settings = preset("31B")[0].text, 128, EngineSettings()
    wanted = pool_bytes(text, pool_blocks(text, settings, 32768, chunk, 4), 4)
    assert pool_blocks(text, settings, 32768, chunk, 4, 2 * wanted) == pool_blocks(text, settings, 32768, chunk, 4)
    room = int(0.5 * wanted)
    cut = pool_bytes(text, pool_blocks(text, settings, 32768, chunk, 4, room), 4)
    assert 0.95 * room < cut <= room


def test_a_refusal_says_what_would_fit() -> None:
    text, chunk = preset("31B")[0].text, 128
    room = 10 * 10**9
    with pytest.raises(
        EngineError, match=r"10\.0 GB of memory are free.*a request of (\d+) tokens would fit"
    ) as caught:
        pool_blocks(text, EngineSettings(), 262144, chunk, 4, room)
    tokens = int(str(caught.value).split("a request of ")[1].split()[0])
    assert pool_bytes(text, pool_blocks(text, EngineSettings(), tokens, chunk, 4, room), 4) <= room
    with pytest.raises(EngineError):
        pool_blocks(text, EngineSettings(), tokens + 64, chunk, 4, room)
    with pytest.raises(EngineError, match=r"8\.00 MB do not hold .* not even one would fit"):
        pool_blocks(text, EngineSettings(kv_memory_mb=8), 4096, chunk, 4)
    with pytest.raises(
        EngineError, match=r"20\.0 GB were asked .* 10\.0 GB of memory are free; a request of \d+ tokens"
    ):
        pool_blocks(text, EngineSettings(kv_memory_mb=20_000), 4096, chunk, 4, room)


# names, machine, command


def test_names_of_known_geometries() -> None:
    assert known_name("google/gemma-4-E2B-it-qat-q4_0-unquantized-assistant") == "gemma-4-E2B-it-assistant"
    assert known_name("gemma-4-31B-it") == "gemma-4-31B-it"
    assert known_name("gemma-4-3B-it") is None
    pair = planned("google/gemma-4-12B-it")
    assert (pair.target, pair.drafter) == preset("12B")
    assert planned("gemma-4-12B-it", no_drafter=True).drafter is None


def test_directories_and_files_are_read_as_they_say(tmp_path: Path) -> None:
    save_pair(tmp_path, *agreeing_pair())
    found = planned(str(tmp_path / "target"), str(tmp_path / "drafter"))
    assert found.target.text == replace(TINY)
    assert (found.drafter is not None, found.narrow) == (True, False)
    assert planned(str(tmp_path / "target" / "config.json")).drafter is None
    (tmp_path / "drafter").rename(tmp_path / "target-assistant")
    beside = planned(str(tmp_path / "target"))
    assert beside.drafter == found.drafter
    assert beside.drafter_name == str(tmp_path / "target-assistant")
    with pytest.raises(GemmaMtpError, match="it is a drafter"):
        planned(str(tmp_path / "target-assistant"))
    bundled = planned("bundled")
    assert (bundled.target.text.vocab_size, bundled.drafter is not None) == (4096, True)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_a_directory_is_planned_as_it_is_loaded(
    stored: torch.dtype, native: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Weights, keys and values have the sizes that the backend keeps, in `plan`, `inspect` and `doctor` alike."""
    if native and not native_available():
        pytest.skip("no native operators")
    if not native:
        monkeypatch.setenv("GEMMA_MTP_NATIVE", "0")
        for place in ("backend.native", "engine.pair"):
            monkeypatch.setattr(f"gemma_mtp.{place}.native_available", lambda: False)
    save_target(random_target(), TargetConfig(TINY), tmp_path, stored)
    assert main(["plan", str(tmp_path), "--no-drafter", "--bandwidth", "1GB", "--json"]) == 0
    read = json.loads(capsys.readouterr().out)
    pair, inspected = load_pair(tmp_path, use_drafter=False), inspect_checkpoint(tmp_path).kv_bytes
    assert inspected is not None
    kept = sum(weight.nbytes for weight in pair.target.checkpoint_tensors().values())
    assert read["choices"][0]["takes"]["weights"] == kept
    assert read["kv_element_bytes"] == inspected.element_bytes == pair.backend.kv_dtype.itemsize
    device, dtype = pair.backend.device, choose_dtype("auto", pair.backend.device, open_source(tmp_path))
    run = as_loaded(planned(str(tmp_path), no_drafter=True), WeightTypes(), device, dtype)
    assert (run.operators, run.kv_bytes) == (read["operators"], read["kv_element_bytes"])
    assert run.target_weights() == kept
    assert run.chunk_rows == pair.backend.chunk_rows


def test_a_gguf_file_is_planned_as_its_directory(tmp_path: Path) -> None:
    """Its geometry; blocks of Q8_0 are kept as they are, and the drafter is found beside the target."""
    save_pair(tmp_path, random_target(config=WIDE["ple"]), wide_drafter(WIDE["ple"]))
    for kind, kept in (("BF16", None), ("Q8_0", "q8_0")):
        names = (tmp_path / kind / f"t-{kind}.gguf", tmp_path / kind / f"mtp-t-{kind}.gguf")
        for part, name in zip(("target", "drafter"), names, strict=True):
            name.parent.mkdir(exist_ok=True)
            export_gguf(tmp_path / part, name, kind)
        found, expected = planned(str(names[0])), planned(str(tmp_path / "target"), str(tmp_path / "drafter"))
        assert set(found.types.parts.values()) == {kept} and found.narrow == (kind == "BF16")
        ours, theirs = (
            takes(Loaded(pair.target, pair.drafter, WeightTypes(), 2, 2, "reference", 1), Load(1, 64, 3), False)
            for pair in (found, expected)
        )
        assert ours == theirs


def test_cores_are_those_that_a_process_may_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its affinity, and by its container's share, as both versions of cgroups say it."""
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert cores() == 1
    finally:
        os.sched_setaffinity(0, before)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(64))
    assert cores() == 64
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    for quota, expected in (("-1\n", 64), ("250000\n", 3)):
        (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(quota)
        assert cores() == expected
    for text, expected in (("max 100000\n", 64), ("50000 100000\n", 1), ("400000 100000\n", 4), ("9900000 100000", 64)):
        (tmp_path / "cpu.max").write_text(text)
        assert cores() == expected


def test_bytes_are_read_and_shown() -> None:
    assert [parse_bytes(text, "-") for text in ("24GB", "7")] == [24 * 10**9, 7]
    assert parse_bytes("1.5GiB", "-") == 3 * 2**29
    for wrong in ("", "GB", "-1GB", "12 parsecs", "0"):
        with pytest.raises(GemmaMtpError, match=r"--memory is .* such as 24GB or 24GiB\."):
            parse_bytes(wrong, "--memory")
    assert [shown_bytes(n) for n in (12, 1234, 5e6, 2.5e10, 1.2e11)] == [
        "12 B",
        "1.23 kB",
        "5.00 MB",
        "25.0 GB",
        "120 GB",
    ]
    total, free = total_memory(), free_memory()
    assert total is not None and free is not None and 0 < free <= total
    assert 1e8 < read_bandwidth(1) < 1e13


def test_the_command_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["gemma-4-31B-it", "--quantize", "int4", "-n", "8", "-c", "32768", "--memory", "24GB"]
    assert main(["plan", *arguments, "--bandwidth", "300GB/s", "--json"]) == 0
    read = json.loads(capsys.readouterr().out)
    assert [choice["weights"] for choice in read["choices"]] == ["int4", "unquantised", "int8"]
    first = read["choices"][0]
    run = loaded("31B", "int4", kv_bytes=read["kv_element_bytes"], operators=read["operators"])
    assert first["takes"]["weights"] == takes(run, Load(8, 32768, 4)).weights
    assert first["fits"] is False
    assert (read["bandwidth"], read["bandwidth_from"], read["memory"]) == (3e11, "given", 24 * 10**9)
    assert first["parts"] == UNIFORM["int4"].parts
    assert len(read["gains"]) == 9


def test_the_command_as_text_and_picture(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["plan", "bundled", "--memory", "1GB", "--bandwidth", "10GB"]
    assert main([*arguments, "--plot", str(tmp_path / "plan.svg")]) == 0
    out = capsys.readouterr().out
    assert "what fits into memory: 1.00 GB (given)" in out
    assert "KV, sliding layers" in out
    assert "most with " in out
    assert (tmp_path / "plan.svg").read_text(encoding="utf-8").count("<path") > 10
    assert main([*arguments, "--no-drafter"]) == 0
    assert "plain decoding: at most" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["gemma-5-1B-it"], "neither a directory nor a known name (gemma-4-E2B-it"),
        (["gemma-4-E2B-it", "--context", "999999"], "--context is 999999, but must be from 1 to 131072"),
        (["gemma-4-E2B-it", "--sequences", "0"], "--sequences is 0"),
        (["gemma-4-E2B-it", "--acceptance", "1.5"], "--acceptance is 1.5"),
        (["gemma-4-E2B-it", "--memory", "much"], "--memory is 'much'"),
        (["gemma-4-E2B-it", "--device", "tpu"], "must be cpu or cuda"),
        (["gemma-4-E2B-it", "--quantize", "int3"], "quantize 'int3' is not known"),
        (["gemma-4-E2B-it", "--kv-type", "int8"], "--kv-type is 'int8'"),
        (["gemma-4-E2B-it", "--drafter", "gemma-4-31B-it-assistant"], "does not fit the target"),
        (["gemma-4-E2B-it", "--drafter", "gemma-4-31B-it"], "is a target, but --drafter must name a drafter"),
        (["gemma-4-E2B-it-assistant"], "is a drafter; give its target"),
        (["gemma-4-E2B-it", "--drafter", "bundled", "--no-drafter"], "--drafter and --no-drafter exclude each other"),
    ],
)
def test_refusals(capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str) -> None:
    assert sentence in refused(capsys, ["plan", *arguments])


def test_a_plan_needs_no_torch() -> None:
    code = (
        "import sys\n"
        "from gemma_mtp.measure import plan, plan_models\n"
        "pair = plan_models.planned('gemma-4-26B-A4B-it')\n"
        "from gemma_mtp.sizes.run import Loaded\n"
        "run = Loaded(pair.target, pair.drafter, pair.types, 2, 4, 'native')\n"
        "assert plan.takes(run, plan.Load(1, 1024, 4)).total > 5e10\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


@pytest.mark.parametrize(
    ("library", "build"),
    [
        ("libtorch_cuda.so", "cuda"),
        pytest.param("torch_cuda.dll", "cuda", marks=pytest.mark.slow),
        ("libtorch_cpu.so", "cpu"),
    ],
)
def test_a_plan_knows_which_pytorch_is_installed(library: str, build: Build, tmp_path: Path) -> None:
    """By its libraries: one that can not be imported is found too."""
    (tmp_path / "torch/lib").mkdir(parents=True)
    (tmp_path / "torch/__init__.py").write_text("raise ImportError('a plan imports PyTorch')\n")
    (tmp_path / "torch/lib" / library).touch()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "gemma_mtp", "plan", "gemma-4-E2B-it", "--json"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    (choice, *_) = json.loads(ran.stdout)["choices"]
    assert PROCESS_BYTES["cuda"] > PROCESS_BYTES["cpu"]
    assert choice["takes"]["process"] == PROCESS_BYTES[build]
