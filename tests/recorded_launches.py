"""Which kernels the backend launches, with which types and constants, found by running it on tensors without memory."""

from __future__ import annotations

import dataclasses
import functools
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from gemma_mtp.backend.base import DraftRows, Rows
from gemma_mtp.backend.cuda.backend import CudaBackend
from gemma_mtp.backend.cuda.dots import FP8
from gemma_mtp.backend.cuda.draws import draws_on
from gemma_mtp.backend.cuda.weights import WHOLE_ROW
from gemma_mtp.config import DrafterConfig, TargetConfig
from gemma_mtp.config.presets import PRESETS
from gemma_mtp.decoding.params import Filters
from gemma_mtp.kv.blocks import blocks_of
from gemma_mtp.kv.pool import KVCache, KVPool
from gemma_mtp.model.drafter import Drafter
from gemma_mtp.model.target import Target
from gemma_mtp.weight_types import UNIFORM, WeightTypes

META = torch.device("meta")
#: temperatures and filters of each kind of choice
CHOICES = ((0.0, Filters()), (1.0, Filters()), (1.0, Filters(64, 0.95, 0.1)))
TYPES = UNIFORM | {"all int4": WeightTypes("int4", "int4", "int4", "int4")}
SIZES = ("E2B", "E4B", "12B", "26B-A4B", "31B")
#: as Triton names them
POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float64: "*fp64", torch.int32: "*i32", torch.int64: "*i64",
    torch.int8: "*i8", torch.uint8: "*u8",
}  # fmt: skip


class Kernel(NamedTuple):
    """A kernel as it is compiled: of a module, with each argument's type, constants, and what is divisible by 16."""

    module: str
    name: str
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]
    warps: int
    stages: int


class Recorder:
    """A launch that runs nothing and remembers what was asked for."""

    def __init__(self) -> None:
        self.kernels: set[Kernel] = set()

    def __call__(
        self, kernel: Any, grid: tuple[int, ...], *args: Any, warps: int = 4, stages: int = 2, **constants: Any
    ) -> None:
        assert all(size > 0 for size in grid), f"{kernel.__name__} has an empty grid"
        types: list[tuple[str, str]] = []
        fixed, divisible = dict(constants), []
        for i, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
            plain = name in (kernel.kwargs.get("do_not_specialize") or ())
            types.append((name, _type(value, plain)))
            if types[-1][1] == "constexpr":
                fixed[name] = value
            elif isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0 and not plain):
                divisible.append(i)
        types += [(name, "constexpr") for name in constants]
        order = {name: i for i, name in enumerate(kernel.arg_names)}
        assert {name for name, _ in types} == set(order), kernel.__name__
        types.sort(key=lambda one: order[one[0]])
        self.kernels.add(
            Kernel(kernel.fn.__module__, kernel.fn.__name__, tuple(types), tuple(sorted(fixed.items())),
                   tuple(divisible), warps, stages)
        )  # fmt: skip


def _type(value: Any, plain: bool) -> str:
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if value == 1 and not plain:
        return "constexpr"  # so does Triton
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def shortened(config: TargetConfig) -> TargetConfig:
    """The same with one layer of each kind that differs: sliding and full, storing and reading another's."""
    text = config.text
    shared = min(text.num_kv_shared_layers, 2)
    kinds = ("sliding_attention", "full_attention")
    short = dataclasses.replace(
        text,
        num_hidden_layers=2 + shared,
        layer_types=cast(Any, kinds * (1 + shared // 2)),
        num_kv_shared_layers=shared,
    )
    return dataclasses.replace(config, text=short)


def pair_of(size: str, weights: str) -> tuple[Target, Drafter]:
    """A pair without memory, its target shortened."""
    target_config, drafter_config = PRESETS[f"gemma-4-{size}-it"], PRESETS[f"gemma-4-{size}-it-assistant"]
    assert isinstance(target_config, TargetConfig) and isinstance(drafter_config, DrafterConfig)
    with META:
        target = Target(shortened(target_config).text).bfloat16().requires_grad_(False)
        drafter = Drafter(drafter_config).bfloat16().requires_grad_(False)
    target.quantise_(TYPES[weights])
    drafter.quantise_(TYPES[weights])
    return target, drafter


def caches(backend: CudaBackend, lengths: Sequence[int]) -> list[KVCache]:
    """Sequences of committed rows, in a pool without memory."""
    counts = dict.fromkeys(("sliding_attention", "full_attention"), sum(blocks_of(n + 600) for n in lengths))
    pool = KVPool(backend.target.config, cast(Any, counts), len(lengths), torch.bfloat16, META)
    found = []
    for length in lengths:
        cache = pool.cache(length + 600)
        cache.open()
        cache.table.tables.update({kind: array("i", range(blocks_of(length + 600))) for kind in cache.table.tables})
        cache.table.length = length
        found.append(cache)
    return found


@functools.cache
def recorded(size: str, weights: str) -> set[Kernel]:
    """The kernels that decoding, drafting and prefill of one size launch."""
    record = Recorder()
    backend = CudaBackend(*pair_of(size, weights), record)
    for lengths, rows, keep in (([1000], 1, 1), ([3000], 5, 5), ([900] * 16, 3, 3), ([40], 512, 1)):
        hidden = backend.forward([Rows(cache, [1] * rows, keep) for cache in caches(backend, lengths)])
        backend.logits(hidden)
        R = len(hidden)
        for temperature, filters in CHOICES:
            tokens = torch.zeros(R, dtype=torch.int32, device=META)
            draws = draws_on(META, [temperature] * R, [0] * R, [filters] * R)
            backend.on_device.choose(record, hidden, tokens, draws)
    assert backend.drafts is not None
    for lengths in ([1000], [900] * 16):
        for temperature, filters in CHOICES:
            calls = [DraftRows(c, 1, 1, temperature, [0], None, filters) for c in caches(backend, lengths)]
            backend.drafts_on_device(calls)
        tokens, D = torch.zeros(len(lengths), dtype=torch.int64, device=META), backend.target.config.hidden_size
        states = torch.zeros(len(lengths), D, dtype=torch.bfloat16, device=META)
        backend.draft_step(caches(backend, lengths), tokens, states)
    return record.kernels


def in_fp8(kernel: Kernel) -> Kernel:
    """The same product with dense weights in e4m3, as the checkpoints of other tools have them."""
    types = {"w": "*u8", "scales": "*fp32"}
    constants = dict(kernel.constants) | {"KIND": FP8, "GROUP": WHOLE_ROW}
    return kernel._replace(
        types=tuple((name, types.get(name, kind)) for name, kind in kernel.types),
        constants=tuple(sorted(constants.items())),
    )
