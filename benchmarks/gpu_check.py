"""What one NVIDIA card shows of the Triton kernels: first that bits are equal, then how fast they are.

    python benchmarks/gpu_check.py                 # under ten minutes; a table at the end
    python benchmarks/gpu_check.py --parts 1 2     # some parts only
    python benchmarks/gpu_check.py --json out.json

Weights are random and made on the card; nothing is downloaded. Each part has a budget of seconds and stops where it is
spent, saying so. The exit code is 1 for any mismatch and 0 otherwise, whatever the speed; 2 where there is no card.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from gemma_mtp.backend.cuda import attention
from gemma_mtp.backend.cuda.attention import Seen, Stacks, attend, rows_of_stack
from gemma_mtp.backend.cuda.batch import stacks_of
from gemma_mtp.backend.cuda.launch import Launch, on_device
from gemma_mtp.backend.cuda.linear import linear
from gemma_mtp.backend.cuda.rows import added
from gemma_mtp.backend.cuda.weights import DeviceWeight, device_weight
from gemma_mtp.kv.blocks import BLOCK_ROWS
from gemma_mtp.weights.dense import Dense
from gemma_mtp.weights.formats import FORMATS

#: seconds of each part
BUDGETS = {1: 30.0, 2: 120.0, 3: 60.0, 4: 120.0, 5: 180.0}
KINDS = ("bf16", "int8", "int4")
#: N, K of the five sizes' products (attention's, both of the MLP's; the head has 262,144 rows)
SHAPES = {
    "E2B": [(2560, 1536), (1536, 2048), (1536, 6144)],
    "E4B": [(3072, 2560), (2560, 2048), (2560, 10240)],
    "12B": [(8192, 3840), (3840, 4096), (3840, 15360)],
    "26B-A4B": [(8192, 2816), (2816, 4096), (2816, 2112)],
    "31B": [(16384, 5376), (5376, 8192), (5376, 21504)],
}
ROWS = (1, 2, 3, 5, 9, 16, 17, 64, 144, 512)
#: weights that are read in turn, so that none is in a cache
WORKING_SET_BYTES = 1 << 30


@dataclass
class Line:
    """A line of the table. `differing` of `compared` numbers have other bits; `share` is of the copy bandwidth."""

    part: int
    what: str
    compared: int = 0
    differing: int = 0
    milliseconds: float | None = None
    gb_per_second: float | None = None
    share: float | None = None
    note: str = ""


@dataclass
class Run:
    """What a run knows: where, how kernels are launched, until when, and what was found."""

    device: torch.device
    launch: Launch
    copy_bandwidth: float = 0.0
    until: float = float("inf")
    lines: list[Line] = field(default_factory=list)

    def spent(self) -> bool:
        return time.monotonic() > self.until


def differing(found: Tensor, expected: Tensor) -> int:
    """How many numbers have other bits."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[found.element_size()]
    return int((found.contiguous().view(kind) != expected.contiguous().view(kind)).sum())


def random_weight(kind: str, N: int, K: int, device: torch.device) -> DeviceWeight:
    """A weight whose products are of the size of its inputs."""
    values = Dense(torch.randn(N, K, device=device).bfloat16() / K**0.5)
    return device_weight(values if kind == "bf16" else FORMATS[kind].of(values))


def weight_bytes(weight: DeviceWeight) -> int:
    return weight.data.nbytes + (0 if weight.scales is weight.data else weight.scales.nbytes)


def same_rows(run: Run, part: int, what: str, call: Callable[[list[int]], Tensor], rows: Sequence[int]) -> None:
    """Compare a row's numbers alone with those among `rows` others, first and last of them, and of all in one call."""
    alone = {row: call([row]) for row in {0, 1, max(rows) - 1}}
    compared = wrong = 0
    for count in rows:
        picked = list(range(count))
        found = call(picked)
        for row, one in alone.items():
            if row < count:
                compared += one.numel()
                wrong += differing(found[row : row + 1], one)
    run.lines.append(Line(part, what, compared, wrong))


def check_linear(run: Run, kind: str, N: int, K: int, rows: Sequence[int], part: int = 2, name: str = "") -> None:
    """The bits of a product's rows in calls of so many rows."""
    weight, x = random_weight(kind, N, K, run.device), torch.randn(max(rows), K, device=run.device).bfloat16()

    def call(picked: list[int]) -> Tensor:
        return added(run.launch, linear(run.launch, x[picked], weight))

    same_rows(run, part, f"{name} {kind} {N} x {K}", call, rows)


