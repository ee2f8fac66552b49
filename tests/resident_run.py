"""A run whose memory is looked at: `python resident_run.py CASE` prints, as JSON, what it takes beyond a tiny pair's.

What the process takes before is that of a tiny pair that has decoded already: PyTorch, the operators, the tokenizer's
library. Then a pair is made, an engine with the planned pool, every block of it is written, and a long prompt and some
rounds are played.
"""

from __future__ import annotations

import gemma_mtp.cli.environment  # noqa: F401  # isort: skip  (before PyTorch)

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
from models import agreeing_pair, of_zeros

from gemma_mtp.backend.native import native_available, set_threads
from gemma_mtp.backend.select import make_backend
from gemma_mtp.checkpoint import empty_model
from gemma_mtp.config import PRESETS, DrafterConfig, TargetConfig, TextConfig
from gemma_mtp.config.generation import GenerationDefaults
from gemma_mtp.decoding.params import SamplingParams
from gemma_mtp.engine.engine import Engine
from gemma_mtp.engine.loaded import LoadedPair
from gemma_mtp.engine.pair import load_pair
from gemma_mtp.engine.request import Request
from gemma_mtp.engine.settings import EngineSettings
from gemma_mtp.measure.plan import Load, engine_settings, takes
from gemma_mtp.measure.plan_models import planned
from gemma_mtp.sizes.run import Loaded, Operators
from gemma_mtp.weight_types import WeightTypes

THREADS = 2


def small_pair() -> tuple[TargetConfig, DrafterConfig]:
    """Hidden 640, 18 layers, a vocabulary of 32768: 112 M parameters; and a drafter of 13 M."""
    e2b, assistant = _preset("E2B")
    text = dataclasses.replace(
        e2b.text, vocab_size=32768, hidden_size=640, intermediate_size=2560, num_hidden_layers=18,
        layer_types=e2b.text.layer_types[:5] * 3 + e2b.text.layer_types[2:5], num_attention_heads=4,
        num_kv_shared_layers=0, use_double_wide_mlp=False, hidden_size_per_layer_input=0, vocab_size_per_layer_input=0,
        max_position_embeddings=8192,
    )  # fmt: skip
    return TargetConfig(text), _drafter(assistant, text)


def e2b_shaped() -> tuple[TargetConfig, DrafterConfig]:
    """E2B's widths, heads, per-layer inputs, shared layers and centroid head, with 10 layers of 35 and a vocabulary of
    16384 of 262144."""
    e2b, assistant = _preset("E2B")
    text = dataclasses.replace(
        e2b.text, vocab_size=16384, vocab_size_per_layer_input=16384, num_hidden_layers=10,
        layer_types=e2b.text.layer_types[:10], num_kv_shared_layers=5,
    )  # fmt: skip
    return TargetConfig(text), _drafter(assistant, text)


def _preset(size: str) -> tuple[TargetConfig, DrafterConfig]:
    target, drafter = PRESETS[f"gemma-4-{size}-it"], PRESETS[f"gemma-4-{size}-it-assistant"]
    assert isinstance(target, TargetConfig) and isinstance(drafter, DrafterConfig)
    return target, drafter


def _drafter(config: DrafterConfig, target: TextConfig) -> DrafterConfig:
    text = dataclasses.replace(config.text, vocab_size=target.vocab_size)
    return dataclasses.replace(config, text=text, backbone_hidden_size=target.hidden_size)


CASES = {"small": (small_pair, Load(4, 4096, 4)), "e2b": (e2b_shaped, Load(2, 8192, 4))}


def zero_pair(target: TargetConfig, drafter: DrafterConfig, types: WeightTypes) -> LoadedPair:
    """Of zeros that are written, so that they are in memory; the ordering of tokens is one."""
    models: list[Any] = []
    for config in (target, drafter):
        model = empty_model(config, WeightTypes()).to(torch.bfloat16)
        model.quantise_(types)
        models.append(of_zeros(model).eval().requires_grad_(False))
    head = models[1].masked_embedding
    if head is not None:
        head.token_ordering.copy_(torch.arange(len(head.token_ordering)))
    return LoadedPair(make_backend(*models), None, GenerationDefaults(()))


def play(engine: Engine, tokens: int) -> None:
    """Read two prompts, in whole chunks, and play rounds of both."""
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    for i in range(2):
        prompt = [3 + (i + j) % 50 for j in range(tokens)]
        engine.submit(Request(prompt, params, draft_tokens=4))
    while not engine.idle:
        engine.step()


def resident() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def main(case: str, kinds: WeightTypes) -> dict[str, Any]:
    set_threads(THREADS)
    tiny = LoadedPair(make_backend(*agreeing_pair()), None, GenerationDefaults(()))
    play(Engine(tiny, EngineSettings(max_running=2, max_tokens=400)), 150)
    assert tiny.drafter is not None
    zero_pair(TargetConfig(tiny.target.config), tiny.drafter.config, WeightTypes())  # loads another part of PyTorch
    before = resident()
    operators: Operators = "reference" if not native_available() else "native"
    pair: LoadedPair
    if case == "bundled":
        found, load = planned("bundled"), Load(16, 2048, 4)
        assert found.drafter is not None
        configs = found.target, found.drafter
        pair = load_pair()
    else:
        made, load = CASES[case]
        configs = made()
        pair = zero_pair(*configs, kinds)
    element = pair.backend.kv_dtype.itemsize
    run = Loaded(*configs, kinds, 2, element, operators, THREADS, tokenizer=case == "bundled")
    engine = Engine(pair, engine_settings(run, load))
    for rows in engine.pool.layers.values():  # as they are once every sequence has all its tokens
        rows.keys.zero_()
        rows.values.zero_()
    play(engine, 140)
    if operators == "native":
        pair.backend._rope_for(load.context + 17)  # type: ignore[attr-defined]
    weights = sum(t.nbytes for m in (pair.target, pair.drafter) for t in _tensors(m))
    pool = sum(2 * rows.keys.nbytes for rows in engine.pool.layers.values())
    return {
        "before": before, "after": resident(), "weights": weights, "pool": pool,
        "planned": takes(run, load).to_dict(),
    }  # fmt: skip


def _tensors(model: Any) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


if __name__ == "__main__":
    from gemma_mtp.weight_types import parse_weight_types

    print(json.dumps(main(sys.argv[1], parse_weight_types(sys.argv[2]))))
