"""Part 5 of `gpu_check.py`: target calls of the five sizes in replayed graphs, beside the bytes that they must read."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch

from gemma_mtp.backend.cuda.batch import Batch, Part, make_batch
from gemma_mtp.backend.cuda.launch import Launch
from gemma_mtp.backend.cuda.models import DeviceTarget, ropes_of
from gemma_mtp.config import PRESETS, TextConfig
from gemma_mtp.kv.blocks import blocks_of
from gemma_mtp.kv.pool import KVPool
from gemma_mtp.model.layers import quantise_matrices
from gemma_mtp.model.target import Target
from gemma_mtp.weight_types import UNIFORM

CONTEXT = 1024
SIZES = ("E2B", "E4B", "12B", "26B-A4B", "31B")
#: rows of a sequence, and sequences
CALLS = ((1, 1), (5, 1), (9, 1), (1, 16))
#: of the card's memory, what weights may take
SHARE = 0.8
Measured = tuple[str, float, float, str]


def shortened(text: TextConfig, room: float) -> TextConfig:
    """The same with so many layers that bf16 weights fit `room` bytes; what is shared stays shared."""
    with torch.device("meta"):
        target = Target(text)
    first = sum(p.numel() for p in target.layers[0].parameters()) * 2
    beside = sum(p.numel() for p in target.parameters()) * 2 - first * len(target.layers)
    layers = min(len(target.layers), max(12, int((room - beside) / first) // 6 * 6))
    if layers == len(target.layers):
        return text
    return dataclasses.replace(
        text, num_hidden_layers=layers, layer_types=text.layer_types[:layers],
        num_kv_shared_layers=min(text.num_kv_shared_layers, layers // 2),
    )  # fmt: skip


def random_target(text: TextConfig, weights: str, device: torch.device) -> Target:
    """A target of random weights, made on the device layer by layer: nothing is larger there than the whole in the end
    but for one layer."""
    types = UNIFORM[weights]
    with torch.device("meta"):
        target = Target(text).bfloat16().requires_grad_(False).eval()
    for layer in target.layers:
        _make(layer, device)
        quantise_matrices(layer.modules(), types.target)
    for name, child in target.named_children():
        if name != "layers":
            _make(child, device)
    target.quantise_(types)  # what is not yet
    return target


def _make(module: torch.nn.Module, device: torch.device) -> None:
    module.to_empty(device=device)
    for tensor in (*module.parameters(), *module.buffers()):
        _fill(tensor)


def _fill(tensor: torch.Tensor) -> None:
    if tensor.is_floating_point():
        tensor.fill_(1.0) if tensor.ndim == 1 else tensor.normal_(std=tensor.shape[-1] ** -0.5)


def bytes_read(target: DeviceTarget, rows: int) -> float:
    """Weights, head and keys and values of one call of `rows` rows at `CONTEXT`; of experts those that the rows choose,
    were each row's choice independent."""
    total = float(_size(target.head))
    for layer in target.layers:
        total += sum(_size(one) for one in (layer.qkv, layer.o, layer.gate_up, layer.down))
        if layer.ple is not None:
            total += _size(layer.ple.gate) + _size(layer.ple.projection)
        if layer.experts is not None:
            experts = layer.experts
            count = len(experts.router)
            share = 1 - (1 - experts.top_k / count) ** rows
            total += share * (_size(experts.gate_up) + _size(experts.down)) + experts.router.nbytes
        groups = target.config.layer_kv_heads(layer.kv)
        total += 2 * 2 * groups * layer.heads.d * min(CONTEXT, target.config.sliding_window)
    return total


def _size(weight: Any) -> int:
    return weight.data.nbytes + (0 if weight.scales is weight.data else weight.scales.nbytes)


def batch_of(config: TextConfig, rows: int, sequences: int, device: torch.device) -> tuple[Batch, KVPool]:
    """Rows at the end of `CONTEXT` committed ones."""
    blocks = blocks_of(CONTEXT + rows)
    counts = dict.fromkeys(("sliding_attention", "full_attention"), sequences * blocks)
    pool = KVPool(config, cast(Any, counts), sequences, torch.bfloat16, device)
    parts = []
    for i in range(sequences):
        cache = pool.cache(CONTEXT + rows)
        cache.table.tables.update(
            {kind: array("i", range(i * blocks, (i + 1) * blocks)) for kind in cache.table.tables}
        )
        parts.append(Part(cache, [7 + i] * rows, CONTEXT))
    return make_batch(config, parts, device), pool


def measure_calls(
    launch: Launch, device: torch.device, spent: Callable[[], bool],
    milliseconds: Callable[[Callable[[int], object], int], float],
) -> Iterator[Measured]:  # fmt: skip
    """Target calls and choices of one row and more, of every size and kind of weights."""
    _, memory = torch.cuda.mem_get_info(device)
    for size in SIZES:
        for weights in ("none", "int8", "int4"):
            if spent():
                return
            whole = PRESETS[f"gemma-4-{size}-it"].text
            text = shortened(whole, SHARE * memory)
            yield from _measure_size(launch, device, milliseconds, f"{size} {weights}", text, weights, whole)
            torch.cuda.empty_cache()


def _measure_size(
    launch: Launch, device: torch.device, milliseconds: Callable[[Callable[[int], object], int], float], name: str,
    text: TextConfig, weights: str, whole: TextConfig,
) -> Iterator[Measured]:  # fmt: skip
    target = DeviceTarget(random_target(text, weights, device))
    layers, all_layers = len(text.layer_types), len(whole.layer_types)
    note = "" if text is whole else f"{layers} of {all_layers} layers: the whole does not fit"
    ropes = ropes_of(text, CONTEXT + 16, device)
    for rows, sequences in CALLS:
        batch, pool = batch_of(text, rows, sequences, device)
        picked = torch.arange(rows * sequences, dtype=torch.int32, device=device)

        def call(i: int, batch: Batch = batch, pool: KVPool = pool, picked: torch.Tensor = picked) -> None:
            target.choose(launch, target.forward(launch, batch, pool, ropes), picked, None)

        read = bytes_read(target, rows * sequences)
        yield f"{name}, {sequences} x {rows} rows at {CONTEXT}", milliseconds(call, 3), read, note