def check_instructions(run: Run, N: int, K: int) -> None:
    """The decoding instruction against prefill's, 128 rows each: 16 at a time and all at once."""
    weight, x = random_weight("bf16", N, K, run.device), torch.randn(128, K, device=run.device).bfloat16()
    whole = added(run.launch, linear(run.launch, x, weight))
    few = torch.cat([added(run.launch, linear(run.launch, piece, weight)) for piece in x.split(16)])
    run.lines.append(Line(1, f"rows 16 at a time and 128 at once, {N} x {K}", whole.numel(), differing(whole, few)))


def check_model(run: Run, core: str, columns: int = 64, K: int = 256) -> None:
    """The card's products against the NumPy model of tensor cores."""
    from tensor_core_model import CORES, product

    weight, x = random_weight("bf16", columns, K, run.device), torch.randn(16, K, device=run.device).bfloat16()
    found = added(run.launch, linear(run.launch, x, weight)).cpu()
    expected = torch.from_numpy(
        product(
            x.double().cpu().numpy(),
            weight.data.double().cpu().numpy().T,
            torch.zeros(16, columns).numpy(),
            CORES[core],
        )
    )
    wrong = differing(found, expected)
    # the promise is equality among the card's own instructions; another model of the card breaks none
    run.lines.append(Line(1, f"the NumPy model of {core}", note=f"{wrong} of {found.numel()} differ"))


