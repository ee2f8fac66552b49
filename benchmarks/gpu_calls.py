"""Part 5 of `gpu_check.py`: target calls and whole rounds of models of random weights, made on the device, beside the
bytes that they must read."""

from __future__ import annotations

import dataclasses
import functools
from array import array
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from gpu_run import Line, Run

from gemma_mtp.backend.cuda.backend import CudaBackend
from gemma_mtp.backend.cuda.batch import Batch, Part, make_batch
from gemma_mtp.backend.cuda.centroids import DeviceCentroids
from gemma_mtp.backend.cuda.layer import DeviceLayer
from gemma_mtp.backend.cuda.models import DeviceDrafter, DeviceTarget, ropes_of
from gemma_mtp.backend.cuda.weights import DeviceWeight
from gemma_mtp.config import DrafterConfig, TextConfig
from gemma_mtp.decoding.params import SamplingParams
from gemma_mtp.engine.sequence import Sequence, Turn, open_sequence
from gemma_mtp.engine.whole_rounds import play_whole
from gemma_mtp.kv.blocks import block_counts, blocks_of
from gemma_mtp.kv.pool import KVPool
from gemma_mtp.model.drafter import Drafter
from gemma_mtp.model.layers import quantise_matrices
from gemma_mtp.model.target import Target
from gemma_mtp.weight_types import UNIFORM

#: the weights that all sizes are timed with, one after another, so that each size has some where time is short
WEIGHTS = ("none", "int4", "int8")
#: rows of a sequence in a call of the target
CALL_ROWS = (1, 5, 9)
#: of the card's memory, what a target's weights may take
SHARE = 0.75
#: rounds that are played before those that count, which record and fill the pipeline, and those that count
WARM, TIMED = 4, 20


class Measured(NamedTuple):
    """A line: what, milliseconds, the bytes that had to be read, and a note."""

    what: str
    milliseconds: float
    nbytes: float
    note: str


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


def random_drafter(config: DrafterConfig, device: torch.device) -> Drafter:
    """A drafter of random bf16 weights."""
    with torch.device("meta"):
        drafter = Drafter(config).bfloat16().requires_grad_(False).eval()
    _make(drafter, device)
    if drafter.masked_embedding is not None:
        ordering = drafter.masked_embedding.token_ordering
        ordering.copy_(torch.randperm(len(ordering), device=device))
    return drafter


def _make(module: torch.nn.Module, device: torch.device) -> None:
    module.to_empty(device=device)
    for tensor in (*module.parameters(), *module.buffers()):
        _fill(tensor)


def _fill(tensor: torch.Tensor) -> None:
    if tensor.is_floating_point():
        tensor.fill_(1.0) if tensor.ndim == 1 else tensor.normal_(std=tensor.shape[-1] ** -0.5)


def bytes_read(target: DeviceTarget, rows: int, context: int) -> float:
    """Weights, head and keys and values of one call of `rows` rows at `context`; of experts those that the rows choose,
    were each row's choice independent."""
    total = float(size(target.head))
    for layer in target.layers:
        total += _layer_bytes(layer)
        if layer.experts is not None:
            experts = layer.experts
            count = len(experts.router)
            share = 1 - (1 - experts.top_k / count) ** rows
            total += share * (size(experts.gate_up) + size(experts.down)) + experts.router.nbytes
        groups = target.config.layer_kv_heads(layer.kv)
        total += 2 * 2 * groups * layer.heads.d * min(context, target.config.sliding_window)
    return total


def drafted_bytes(drafter: DeviceDrafter) -> float:
    """Weights and head of one step; of a centroid head the clusters that a row looks at."""
    total = float(sum(map(_layer_bytes, drafter.layers)))
    total += size(drafter.pre_projection) + size(drafter.post_projection)
    return total + (size(drafter.head) if drafter.centroids is None else _centroid_bytes(drafter.centroids))


def _centroid_bytes(head: DeviceCentroids) -> float:
    return size(head.centroids) + size(head.table) * head.count / head.centroids.rows


def _layer_bytes(layer: DeviceLayer) -> int:
    weights = [layer.qkv, layer.o, layer.gate_up, layer.down]
    if layer.ple is not None:
        weights += [layer.ple.gate, layer.ple.projection]
    return sum(map(size, weights))


def size(weight: DeviceWeight) -> int:
    """A weight's bytes."""
    return weight.data.nbytes + (0 if weight.scales is weight.data else weight.scales.nbytes)


def batch_of(config: TextConfig, rows: int, sequences: int, context: int, device: torch.device) -> tuple[Batch, KVPool]:
    """Rows at the end of `context` committed ones."""
    blocks = blocks_of(context + rows)
    counts = dict.fromkeys(("sliding_attention", "full_attention"), sequences * blocks)
    pool = KVPool(config, cast(Any, counts), sequences, torch.bfloat16, device)
    parts = []
    for i in range(sequences):
        cache = pool.cache(context + rows)
        cache.table.tables.update(
            {kind: array("i", range(i * blocks, (i + 1) * blocks)) for kind in cache.table.tables}
        )
        parts.append(Part(cache, [7 + i] * rows, context))
    return make_batch(config, parts, device), pool


