"""What one NVIDIA card shows of the Triton kernels: first that bits are equal, then how fast they are.

    python benchmarks/gpu_check.py                 # under ten minutes; a table at the end
    python benchmarks/gpu_check.py --only 1 2      # some parts only
    python benchmarks/gpu_check.py --json out.json
    python benchmarks/gpu_check.py --interpret     # without a card, at tiny sizes: that the check itself runs

Weights are random and made on the card; nothing is downloaded. Each line is printed as soon as it is known. Each part
is a process of its own with a budget of seconds: where they are spent it stops, where it does not stop it is killed,
and an error in one leaves the others alone.

The exit code is 1 for any mismatch, whatever the speed; without one it is 2 where there is no card, or where a part
did not end by itself, so that something was not shown; else 0.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

if __name__ == "__main__" and "--interpret" in sys.argv:  # before kernels are defined
    os.environ["TRITON_INTERPRET"] = "1"
    sys.path.append(str(Path(__file__).parents[1] / "tests"))

import torch
from gpu_run import Line, Run, first_line
from gpu_scale import full, tiny
from gpu_watch import watch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from gemma_mtp.backend.cuda import attention
from gemma_mtp.backend.cuda.attention import Seen, Stacks, attend, rows_of_stack
from gemma_mtp.backend.cuda.batch import stacks_of
from gemma_mtp.backend.cuda.choice import choose
from gemma_mtp.backend.cuda.launch import on_device
from gemma_mtp.backend.cuda.linear import gate_up, linear
from gemma_mtp.backend.cuda.rows import added
from gemma_mtp.backend.cuda.usable import why_not_on
from gemma_mtp.backend.cuda.weights import DeviceWeight, device_weight, fp8_weight
from gemma_mtp.kv.blocks import BLOCK_ROWS
from gemma_mtp.weights.dense import Dense
from gemma_mtp.weights.formats import FORMATS

#: seconds of each part, and those after which it is killed: together under ten minutes
BUDGETS = {1: 30.0, 2: 120.0, 3: 60.0, 4: 120.0, 5: 180.0}
GRACE = 15.0
KINDS = ("bf16", "int8", "int4")
#: whose bits are compared at one size only
FEW_KINDS = ("q8_0", "fp8")
#: weights that are read in turn, so that none is in a cache
WORKING_SET_BYTES = 1 << 30
#: what makes a product of one call
Product = Callable[[Tensor, DeviceWeight], Tensor]


def differing(found: Tensor, expected: Tensor) -> int:
    """How many numbers have other bits."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[found.element_size()]
    return int((found.contiguous().view(kind) != expected.contiguous().view(kind)).sum())


