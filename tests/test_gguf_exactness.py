"""Blocks read from GGUF files are row-invariant as all else: drafted, batched or preempted, the tokens are the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import test_engine
import test_exactness
from gguf_files import blocks, rewritten
from mixed_load import play, requests
from models import PLE, VOCAB, letters, native_only, random_drafter, random_target, save_pair

from gemma_mtp.decoding.draft_length import DraftTokens
from gemma_mtp.engine.pair import Pair, bundled_directory, load_pair
from gemma_mtp.engine.settings import EngineSettings
from gemma_mtp.interop.gguf import export_gguf
from gemma_mtp.weights.int4 import Int4
from gemma_mtp.weights.int8x32 import Int8x32
from gemma_mtp.weights.matrix import matrices

pytestmark = native_only

#: kept as blocks, and made floating-point numbers
KINDS = ("Q8_0", "Q4_0", pytest.param("Q5_0", marks=pytest.mark.slow))
K_KINDS = ("Q4_K", "Q5_K", "Q6_K")
DRAFT_TOKENS: tuple[DraftTokens, ...] = (1, 3, 6, "auto")
LONG, OTHER = [(7 * i * i + i) % VOCAB for i in range(120)], [(5 * i + 3) % VOCAB for i in range(90)]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """The bundled pair as files of a kind; Q5_0 is the package's own quantisation of the float32 file."""
    root = tmp_path_factory.mktemp("files")
    loaded: dict[str, Pair] = {}

    def pair(kind: str) -> Pair:
        if kind not in loaded:
            files = []
            for role in ("target", "drafter"):
                file = root / f"{role}-{kind}.gguf"
                export_gguf(bundled_directory() / role, file, "F32" if kind == "Q5_0" else kind)
                files.append(_quantised(file, kind) if kind == "Q5_0" else file)
            loaded[kind] = load_pair(*files, device="cpu")
        return loaded[kind]

    return pair


def _quantised(file: Path, kind: str) -> Path:
    of = gguf.GGMLQuantizationType[kind]
    changed = {
        tensor.name: (gguf.quantize(np.array(tensor.data), of), kind)
        for tensor in gguf.GGUFReader(file).tensors
        if len(tensor.shape) == 2 and tensor.shape[0] % 32 == 0
    }
    return rewritten(file, file.with_name(f"{kind}-{file.name}"), changed)


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_are_kept_or_converted(pairs: Callable[[str], Pair], kind: str) -> None:
    """So that the generations below are of what they say."""
    kept = {type(matrix.stored) for matrix in matrices(pairs(kind).target)} & {Int8x32, Int4}
    assert kept == {"Q8_0": {Int8x32}, "Q4_0": {Int4}, "Q5_0": set()}[kind]


@pytest.mark.parametrize(("kinds", "count"), [
    (("Q8_0", "Q4_0"), 6), pytest.param(("Q8_0", "Q4_0", "Q5_0"), 200, marks=pytest.mark.slow),
])  # fmt: skip
def test_drafted_equals_plain(pairs: Callable[[str], Pair], kinds: tuple[str, ...], count: int) -> None:
    """Any draft length, temperature, thread count and chunk size; a third with log-probabilities, bit for bit."""
    accepted = dict.fromkeys(kinds, 0)
    for kind, drafts, mismatch in test_exactness.play({kind: pairs(kind) for kind in kinds}, count):
        assert mismatch is None
        accepted[kind] += drafts
    assert min(accepted.values()) > 0


@pytest.mark.parametrize("count", [8, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_batches_and_preemption_change_nothing(pairs: Callable[[str], Pair], kind: str, count: int) -> None:
    pair = pairs(kind)
    vars(pair.backend).pop("chunk_rows", None)  # as the test above may have left it
    settings = EngineSettings(max_running=8, max_tokens=250, kv_memory_mb=3, max_stall_seconds=0.002)
    drawn = enumerate(test_engine.bundled_load(pair, count))
    load = [dataclasses.replace(request, draft_tokens=DRAFT_TOKENS[i % 4]) for i, request in drawn]
    loaded = play(pair, load, settings)
    assert loaded.mismatches == []
    assert loaded.stats.accepted_tokens > count
    assert count < 20 or loaded.stats.preemptions > 0


@pytest.mark.parametrize("count", [0, pytest.param(60, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", K_KINDS)
def test_the_k_kinds(kind: str, count: int, tmp_path: Path) -> None:
    """Which have rows of 256 values at least: random ones, of which all layers' MLPs are made."""
    config = dataclasses.replace(PLE, hidden_size=256, intermediate_size=256)
    save_pair(tmp_path, random_target(config=config), random_drafter(config))
    export_gguf(tmp_path / "target", tmp_path / "f32.gguf", "F32")
    changed: dict[str, Any] = {}
    for tensor in gguf.GGUFReader(tmp_path / "f32.gguf").tensors:
        if ".ffn_" in tensor.name and len(tensor.shape) == 2:
            changed[tensor.name] = blocks(kind, int(tensor.shape[1]), int(tensor.shape[0]), len(changed)), kind
    assert changed
    file = rewritten(tmp_path / "f32.gguf", tmp_path / "blocks.gguf", changed)
    loaded = load_pair(file, tmp_path / "drafter", device="cpu")
    pair = dataclasses.replace(loaded, tokenizer=letters(tmp_path))
    played = play(pair, requests([LONG, OTHER], count or 4, seed=3, longest=24), test_engine.CRAMPED)
    assert played.mismatches == []
