"""Pairs of random weights in the official layout whose drafter always agrees, so that a run measures cost alone.

The norms after every residual branch are zero in both models, so that both repeat the last token while every product
still runs. They are written once to a cache directory, from a fixed seed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma_mtp.checkpoint.safetensors import INDEX_FILE
from gemma_mtp.checkpoint.tensor_files import save_tensors
from gemma_mtp.config import (
    FULL,
    PRESETS,
    SLIDING,
    DrafterConfig,
    TargetConfig,
    TextConfig,
    drafter_config_to_hf,
    target_config_to_hf,
)
from gemma_mtp.json_files import write_json
from gemma_mtp.model.drafter import Drafter
from gemma_mtp.model.target import Target
from gemma_mtp.weights.base import Weight

#: a shard is closed once it holds so many bytes; a larger tensor has one to itself
SHARD_BYTES = 512 << 20
#: random values that large matrices repeat; no multiple of any row's length, so that rows differ
BLOCK_VALUES = 4_000_037
#: part of a pair's directory name: another recipe writes other weights
RECIPE = 2
#: scale of the drafter's head against the target's: so its logits leave no doubt, and `auto` none about the drafts
SURENESS = 5
#: norms after the residual branches; without these branches a model repeats its last token
BRANCH_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm", "post_per_layer_input_norm")


@dataclass(frozen=True)
class Geometry:
    target: TextConfig
    drafter: DrafterConfig


def _small() -> Geometry:
    target = TextConfig(
        vocab_size=32768, hidden_size=640, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=2,
        num_key_value_heads=1, num_global_key_value_heads=1, head_dim=256, global_head_dim=512,
        layer_types=((SLIDING,) * 5 + (FULL,)) * 3, sliding_window=512, final_logit_softcapping=30.0,
    )  # fmt: skip
    text = dataclasses.replace(
        target, hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_kv_shared_layers=4,
        layer_types=(SLIDING,) * 3 + (FULL,), final_logit_softcapping=None,
    )  # fmt: skip
    return Geometry(target, DrafterConfig(text, target.hidden_size))


def _e2b() -> Geometry:
    target, drafter = PRESETS["gemma-4-E2B-it"], PRESETS["gemma-4-E2B-it-assistant"]
    assert isinstance(target, TargetConfig) and isinstance(drafter, DrafterConfig)
    return Geometry(target.text, drafter)


def _mid() -> Geometry:
    """E2B's widths, vocabulary and drafter, without per-layer embeddings, twelve layers."""
    e2b = _e2b()
    target = dataclasses.replace(
        e2b.target, num_hidden_layers=12, layer_types=((SLIDING,) * 5 + (FULL,)) * 2, num_kv_shared_layers=0,
        use_double_wide_mlp=False, hidden_size_per_layer_input=0, vocab_size_per_layer_input=0,
    )  # fmt: skip
    return Geometry(target, e2b.drafter)


GEOMETRIES = {"small": _small, "mid": _mid, "e2b": _e2b}


def cache_directory() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "gemma-mtp" / "benchmarks"


def written_pair(name: str, cache: Path) -> tuple[Path, Path]:
    """The directories of a pair's target and drafter, written first where they are not there yet."""
    geometry = GEOMETRIES[name]()
    target = target_config_to_hf(TargetConfig(geometry.target))
    drafter = drafter_config_to_hf(geometry.drafter)
    key = json.dumps([RECIPE, target, drafter], sort_keys=True).encode()
    directory = cache / f"{name}-{hashlib.sha256(key).hexdigest()[:12]}"
    if not directory.exists():
        partial = directory.with_name(f"{directory.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        with torch.device("meta"):
            models = Target(geometry.target), Drafter(geometry.drafter)
        tables = _tables(geometry)
        _write(partial / "target", target, models[0].checkpoint_tensors(), tables["target"])
        _write(partial / "drafter", drafter, models[1].checkpoint_tensors(), tables["drafter"])
        partial.rename(directory)
    return directory / "target", directory / "drafter"


def _tables(geometry: Geometry) -> dict[str, dict[str, Tensor]]:
    """The tensors that make both models repeat a token: embeddings, and the drafter's way from them to its head.

    The drafter's head is the first columns of the target's table, which its input projection passes on. With a centroid
    head, rows of a cluster share half of their variance there, so that the best clusters hold the token.
    """
    generator = torch.Generator().manual_seed(0)
    V, D = geometry.target.vocab_size, geometry.target.hidden_size
    config, H = geometry.drafter, geometry.drafter.text.hidden_size
    table = torch.randn(V, D, generator=generator)
    drafter: dict[str, Tensor] = {}
    if config.use_ordered_embeddings:
        centroids = torch.randn(config.num_centroids, H, generator=generator)
        ordering = torch.randperm(V, generator=generator)
        table[ordering, :H] = (table[ordering, :H] + centroids.repeat_interleave(V // len(centroids), 0)) * 0.5**0.5
        drafter["masked_embedding.centroids.weight"] = (centroids * 0.02).bfloat16()
        drafter["masked_embedding.token_ordering"] = ordering
    table = (table * 0.02).bfloat16()
    drafter["model.embed_tokens.weight"] = table[:, :H] * SURENESS
    drafter["pre_projection.weight"] = torch.eye(H, 2 * D).bfloat16()
    return {"target": {"model.embed_tokens.weight": table}, "drafter": drafter}


def _write(directory: Path, config: dict[str, Any], shapes: Mapping[str, Weight], given: Mapping[str, Tensor]) -> None:
    """Shards and their index. Peak memory: the largest tensor, or one shard and a tensor."""
    directory.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    for name, tensor in _filled(shapes, given):
        shard[name] = tensor
        if sum(t.nbytes for t in shard.values()) >= SHARD_BYTES:
            _write_shard(directory, shard, weight_map)
    _write_shard(directory, shard, weight_map)
    write_json(directory / INDEX_FILE, {"metadata": {}, "weight_map": weight_map})
    write_json(directory / "config.json", {**config, "dtype": "bfloat16"})


def _write_shard(directory: Path, shard: dict[str, Tensor], weight_map: dict[str, str]) -> None:
    if shard:
        file = f"model-{len(set(weight_map.values())):05d}.safetensors"
        save_tensors(directory / file, shard, {"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()


def _filled(shapes: Mapping[str, Weight], given: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    block = torch.randn(BLOCK_VALUES, generator=torch.Generator().manual_seed(1))
    for name, like in shapes.items():
        if name in given:
            yield name, given[name]
        elif any(norm in name for norm in BRANCH_NORMS):
            yield name, torch.zeros(like.shape, dtype=torch.bfloat16)
        elif len(like.shape) == 1:
            yield name, torch.ones(like.shape, dtype=torch.bfloat16)
        else:
            yield name, _tiled((block * like.shape[-1] ** -0.5).bfloat16(), like.shape)


def _tiled(block: Tensor, shape: torch.Size) -> Tensor:
    flat = torch.empty(shape.numel(), dtype=block.dtype)
    for start in range(0, flat.numel(), block.numel()):
        part = flat[start : start + block.numel()]
        part.copy_(block[: part.numel()])
    return flat.view(shape)