def check_attention(run: Run, H: int, G: int, d: int, window: int, contexts: Sequence[int]) -> None:
    """Rows at the ends of contexts, alone, among their neighbours, with another sequence, and joined in one program."""
    for context in contexts:
        rows = min(9, context)
        blocks = -(-context // BLOCK_ROWS)
        keys, values = (torch.randn(G, 2 * blocks, BLOCK_ROWS, d, device=run.device).bfloat16() for _ in range(2))
        tables = torch.randperm(2 * blocks, device=run.device).int().view(2, blocks)
        queries = torch.randn(2 * rows, H, d, device=run.device).bfloat16() * d**-0.5

        def call(
            picked: list[int], rows: int = rows, context: int = context, keys: Tensor = keys, values: Tensor = values,
            tables: Tensor = tables, queries: Tensor = queries,
        ) -> Tensor:  # fmt: skip
            owners = [row // rows for row in picked]
            places = [context - rows + row % rows for row in picked]
            counts = [owners.count(owner) for owner in sorted(set(owners))]
            stacks = Stacks(*(_ints(one, run.device) for one in stacks_of(counts, rows_of_stack(H, G)[0])))
            seen = Seen(_ints(places, run.device), _ints(owners, run.device), tables, window, 0)
            return attend(run.launch, queries[picked], keys, values, stacks, seen, context)

        what = f"attention {H}/{G} heads of {d}, window {window or 'none'}, {context} rows"
        same_rows(run, 3, what, call, sorted({1, min(2, rows), rows, 2 * rows}))
        several, attention.MOST_SCRATCH = attention.MOST_SCRATCH, 0
        joined = call(list(range(2 * rows)))
        attention.MOST_SCRATCH = several
        run.lines.append(Line(3, f"{what}, joined", joined.numel(), differing(joined, call(list(range(2 * rows))))))


def _ints(numbers: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(list(numbers), dtype=torch.int32, device=device)


def milliseconds(call: Callable[[int], object], times: int) -> float:
    """Of one call in a replayed graph of `times` of them, which are given their numbers; the median of five."""
    for i in range(2):
        call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(times):
            call(i)
    found = []
    for _ in range(6):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / times)
    return sorted(found[1:])[2]


def measure_copy(run: Run) -> None:
    """Bytes read and written by a copy, a second."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=run.device)
    target = torch.empty_like(source)
    ms = milliseconds(lambda i: target.copy_(source), 4)
    run.copy_bandwidth = 2 * source.nbytes / ms / 1e6
    run.lines.append(Line(1, "copy", milliseconds=ms, gb_per_second=run.copy_bandwidth))


def measure_linear(run: Run, name: str, kind: str, N: int, K: int) -> None:
    """One row and nine, over weights in turn, beside cuBLAS for bf16."""
    one = random_weight(kind, N, K, run.device)
    copies = max(2, min(64, WORKING_SET_BYTES // weight_bytes(one)))
    weights = [one, *(DeviceWeight(one.kind, one.data.clone(), one.scales.clone() if kind != "bf16" else one.data, N, K,
                                   one.group) for _ in range(copies - 1))]  # fmt: skip
    for rows in (1, 9):
        x = torch.randn(rows, K, device=run.device).bfloat16()
        ms = milliseconds(lambda i, x=x: linear(run.launch, x, weights[i % copies]), copies)  # type: ignore[misc]
        speed = weight_bytes(one) / ms / 1e6
        note = ""
        if kind == "bf16":
            theirs = milliseconds(lambda i, x=x: torch.mm(x, weights[i % copies].data.T), copies)  # type: ignore[misc]
            note = f"cuBLAS {theirs:.4f} ms"
        what = f"{name} {kind} {N} x {K}, rows {rows}"
        run.lines.append(
            Line(2, what, milliseconds=ms, gb_per_second=speed, share=speed / run.copy_bandwidth, note=note)
        )


def part_1(run: Run) -> None:
    measure_copy(run)
    check_instructions(run, 8192, 5376)
    major, _ = torch.cuda.get_device_capability(run.device)
    check_model(run, "Hopper" if major >= 9 else "Ada")


def part_2(run: Run) -> None:
    for kind in KINDS:
        for name, shapes in reversed(SHAPES.items()):
            for N, K in shapes:
                if run.spent():
                    return
                check_linear(run, kind, N, K, ROWS, name=name)
                measure_linear(run, name, kind, N, K)


def part_3(run: Run) -> None:
    for H, G, d, window in ((32, 16, 256, 1024), (32, 4, 512, 0), (8, 1, 256, 512), (16, 1, 512, 0)):
        contexts = [1, 31, 32, 33, 255, 256, 257, window - 1, window, window + 1, 4096, 32768]
        for context in contexts:
            if run.spent():
                return
            if context > 0:
                check_attention(run, H, G, d, window, [context])


def part_4(run: Run) -> None:
    """The bundled pair: its logits beside float32's, and generations plain, drafted and in batches."""
    from gpu_generations import check_generations

    for what, compared, wrong, note in check_generations(run.launch, run.device, run.spent):
        run.lines.append(Line(4, what, compared, wrong, note=note))


def part_5(run: Run) -> None:
    """Target calls of the five sizes in replayed graphs."""
    from gpu_calls import measure_calls

    for what, ms, floor_bytes, note in measure_calls(run.launch, run.device, run.spent, milliseconds):
        speed = floor_bytes / ms / 1e6
        run.lines.append(
            Line(5, what, milliseconds=ms, gb_per_second=speed, share=speed / run.copy_bandwidth, note=note)
        )


PARTS = {1: part_1, 2: part_2, 3: part_3, 4: part_4, 5: part_5}


def table(lines: Sequence[Line]) -> Table:
    shown = Table("part", "what", "differ", "of", "ms", "GB/s", "of copy", "")
    for line in lines:
        shown.add_row(
            str(line.part), line.what, *((str(line.differing), str(line.compared)) if line.compared else ("", "")),
            *_shown(line), line.note,
        )  # fmt: skip
    return shown


def _shown(line: Line) -> Iterator[str]:
    for value, digits in ((line.milliseconds, 4), (line.gb_per_second, 0), (line.share, 2)):
        yield "" if value is None else f"{value:.{digits}f}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=int, nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--json", type=Path, help="write the lines here, too")
    options = parser.parse_args(arguments)
    console = Console()
    if not torch.cuda.is_available():
        print("gpu_check: there is no NVIDIA card that PyTorch sees; run it where one is.", file=sys.stderr)
        return 2
    run = Run(torch.device("cuda"), on_device)
    console.print(f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, PyTorch {torch.__version__}")
    torch.manual_seed(1)
    if 1 not in options.parts:
        measure_copy(run)
    with torch.inference_mode():
        for number in options.parts:
            run.until = time.monotonic() + BUDGETS[number]
            PARTS[number](run)
            if run.spent():
                run.lines.append(Line(number, "the budget was spent: what is left of the part did not run"))
    console.print(table(run.lines))
    if options.json:
        options.json.write_text(json.dumps([asdict(line) for line in run.lines], indent=1) + "\n", encoding="utf-8")
    wrong = sum(line.differing for line in run.lines)
    console.print(f"{wrong} of {sum(line.compared for line in run.lines)} numbers differ")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
