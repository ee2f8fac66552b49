"""`gemma-mtp plan`."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_mtp.cli.option_groups import argument, group, option

if TYPE_CHECKING:
    from rich.console import Console

    from gemma_mtp.measure.plan import Gain, Load, Takes
    from gemma_mtp.measure.plan_models import Planned
    from gemma_mtp.sizes.run import Loaded
    from gemma_mtp.weight_types import WeightTypes

MODELS, LOAD, MACHINE, OUTPUT = "Models", "Load", "Machine", "Output"
KV_TYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
#: weights that are shown beside each other
COMPARED = ("none", "int8", "int4")


@group(MODELS)
class PlannedPair:
    """What is to be loaded, and how."""

    model: str = argument(
        "gemma-4-E2B-it",
        "A known name such as gemma-4-31B-it, a directory, a config.json, bundled, or a name on the Hugging Face hub.",
    )
    drafter: str | None = option(None, "The drafter, likewise; default: the model's own, found by its name.")
    no_drafter: bool = option(False, "Plan without a drafter.")
    quantize: str | None = option(
        None, "int8, int4, or parts, such as target=int4,drafter=int8; default: as stored, and int8 and int4 beside it."
    )
    dtype: str = option("auto", "auto, bfloat16, float16 or float32: of weights that are not quantised.")
    kv_type: str = option("auto", "auto, float32, bfloat16 or float16: of keys and values; auto is what would run.")


@group(LOAD)
class LoadOptions:
    """How it is to be used."""

    sequences: int = option(1, "Sequences that decode together.", "-n")
    context: int | None = option(None, "Tokens of each, prompt and output; default: 8192, or the model's most.", "-c")
    draft_tokens: int = option(4, "Drafts a round (K).", "-k")
    acceptance: float = option(0.8, "Chance that a draft is accepted where those before it were; measure it with"
                               " `gemma-mtp acceptance`.", "-a")  # fmt: skip


@group(MACHINE)
class MachineOptions:
    """What it is to run on."""

    device: str = option("cpu", "cpu or cuda: what is counted, and whose memory is looked up.")
    memory: str | None = option(None, "Such as 24GB or 24GiB; default: this machine's, or its GPU's.")
    bandwidth: str | None = option(None, "Bytes of memory read a second, such as 300GB; default: measured, on a CPU.")


@group(OUTPUT)
class OutputOptions:
    """How it is shown."""

    plot: Path | None = option(None, "Draw memory against context to this file, .png, .svg or .pdf.")
    as_json: bool = option(False, "Print one JSON object.", "--json")


@dataclass(frozen=True)
class Row:
    """One choice of weight types: what it takes, and what fits."""

    weights: str
    loaded: Loaded
    takes: Takes
    fits: bool | None
    largest_context: int | None
    most_sequences: int | None

    def to_dict(self) -> dict[str, Any]:
        parts = {part: kind or "as stored" for part, kind in self.loaded.types.parts.items()}
        return {
            "weights": self.weights, "parts": parts, "takes": self.takes.to_dict(), "fits": self.fits,
            "largest_context": self.largest_context, "most_sequences": self.most_sequences,
        }  # fmt: skip


def plan(models: PlannedPair, used: LoadOptions, machine: MachineOptions, output: OutputOptions) -> None:
    """Say what a pair takes, what fits into a memory, and what drafting would gain. Downloads nothing.

    Counts what a run of `serve` or `generate` of this version takes, once every sequence has all its tokens. The gain
    is what reading memory allows: products are taken to keep up, so it is the most that drafting can give.
    """
    from gemma_mtp.measure.plan import Load, gains
    from gemma_mtp.measure.plan_models import planned

    if output.plot is not None:
        from gemma_mtp.measure.plot import check_plot

        check_plot(output.plot)
    pair = planned(models.model, models.drafter, models.no_drafter)
    context = _check(used, machine, pair)
    load = Load(used.sequences, context, used.draft_tokens)
    memory, memory_from = _memory(machine)
    rows = [
        _row(label, loaded, load, memory, machine.device == "cuda") for label, loaded in _choices(models, machine, pair)
    ]
    chosen = rows[0]
    bandwidth, bandwidth_from = _bandwidth(machine)
    gained = [] if bandwidth is None else gains(chosen.loaded, load, used.acceptance, bandwidth)
    if output.plot is not None:
        from gemma_mtp.measure.plan_plot import plot_plan

        plot_plan(
            pair.name, {row.weights: row.loaded for row in rows}, load, memory, output.plot, machine.device == "cuda"
        )
    if output.as_json:
        content = {
            "model": pair.name, "drafter": pair.drafter_name, "device": machine.device, **asdict(load),
            "acceptance": used.acceptance, "operators": chosen.loaded.operators,
            "kv_element_bytes": chosen.loaded.kv_bytes, "memory": memory, "memory_from": memory_from,
            "bandwidth": bandwidth, "bandwidth_from": bandwidth_from,
            "choices": [row.to_dict() for row in rows], "gains": [asdict(gain) for gain in gained],
        }  # fmt: skip
        print(json.dumps(content))
        return
    from gemma_mtp.cli.console import console

    out = console()
    _print_pair(out, pair, chosen, load)
    _print_rows(out, rows, load, memory, memory_from)
    _print_gains(out, gained, used.acceptance, bandwidth_from, pair)


def _check(used: LoadOptions, machine: MachineOptions, pair: Planned) -> int:
    """Returns the context. Raises SamplingError for what can not be planned."""
    from gemma_mtp.decoding.round_costs import LONGEST
    from gemma_mtp.errors import SamplingError
    from gemma_mtp.measure.plan import MOST_SEQUENCES

    most = pair.target.text.max_position_embeddings
    context = min(8192, most) if used.context is None else used.context
    for name, value, low, high in (
        ("--sequences", used.sequences, 1, MOST_SEQUENCES), ("--context", context, 1, most),
        ("--draft-tokens", used.draft_tokens, 0, LONGEST), ("--acceptance", used.acceptance, 0, 1),
    ):  # fmt: skip
        if not low <= value <= high:
            raise SamplingError(f"{name} is {value}, but must be from {low} to {high}.")
    if machine.device not in ("cpu", "cuda"):
        raise SamplingError(f"--device is {machine.device!r}, but must be cpu or cuda.")
    return context


def _choices(models: PlannedPair, machine: MachineOptions, pair: Planned) -> list[tuple[str, Loaded]]:
    """Returns what was asked for, and the other kinds beside it, each as it would be loaded."""
    from gemma_mtp.errors import QuantisationError
    from gemma_mtp.weight_types import UNIFORM, WeightTypes, merge, parse_weight_types

    asked = WeightTypes() if models.quantize is None else parse_weight_types(models.quantize)
    label = models.quantize or "as stored"
    choices: list[tuple[str, WeightTypes]] = [(label, merge(pair.types, asked))]
    for kind in COMPARED:
        try:
            types = merge(pair.types, UNIFORM[kind])
        except QuantisationError:
            continue  # what is stored quantised can not become something else
        if all(types != known for _, known in choices):
            choices.append(("unquantised" if kind == "none" else kind, types))
    return [(name, _loaded(models, machine, pair, types)) for name, types in choices]


def _loaded(models: PlannedPair, machine: MachineOptions, pair: Planned, types: WeightTypes) -> Loaded:
    from gemma_mtp.sizes.run import Loaded

    native = machine.device == "cpu" and _native_there() and models.dtype != "float16"
    narrow = machine.device == "cuda" or (native and pair.narrow)
    dtype = ("bfloat16" if narrow else "float32") if models.dtype == "auto" else models.dtype
    dense = _kind("--dtype", dtype)
    kv = (4 if native else dense) if models.kv_type == "auto" else _kind("--kv-type", models.kv_type)
    return Loaded(pair.target, pair.drafter, types, dense, kv, "native" if native else "reference", os.cpu_count() or 1)


def _kind(option_name: str, dtype: str) -> int:
    from gemma_mtp.errors import SamplingError

    if dtype not in KV_TYPES:
        raise SamplingError(f"{option_name} is {dtype!r}, but must be auto, {', '.join(KV_TYPES)}.")
    return KV_TYPES[dtype]


def _native_there() -> bool:
    """Whether the native operators are built, found without loading PyTorch."""
    from importlib.util import find_spec

    return os.environ.get("GEMMA_MTP_NATIVE") != "0" and find_spec("gemma_mtp._native") is not None


def _row(label: str, loaded: Loaded, load: Load, memory: int | None, gpu: bool) -> Row:
    from gemma_mtp.measure.plan import largest_context, most_sequences, takes

    taken = takes(loaded, load, gpu)
    if memory is None:
        return Row(label, loaded, taken, None, None, None)
    return Row(
        label, loaded, taken, taken.total <= memory, largest_context(loaded, load, memory, gpu),
        most_sequences(loaded, load, memory, gpu),
    )  # fmt: skip


def _memory(machine: MachineOptions) -> tuple[int | None, str]:
    from gemma_mtp.sizes.machine import parse_bytes, total_memory

    if machine.memory is not None:
        return parse_bytes(machine.memory, "--memory"), "given"
    if machine.device == "cuda":
        return _gpu_memory(), "detected"
    return total_memory(), "detected"


def _gpu_memory() -> int | None:
    """The first GPU's memory, asked of its driver's tool; None where there is none."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        return int(answer.splitlines()[0]) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def _bandwidth(machine: MachineOptions) -> tuple[float | None, str]:
    from gemma_mtp.sizes.machine import parse_bytes, read_bandwidth

    if machine.bandwidth is not None:
        return float(parse_bytes(machine.bandwidth.removesuffix("/s"), "--bandwidth")), "given"
    return (None, "not known") if machine.device == "cuda" else (read_bandwidth(), "measured now")