def measure_models(run: Run) -> None:
    """Target calls, then plain and drafted rounds, of every size and kind of weights, until time is spent."""

    def measure(*what: Any) -> None:
        for found in _measure_model(run, *what):
            run.timed(5, *found)

    for weights in WEIGHTS:
        for name, (text, drafter) in run.scale.models.items():
            if run.spent():
                return
            what = f"{name} {weights}"
            run.attempt(5, what, functools.partial(measure, what, weights, text, drafter))
            run.free()


def _measure_model(
    run: Run, name: str, weights: str, whole: TextConfig, drafter_config: DrafterConfig
) -> Iterator[Measured]:
    text = shortened(whole, SHARE * run.memory())
    layers, of = text.num_hidden_layers, whole.num_hidden_layers
    note = "" if text is whole else f"{layers} of {of} layers: the whole does not fit"
    target, drafter = random_target(text, weights, run.device), random_drafter(drafter_config, run.device)
    backend = CudaBackend(target, drafter, run.launch, None, run.replays())
    yield from measure_calls(run, name, backend, note)
    recorded, beside = run.recorded, run.beside()
    yield from measure_rounds(run, name, backend, note)
    if run.recorded > recorded:
        count = run.recorded - recorded
        each = (run.beside() - beside) / count / 1e6
        run.add(Line(5, f"{name}, {count} recorded rounds", note=f"{each:.1f} MB each beside PyTorch's"))


def measure_calls(run: Run, name: str, backend: CudaBackend, note: str) -> Iterator[Measured]:
    """One call of the target and its choices, recorded and played again."""
    target, context = backend.on_device, run.scale.context
    config = target.config
    ropes = ropes_of(config, context + 16, run.device)
    for rows, sequences in (*((rows, 1) for rows in CALL_ROWS), (1, run.scale.sequences)):
        if run.spent():
            return
        batch, pool = batch_of(config, rows, sequences, context, run.device)
        picked = torch.arange(rows * sequences, dtype=torch.int32, device=run.device)

        def call(i: int, batch: Batch = batch, pool: KVPool = pool, picked: torch.Tensor = picked) -> None:
            target.choose(run.launch, target.forward(run.launch, batch, pool, ropes), picked, None)

        read = bytes_read(target, rows * sequences, context)
        yield Measured(f"{name}, call of {sequences} x {rows} rows", run.milliseconds(call, 3), read, note)


def measure_rounds(run: Run, name: str, backend: CudaBackend, note: str) -> Iterator[Measured]:
    """Whole rounds of so many drafts as an engine plays them, the host one behind: seconds of the wall clock."""
    assert backend.drafts is not None
    for count in (1, run.scale.sequences):
        lengths = (0, *run.scale.drafts)
        sequences = _sequences(backend, count, run.scale.context, lengths)
        for drafts in lengths:
            if run.spent():
                return
            ms, kernels, waits = _round_ms(run, backend, sequences, drafts)
            read = bytes_read(backend.on_device, count * (drafts + 1), run.scale.context)
            read += drafts * drafted_bytes(backend.drafts)
            found = f"{kernels} kernels, {waits:.1f} host waits a round" + (f"; {note}" if note else "")
            yield Measured(f"{name}, round of {count} x {drafts} drafts", ms, read, found)


def _sequences(backend: CudaBackend, count: int, context: int, lengths: tuple[int, ...]) -> list[Sequence]:
    """Sequences of `context` rows of garbage, finite as a pool begins: nothing here depends on values."""
    room = context + (WARM + TIMED + 4) * sum(drafts + 1 for drafts in lengths) + 64
    of_one = block_counts(backend.target.config.sliding_window, room, context)
    pool = backend.make_pool({kind: count * blocks for kind, blocks in of_one.items()}, count)
    found = []
    for i in range(count):
        cache = pool.cache(room)
        cache.open()
        prompt = [3 + (i + j) % 50 for j in range(context)]
        found.append(open_sequence(backend, cache, SamplingParams(), prompt, end=room))
        cache.table.reserve(context)
        cache.table.commit(context)
        found[-1].last_token, found[-1].length = 3 + i, context + 1
    return found


def _round_ms(run: Run, backend: CudaBackend, sequences: list[Sequence], drafts: int) -> tuple[float, int, float]:
    """Milliseconds of a round of all sequences, the kernels of one, and the host's waits in each."""
    turns = [Turn(one, drafts) for one in sequences]
    kernels = run.launched
    play_whole(backend, turns)
    kernels = (run.launched - kernels) // (2 if run.on_card else 1)  # it is recorded, too
    for _ in range(run.repeats(WARM)):
        play_whole(backend, turns)
    waits, begun, timed = run.waits, run.seconds(), run.repeats(TIMED)
    for _ in range(timed):
        play_whole(backend, turns)
    took = run.seconds() - begun
    waits = run.waits - waits
    play_whole(backend, [], sequences[0])  # what is ahead is thrown away
    return 1e3 * took / timed, kernels, waits / timed