def random_weight(kind: str, N: int, K: int, device: torch.device) -> DeviceWeight:
    """A weight whose products are of the size of its inputs."""
    values = torch.randn(N, K, device=device).bfloat16() / K**0.5
    if kind == "fp8":
        scales = torch.full((N, -(-K // 128)), K**-0.5 / 8, device=device)
        return fp8_weight((8 * K**0.5 * values).to(torch.float8_e4m3fn), scales)
    return device_weight(Dense(values) if kind == "bf16" else FORMATS[kind].of(Dense(values)))


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
    run.add(Line(part, what, compared, wrong))


def products_of(run: Run) -> dict[str, tuple[int, Product]]:
    """The products with weights by name: how many weight rows each result has, and a call."""
    return {
        "": (1, lambda x, w: added(run.launch, linear(run.launch, x, w))),
        "gate and up": (2, lambda x, w: gate_up(run.launch, x, w)),
        "head": (1, lambda x, w: choose(run.launch, x, w, 30.0, _ints(range(len(x)), run.device), None)[:, None]),
    }


def check_product(
    run: Run, kind: str, N: int, K: int, rows: Sequence[int], part: int = 2, name: str = "", product: str = ""
) -> None:
    """The bits of a product's rows in calls of so many rows."""
    wide, call = products_of(run)[product]
    weight, x = random_weight(kind, wide * N, K, run.device), torch.randn(max(rows), K, device=run.device).bfloat16()
    same_rows(run, part, f"{name} {product} {kind} {N} x {K}", lambda picked: call(x[picked], weight), rows)


def check_instructions(run: Run, N: int, K: int) -> None:
    """The decoding instruction against prefill's, 128 rows each: 16 at a time and all at once."""
    weight, x = random_weight("bf16", N, K, run.device), torch.randn(128, K, device=run.device).bfloat16()
    whole = added(run.launch, linear(run.launch, x, weight))
    few = torch.cat([added(run.launch, linear(run.launch, piece, weight)) for piece in x.split(16)])
    run.add(Line(1, f"rows 16 at a time and 128 at once, {N} x {K}", whole.numel(), differing(whole, few)))


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
    run.add(Line(1, f"the NumPy model of {core}", note=f"{wrong} of {found.numel()} differ"))


def check_attention(run: Run, H: int, G: int, d: int, window: int, context: int) -> None:
    """Rows at the end of a context, alone, in chunks, beside other sequences, and joined in one program."""
    sequences, chunks = run.scale.sequences, [rows for rows in run.scale.chunks if rows <= context]
    rows, blocks = max(chunks), -(-context // BLOCK_ROWS)
    keys, values = (torch.randn(G, 2 * blocks, BLOCK_ROWS, d, device=run.device).bfloat16() for _ in range(2))
    # every other sequence shares its blocks with the first or the second
    tables = torch.randperm(2 * blocks, device=run.device).int().view(2, blocks).repeat(sequences // 2, 1)
    queries = torch.randn(rows + sequences - 1, H, d, device=run.device).bfloat16() * d**-0.5

    def call(picked: Sequence[int]) -> Tensor:
        """Rows below `rows` are the first sequence's last ones; each one after is the last row of a sequence."""
        owners = [max(0, row - rows + 1) for row in picked]
        places = [context - 1 if row >= rows else context - rows + row for row in picked]
        counts = [owners.count(owner) for owner in dict.fromkeys(owners)]
        stacks = Stacks(*(_ints(one, run.device) for one in stacks_of(counts, rows_of_stack(H, G)[0])))
        seen = Seen(_ints(places, run.device), _ints(owners, run.device), tables, window, 0)
        return attend(run.launch, queries[list(picked)], keys, values, stacks, seen, context)

    what = f"attention {H}/{G} heads of {d}, window {window or 'none'}, {context} rows"
    everyone = list(range(rows + sequences - 1))
    whole = call(everyone)
    compared = wrong = 0
    for chunk in chunks:
        for begin in {0, rows - chunk}:
            found = call(range(begin, begin + chunk))
            compared += found.numel()
            wrong += differing(found, whole[begin : begin + chunk])
    alone = call([everyone[-1]])
    run.add(Line(3, what, compared + alone.numel(), wrong + differing(alone, whole[-1:])))
    several, attention.MOST_SCRATCH = attention.MOST_SCRATCH, 0
    try:
        joined = call(everyone)
    finally:
        attention.MOST_SCRATCH = several
    run.add(Line(3, f"{what}, joined", joined.numel(), differing(joined, whole)))


def _ints(numbers: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(list(numbers), dtype=torch.int32, device=device)


def measure_copy(run: Run) -> Line:
    """Bytes read and written by a copy, a second: what shares are of."""
    source = torch.empty(1 << (30 if run.on_card else 20), dtype=torch.uint8, device=run.device)
    target = torch.empty_like(source)
    ms = run.milliseconds(lambda i: target.copy_(source), 4)
    run.copy_bandwidth = 2 * source.nbytes / ms / 1e6
    return Line(1, "copy", milliseconds=ms, gb_per_second=run.copy_bandwidth)


def measure_product(run: Run, name: str, kind: str, N: int, K: int, product: str = "") -> None:
    """One row and nine, over weights in turn, beside cuBLAS for bf16."""
    wide, call = products_of(run)[product]
    one = random_weight(kind, wide * N, K, run.device)
    copies = max(2, min(64, WORKING_SET_BYTES // weight_bytes(one))) if run.on_card else 1
    weights = [one, *(DeviceWeight(one.kind, one.data.clone(), one.scales.clone() if kind != "bf16" else one.data,
                                   one.rows, K, one.group) for _ in range(copies - 1))]  # fmt: skip
    for rows in (1, 9):
        x = torch.randn(rows, K, device=run.device).bfloat16()
        ms = run.milliseconds(lambda i, x=x: call(x, weights[i % copies]), copies)  # type: ignore[misc]
        note = ""
        if kind == "bf16":
            theirs = run.milliseconds(lambda i, x=x: torch.mm(x, weights[i % copies].data.T), copies)  # type: ignore[misc]
            note = f"PyTorch's product {theirs:.4f} ms"
        what = f"{name} {product} {kind} {N} x {K}, rows {rows}"
        run.timed(2, what, ms, weight_bytes(one), note)


def part_1(run: Run) -> None:
    run.attempt(1, "copy", lambda: run.add(measure_copy(run)))
    run.attempt(1, "instructions", lambda: check_instructions(run, *run.scale.instructions))
    major = torch.cuda.get_device_capability(run.device)[0] if run.on_card else 9
    run.attempt(1, "the NumPy model", lambda: check_model(run, "Hopper" if major >= 9 else "Ada"))


def part_2(run: Run) -> None:
    scale = run.scale
    products = {"": scale.products, "gate and up": scale.gated, "head": scale.heads}
    for kind in (*KINDS, *FEW_KINDS):
        for product, by_name in products.items():
            for name, shapes in reversed(by_name.items()):
                for N, K in shapes if kind in KINDS else shapes[:1]:
                    if run.spent():
                        return
                    what = f"{name} {product} {kind} {N} x {K}"
                    check = functools.partial(check_product, run, kind, N, K, scale.rows, 2, name, product)
                    run.attempt(2, what, check)
                    if kind in KINDS:
                        run.attempt(2, what, functools.partial(measure_product, run, name, kind, N, K, product))
                if kind not in KINDS:
                    break


def part_3(run: Run) -> None:
    for H, G, d, window in run.scale.attention:
        edges = [window - 1, window, window + 1] if window else []
        for context in (*run.scale.contexts, *edges):
            if run.spent():
                return
            what = f"attention {H}/{G} heads of {d}, {context} rows"
            run.attempt(3, what, functools.partial(check_attention, run, H, G, d, window, context))


def part_4(run: Run) -> None:
    """A pair: its logits beside float32's, and generations plain, drafted and in batches."""
    from gpu_generations import check_generations

    check_generations(run)


def part_5(run: Run) -> None:
    """Target calls and whole rounds of the five sizes."""
    from gpu_calls import measure_models

    measure_models(run)


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


def play(run: Run, number: int, begun: float) -> None:
    """Run a part until its budget, from `begun` on, is spent. What goes wrong is a line of it."""
    torch.manual_seed(1)
    run.until = begun + BUDGETS[number]
    try:
        with torch.inference_mode():
            if number != 1:
                run.attempt(number, "copy", lambda: measure_copy(run))
            PARTS[number](run)
    except torch.OutOfMemoryError as error:
        run.add(Line(number, f"the rest did not fit: {first_line(error)}"))
    except Exception as error:
        traceback.print_exc()
        run.add(Line(number, f"the rest did not run: {type(error).__name__}: {first_line(error)}", failed=True))
    for reason in dict.fromkeys(run.unrecorded):
        run.add(Line(number, f"rounds were played launch by launch, not as recorded: {reason}", failed=True))
    if run.spent():
        run.add(Line(number, "the budget was spent: what is left of the part did not run"))


def _run(interpret: bool) -> Run | str:
    """Returns a run, or why there can be none."""
    if interpret:
        from tensor_core import Interpreter

        return Run(torch.device("cpu"), Interpreter(), tiny())
    if not torch.cuda.is_available():
        return "there is no NVIDIA card that PyTorch sees; run it where one is"
    reason = why_not_on(torch.device("cuda"))
    return f"the kernels can not run, because {reason}" if reason else Run(torch.device("cuda"), on_device, full())


def play_alone(number: int, begun: float, interpret: bool, say: Callable[[str], None]) -> int:
    """Run one part in this process, and say what it finds: JSON lines of where it runs, or of why it can not, and of
    the table. Returns the exit code."""
    run = _run(interpret)
    if isinstance(run, str):
        say(json.dumps({"refused": run}))
        return 0
    say(json.dumps({"where": where(run)}))
    run.report = lambda line: say(json.dumps(asdict(line)))
    play(run, number, begun)
    return 0


class Collected:
    """What the parts said so far."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.lines: list[Line] = []
        self.where = self.refused = ""

    def take(self, said: str) -> None:
        """Take a line of a part's output, and print what is new in it."""
        try:
            content = json.loads(said)
        except ValueError:  # of a library that prints past Python
            self.console.print(said.rstrip(), markup=False)
            return
        self.refused = content.get("refused", self.refused)
        if "where" in content and not self.where:
            self.where = content["where"]
            self.console.print(self.where)
        if "part" in content:
            self.add(Line(**content))

    def add(self, line: Line) -> None:
        self.lines.append(line)
        bits = f"{line.differing} of {line.compared} differ" if line.compared else ""
        shown = (f"part {line.part}: {line.what}", bits, *_with_units(line), line.note)
        self.console.print("; ".join(part for part in shown if part), soft_wrap=True, highlight=False)

    def exit_code(self) -> int:
        if any(line.differing for line in self.lines):
            return 1
        return 2 if self.refused or any(line.failed for line in self.lines) else 0


def _with_units(line: Line) -> list[str]:
    return [f"{value} {unit}" for value, unit in zip(_shown(line), ("ms", "GB/s", "of copy"), strict=True) if value]


def main(arguments: Sequence[str] | None = None, program: Sequence[str] = (sys.executable, __file__)) -> int:
    """`program`: what a part's process runs, before the options that say which part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="+", choices=PARTS, default=list(PARTS), help="these parts only")
    parser.add_argument("--json", type=Path, help="write the lines here, too")
    parser.add_argument("--interpret", action="store_true", help="in Triton's interpreter, at tiny sizes")
    # of a part's own process, and when it was started
    parser.add_argument("--alone", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--begun", type=float, default=time.monotonic(), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.alone is not None:
        say = functools.partial(print, file=sys.stdout, flush=True)
        with contextlib.redirect_stdout(sys.stderr):  # what else is printed is no part of what it says
            return play_alone(options.alone, options.begun, options.interpret, say)
    found, interpret = Collected(Console()), ["--interpret"] if options.interpret else []
    for number in options.only:
        command = [*program, "--alone", str(number), "--begun", str(time.monotonic()), *interpret]
        ended = watch(command, BUDGETS[number] + GRACE, found.take)
        if found.refused:
            print(f"gpu_check: {found.refused}.", file=sys.stderr)
            return found.exit_code()
        if ended is not None:
            found.add(Line(number, f"the rest did not run: {ended}", failed=True))
        if options.json:
            options.json.write_text(
                json.dumps([asdict(line) for line in found.lines], indent=1) + "\n", encoding="utf-8"
            )
    found.console.print(table(found.lines))
    wrong = sum(line.differing for line in found.lines)
    found.console.print(f"{wrong} of {sum(line.compared for line in found.lines)} numbers differ")
    return found.exit_code()


def where(run: Run) -> str:
    """Where it runs: the versions that bits may depend on."""
    import triton

    versions = f"PyTorch {torch.__version__}, Triton {triton.__version__}"
    if not run.on_card:
        return f"Triton's interpreter, {versions}"
    major, minor = torch.cuda.get_device_capability(run.device)
    version = Path("/proc/driver/nvidia/version")
    driver = version.read_text(encoding="utf-8").splitlines()[0] if version.is_file() else "driver unknown"
    return f"{torch.cuda.get_device_name()}, sm_{major}{minor}, CUDA {torch.version.cuda}, {versions}, {driver}"


if __name__ == "__main__":
    sys.exit(main())