def _print_pair(out: Console, pair: Planned, row: Row, load: Load) -> None:
    from gemma_mtp.sizes.machine import shown_bytes

    taken = row.takes
    drafter = "without a drafter" if pair.drafter_name is None else f"with {pair.drafter_name}"
    out.print(f"{pair.name} {drafter}, {row.weights}, {row.loaded.operators} operators", soft_wrap=True)
    out.print(
        f"{load.sequences} sequence{'s' * (load.sequences > 1)} of {load.context} tokens,"
        f" {load.draft_tokens} drafts a round, keys and values of {row.loaded.kv_bytes} bytes\n",
        soft_wrap=True,
    )
    for name, size in (
        ("weights", taken.weights), ("drafter", taken.drafter), ("KV, full layers", taken.kv_full),
        ("KV, sliding layers", taken.kv_sliding), ("activations", taken.activations), ("workspace", taken.workspace),
        ("process", taken.process), ("total", taken.total),
    ):  # fmt: skip
        share = f"{size / taken.total:5.1%}" if name != "total" else ""
        out.print(f"{name:<20}{shown_bytes(size):>10} {share}".rstrip(), soft_wrap=True)
    out.print()


def _print_rows(out: Console, rows: Sequence[Row], load: Load, memory: int | None, memory_from: str) -> None:
    from rich.table import Table

    from gemma_mtp.sizes.machine import shown_bytes

    known = "not known; give --memory" if memory is None else f"{shown_bytes(memory)} ({memory_from})"
    out.print(f"what fits into memory: {known}", style="bold", soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    for i, column in enumerate(
        ("weights", "total", "fits", f"context for {load.sequences}", f"sequences of {load.context}")
    ):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        fits = "" if row.fits is None else "yes" if row.fits else "no"
        context = "" if row.largest_context is None else str(row.largest_context or "none")
        table.add_row(row.weights, shown_bytes(row.takes.total), fits, context, _sequences(row.most_sequences))
    out.print(table)
    out.print()


def _sequences(count: int | None) -> str:
    """How many fit; so many that nobody runs them are not counted."""
    from gemma_mtp.measure.plan import MOST_SEQUENCES

    if count is None:
        return ""
    return f"{count} or more" if count == MOST_SEQUENCES else str(count or "none")


def _print_gains(out: Console, gained: Sequence[Gain], acceptance: float, source: str, pair: Planned) -> None:
    from rich.table import Table

    from gemma_mtp.measure.plan import best_gain

    if not gained:
        out.print("what drafting would gain: give --bandwidth", soft_wrap=True)
        return
    if pair.drafter is None:
        out.print(
            f"plain decoding: at most {gained[0].tokens_per_second:.3g} tokens/s by memory bandwidth", soft_wrap=True
        )
        return
    out.print(
        f"what drafting gains at most, at {acceptance:.0%} acceptance, bandwidth {source}", style="bold", soft_wrap=True
    )
    table = Table(box=None, pad_edge=False)
    for i, column in enumerate(("drafts a round", "tokens a round", "ms a round", "tokens/s", "speed-up")):
        table.add_column(column, justify="right" if i else "left")
    for gain in gained:
        table.add_row(
            str(gain.draft_tokens), f"{gain.tokens_per_round:.2f}", f"{1e3 * gain.round_seconds:.3g}",
            f"{gain.tokens_per_second:.3g}", f"{gain.speedup:.2f}x",
        )  # fmt: skip
    out.print(table)
    best = best_gain(list(gained), acceptance)
    out.print(f"most with {best.draft_tokens} drafts a round: {best.speedup:.2f}x", soft_wrap=True)
