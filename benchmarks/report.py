"""A run's figures as plain values, and as a table.

python benchmarks/report.py RUN.json ...        # what `decode.py --json` wrote, as Markdown
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from machine import describe
from rich.console import Console
from rich.table import Table
from sides import Side


def report(sides: Sequence[Side], bandwidth: float, run: dict[str, Any]) -> dict[str, Any]:
    """Machine, versions, settings of the run, and each side's speed, ratios, share of its floor."""
    plain = sides[0]
    ways = [(name, way) for name in ("transformers", "llama.cpp") for way in ("plain", "drafted")]
    peers = {f"{name}_{way}": _first(sides, name, way) for name, way in ways}
    rows = []
    for side in sides:
        floor = side.floor(bandwidth)
        rows.append(
            {
                "side": side.name,
                "tokens_per_second": side.speed,
                "spread": [min(side.speeds), max(side.speeds)],
                "ratio_to_plain": side.ratio_to(plain),
                "decode_ratio_to_plain": side.decode_ratio_to(plain),
                **{f"ratio_to_{name}": side.ratio_to(peer) if peer else None for name, peer in peers.items()},
                "mean_acceptance_length": side.acceptance_length,
                "mean_drafts": side.drafts,
                "floor_tokens_per_second": floor,
                "share_of_floor": side.speed / floor if floor else None,
                "identical_to_plain": side.outputs == plain.outputs,
            }
        )
    return {**describe(), **run, "read_gigabytes_per_second": bandwidth / 1e9, "sides": rows}


def _first(sides: Sequence[Side], name: str, way: str) -> Side | None:
    return next((side for side in sides if side.name.startswith(name) and f", {way}" in side.name), None)


#: of a row of a report
COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "tokens/s": lambda row: f"{row['tokens_per_second']:.1f}",
    "spread": lambda row: f"{row['spread'][0]:.0f}-{row['spread'][1]:.0f}",
    "to plain": lambda row: _ratio(row["ratio_to_plain"]),
    "decode": lambda row: _ratio(row["decode_ratio_to_plain"]),
    "to transformers": lambda row: _ratio(row["ratio_to_transformers_plain"]),
    "to llama.cpp": lambda row: _ratio(row["ratio_to_llama.cpp_plain"]),
    "to its drafting": lambda row: _ratio(row["ratio_to_llama.cpp_drafted"]),
    "drafts": lambda row: _number(row["mean_drafts"]),
    "tokens a round": lambda row: _number(row["mean_acceptance_length"]),
    "of floor": lambda row: "" if row["share_of_floor"] is None else f"{row['share_of_floor']:.0%}",
    "same tokens": lambda row: "yes" if row["identical_to_plain"] else "NO",
}


def show(content: dict[str, Any]) -> None:
    heads, rows = cells(content)
    table = Table(box=None, pad_edge=False)
    for head in heads:
        table.add_column(head, justify="right" if head else "left")
    for row in rows:
        table.add_row(*row)
    console = Console(width=180)
    console.print(table, highlight=False)
    console.print(_footer(content), highlight=False, soft_wrap=True)


def markdown(content: dict[str, Any]) -> str:
    """The table as it stands in the docs."""
    heads, rows = cells(content)
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n\n" + _footer(content)


def cells(content: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of a report's table, without columns in which nothing stands."""
    sides = content["sides"]
    columns = {"": [side["side"] for side in sides]}
    columns |= {head: [text(side) for side in sides] for head, text in COLUMNS.items()}
    kept = {head: column for head, column in columns.items() if any(column)}
    return list(kept), [list(row) for row in zip(*kept.values(), strict=True)]


def _footer(content: dict[str, Any]) -> str:
    first = content["sides"][0]
    lines = [
        f"{content['machine']}, {content['threads']} threads, {content['isa']}, torch {content['torch']},"
        f" OMP_WAIT_POLICY {content['omp_wait_policy']}",
        f"pair {content['pair']}, weights {content['weights']}, {content['prompts']} prompts of"
        f" {content['max_tokens']} new tokens, median of {content['repeats']}; speeds with prefill, decode without",
        f"memory reads at {content['read_gigabytes_per_second']:.1f} GB/s",
    ]
    if first["floor_tokens_per_second"] is not None:
        lines[-1] += f"; reading a step's weights once allows {first['floor_tokens_per_second']:.1f} tokens/s plain"
    if content["cpu_share_elsewhere"] is not None:
        lines.append(f"other processes took {content['cpu_share_elsewhere']:.0%} of the cores' time meanwhile")
    for name, about in content["peers"].items():
        settings = ", ".join(f"{key} {value}" for key, value in about.items())
        lines.append(f"{name}: {settings}")
    return "\n".join(lines)


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    for file in sys.argv[1:]:
        print(markdown(json.loads(Path(file).read_text(encoding="utf-8"))), end="\n\n")
