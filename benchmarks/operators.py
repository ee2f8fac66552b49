"""Linear operators: GB/s of weights for one row, and the cost of more rows as a ratio to one.

    export OMP_WAIT_POLICY=PASSIVE                      # else PyTorch's idle threads take the cores from ours
    python benchmarks/operators.py                      # 8192 x 2048, every type, beside PyTorch's own
    python benchmarks/operators.py --isa avx2 --rows 1 4 8

All operators and row counts are measured in turn in one run; a figure is the median of the repetitions. Between two
calls other weights are read, so that none is still in cache.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from machine import processor, read_bandwidth
from rich.console import Console
from rich.table import Table
from torch import Tensor

from gemma_mtp import _native
from gemma_mtp.backend.native import Memory, floats
from gemma_mtp.weights.base import Weight
from gemma_mtp.weights.dense import Dense
from gemma_mtp.weights.formats import FORMATS
from gemma_mtp.weights.panels import Panels

#: copies of each weight, used in turn: together larger than any cache
WORKING_SET_BYTES = 256 << 20


@dataclass
class Operator:
    name: str
    weight_bytes: int
    call: Callable[[int, Tensor], Tensor]  # (which copy, x) -> y
    copies: int
    kept: object  # what the call reads
    seconds: dict[int, list[float]] = field(default_factory=dict)

    def median(self, rows: int) -> float:
        return statistics.median(self.seconds[rows])


def copies_of(weight: Tensor) -> list[Tensor]:
    return [weight.clone() for _ in range(max(2, WORKING_SET_BYTES // (weight.numel() * weight.element_size())))]


def native_operator(isa: str, name: str, weight_NK: Weight) -> Operator:
    """Scales of quantised weights count as bytes read, as they are."""
    memory, rows = Memory(), weight_NK.shape[0]
    count = max(2, WORKING_SET_BYTES // weight_NK.nbytes)
    weights = [memory.matrix(copy.deepcopy(weight_NK)) for _ in range(count)]

    def call(i: int, x_MK: Tensor) -> Tensor:
        out = torch.empty(x_MK.shape[0], rows)
        _native.linear(isa, weights[i], floats(x_MK), x_MK.shape[0], floats(out))
        return out

    return Operator(f"native {isa} {name}", weight_NK.nbytes, call, count, memory)


def torch_operator(weight_NK: Tensor) -> Operator:
    copies, name, dtype = copies_of(weight_NK), str(weight_NK.dtype)[6:], weight_NK.dtype
    return Operator(
        f"F.linear {name}", weight_NK.nbytes, lambda i, x: F.linear(x.to(dtype), copies[i]), len(copies), copies
    )


@torch.inference_mode()
def measure(operators: list[Operator], rows: list[int], columns: int, repeats: int) -> None:
    inputs = {M: torch.randn(M, columns) for M in rows}
    turn = 0
    for repeat in range(repeats + 2):  # the first two warm up
        for M in rows:
            for operator in operators:
                turn += 1
                started = time.perf_counter()
                operator.call(turn % operator.copies, inputs[M])
                if repeat >= 2:
                    operator.seconds.setdefault(M, []).append(time.perf_counter() - started)


def show(operators: list[Operator], rows: list[int], bandwidth: float, args: argparse.Namespace) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("", "one row, us", "GB/s", "of bandwidth", *(f"{M} rows" for M in rows[1:])):
        table.add_column(column, justify="left" if column == "" else "right")
    for operator in operators:
        one = operator.median(rows[0])
        speed = operator.weight_bytes / one
        ratios = [f"{operator.median(M) / one:.2f}" for M in rows[1:]]
        table.add_row(operator.name, f"{one * 1e6:.0f}", f"{speed / 1e9:.1f}", f"{speed / bandwidth:.0%}", *ratios)
    console = Console(width=120)
    console.print(table)
    console.print(
        f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {args.shape[0]} x"
        f" {args.shape[1]}, median of {args.repeats}; memory reads at {bandwidth / 1e9:.1f} GB/s",
        highlight=False,
        soft_wrap=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, default=[8192, 2048], metavar=("OUT", "IN"))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 5, 8, 16])
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--isa", nargs="+", default=[_native.isa()], help=f"of {', '.join(_native.isas())}")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    _native.set_threads(args.threads)
    weight = torch.randn(*args.shape)
    operators: list[Operator] = []
    for dtype in (torch.float32, torch.bfloat16):
        dense = weight.to(dtype)
        name = str(dtype).removeprefix("torch.")
        operators += [native_operator(isa, name, Dense(dense)) for isa in args.isa] + [torch_operator(dense)]
        if Panels.fits(Dense(dense)):
            panels = Panels.of(Dense(dense))
            operators += [native_operator(isa, f"{name} in panels", panels) for isa in args.isa]
    for form in FORMATS.values():
        quantised = form.of(Dense(weight)) if form.quantised else None
        if quantised is not None and quantised.native() is not None:
            operators += [native_operator(isa, form.format, quantised) for isa in args.isa]
    measure(operators, args.rows, args.shape[1], args.repeats)
    show(operators, args.rows, read_bandwidth(), args)


if __name__ == "__main__":
    main()
