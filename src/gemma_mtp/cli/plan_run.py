"""What `gemma-mtp plan` does: count, and print."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

from rich.console import Console
from rich.table import Table

from gemma_mtp.backend.cuda.asked import asked
from gemma_mtp.cli.console import console, print_table
from gemma_mtp.cli.plan import LoadOptions, MachineOptions, OutputOptions, PlannedPair
from gemma_mtp.decoding.round_costs import LONGEST
from gemma_mtp.errors import QuantisationError, SamplingError
from gemma_mtp.measure.plan import (
    MOST_SEQUENCES,
    Gain,
    Load,
    Takes,
    best_gain,
    gains,
    largest_context,
    most_sequences,
    takes,
)
from gemma_mtp.measure.plan_models import Planned, held_of, planned
from gemma_mtp.measure.plan_plot import plot_plan
from gemma_mtp.sizes.machine import cores, read_bandwidth, total_memory
from gemma_mtp.sizes.run import Loaded, Operators, kv_element_bytes
from gemma_mtp.units import counted, parse_bytes, shown_bytes, three_digits
from gemma_mtp.weight_types import UNIFORM, WeightTypes, merge, parse_weight_types

KV_TYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
#: weights that are shown beside each other
COMPARED = ("none", "int8", "int4")


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
    """Count what every choice of weights takes, and print it."""
    pair = planned(models.model, models.drafter, models.no_drafter, others=True)
    context = _check(used, machine, pair)
    load = Load(used.sequences, context, used.draft_tokens)
    memory, memory_from = memory_of(machine.memory, machine.device)
    rows = [
        _row(label, loaded, load, memory, machine.device == "cuda") for label, loaded in _choices(models, machine, pair)
    ]
    chosen = rows[0]
    bandwidth, bandwidth_from = _bandwidth(machine)
    gained = [] if bandwidth is None else gains(chosen.loaded, load, used.acceptance, bandwidth)
    if output.plot is not None:
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
    out = console()
    _print_pair(out, pair, chosen, load)
    _print_rows(out, rows, load, memory, memory_from)
    _print_gains(out, gained, used.acceptance, bandwidth_from, pair)


def _check(used: LoadOptions, machine: MachineOptions, pair: Planned) -> int:
    """Returns the context. Raises SamplingError for what can not be planned."""
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
    native = machine.device == "cpu" and _native_there() and models.dtype != "float16"
    narrow = machine.device == "cuda" or (native and pair.narrow)
    dtype = ("bfloat16" if narrow else "float32") if models.dtype == "auto" else models.dtype
    dense = _kind("--dtype", dtype)
    kernels = machine.device == "cuda" and dtype == "bfloat16" and models.kv_type in ("auto", dtype) and asked()
    operators: Operators = "native" if native else "cuda" if kernels else "reference"
    kv = kv_element_bytes(operators, dense) if models.kv_type == "auto" else _kind("--kv-type", models.kv_type)
    held = held_of(pair, types, dtype, kernels)
    return Loaded(pair.target, pair.drafter, types, dense, kv, operators, cores(), held=held)


def _kind(option_name: str, dtype: str) -> int:
    if dtype not in KV_TYPES:
        raise SamplingError(f"{option_name} is {dtype!r}, but must be auto, {', '.join(KV_TYPES)}.")
    return KV_TYPES[dtype]


def _native_there() -> bool:
    """Whether the native operators are built, found without loading PyTorch."""
    return os.environ.get("GEMMA_MTP_NATIVE") != "0" and find_spec("gemma_mtp._native") is not None


def _row(label: str, loaded: Loaded, load: Load, memory: int | None, gpu: bool) -> Row:
    taken = takes(loaded, load, gpu)
    if memory is None:
        return Row(label, loaded, taken, None, None, None)
    return Row(
        label, loaded, taken, taken.total <= memory, largest_context(loaded, load, memory, gpu),
        most_sequences(loaded, load, memory, gpu),
    )  # fmt: skip


def memory_of(given: str | None, device: str) -> tuple[int | None, str]:
    """Returns the bytes that were given, or that the device has if that is known, and which of the two."""
    if given is not None:
        return parse_bytes(given, "--memory"), "given"
    return _gpu_memory() if device == "cuda" else total_memory(), "detected"


def _gpu_memory() -> int | None:
    """The first GPU's memory, asked of its driver's tool; None where there is none."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        return int(answer.splitlines()[0]) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def _bandwidth(machine: MachineOptions) -> tuple[float | None, str]:
    if machine.bandwidth is not None:
        return float(parse_bytes(machine.bandwidth.removesuffix("/s"), "--bandwidth")), "given"
    return (None, "not known") if machine.device == "cuda" else (read_bandwidth(), "measured now")


def _print_pair(out: Console, pair: Planned, row: Row, load: Load) -> None:
    taken = row.takes
    drafter = "without a drafter" if pair.drafter_name is None else f"with {pair.drafter_name}"
    out.print(f"{pair.name} {drafter}, {row.weights}, {row.loaded.operators} operators", soft_wrap=True)
    drafts = "" if pair.drafter is None else f" {load.draft_tokens} drafts a round,"
    out.print(
        f"{counted(load.sequences, 'sequence')} of {load.context} tokens,{drafts} keys and values of"
        f" {row.loaded.kv_bytes} bytes\n",
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
    print_table(out, table)
    out.print()


def _sequences(count: int | None) -> str:
    """How many fit; so many that nobody runs them are not counted."""
    if count is None:
        return ""
    return f"{count} or more" if count == MOST_SEQUENCES else str(count or "none")


def _print_gains(out: Console, gained: Sequence[Gain], acceptance: float, source: str, pair: Planned) -> None:
    if not gained:
        out.print("what drafting would gain: give --bandwidth", soft_wrap=True)
        return
    if pair.drafter is None:
        out.print(
            f"plain decoding: at most {three_digits(gained[0].tokens_per_second)} tokens/s by memory bandwidth",
            soft_wrap=True,
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
            str(gain.draft_tokens), f"{gain.tokens_per_round:.2f}", three_digits(1e3 * gain.round_seconds),
            three_digits(gain.tokens_per_second), f"{gain.speedup:.2f}x",
        )  # fmt: skip
    print_table(out, table)
    best = best_gain(list(gained), acceptance)
    out.print(f"most with {best.draft_tokens} drafts a round: {best.speedup:.2f}x", soft_wrap=True)
