"""A load's latencies and throughput as a picture. Needs matplotlib: the `plot` extra."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gemma_mtp.measure.load import OpenLoop, Record
from gemma_mtp.measure.load_runs import LevelResult
from gemma_mtp.measure.load_stats import LoadSummary
from gemma_mtp.measure.plot import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MILLISECONDS = 1000.0
#: styles of the figures of one side, which share a colour
LINES = ("-", "--")
#: a number of a level's summary
Drawn = Callable[[LoadSummary], float]


def plot_load(results: Sequence[LevelResult], path: Path, title: str = "") -> None:
    """Draw how times to the first token and of later tokens are distributed, and both and throughput over the levels.

    Raises DataError where the file can not be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8.4), layout="constrained")
    axes = figure.subplots(2, 2).flatten()
    if title:
        figure.suptitle(title)
    _cumulative(axes[0], "Time to first token", results, lambda record: record.time_to_first_token)
    _cumulative(axes[1], "Time per output token", results, lambda record: record.time_per_output_token)
    first_tokens = {name: _first_token(name) for name in ("p50", "p99")}
    _over_levels(axes[2], "Time to first token by load", "ms", results, first_tokens)
    speed: dict[str, Drawn] = {"": lambda summary: summary.output_tokens_per_second}
    _over_levels(axes[3], "Throughput by load", "output tokens/s", results, speed)
    save_figure(figure, path)


def _first_token(name: str) -> Drawn:
    return lambda summary: _milliseconds(summary.time_to_first_token.at(name))


def _milliseconds(seconds: float | None) -> float:
    return float("nan") if seconds is None else MILLISECONDS * seconds


def _cumulative(
    axes: Axes, title: str, results: Sequence[LevelResult], value: Callable[[Record], float | None]
) -> None:
    for result in results:
        values = (value(record) for load in result.loads for record in load if record.completed)
        ordered = sorted(_milliseconds(found) for found in values if found is not None)
        shares = [i / len(ordered) for i in range(len(ordered) + 1)] if ordered else []
        axes.step([*ordered[:1], *ordered], shares, where="post", label=result.label)
    axes.set(title=title, xlabel="ms", ylabel="share of requests", ylim=(0, 1))
    axes.set_xlim(left=0)
    _finished(axes)


def _over_levels(
    axes: Axes,
    title: str,
    unit: str,
    results: Sequence[LevelResult],
    figures: Mapping[str, Drawn],
) -> None:
    for i, side in enumerate(dict.fromkeys(result.side for result in results)):
        own = [result for result in results if result.side == side]
        for (name, figure), style in zip(figures.items(), LINES, strict=False):
            values = [figure(result.summary) for result in own]
            if not all(map(math.isnan, values)):
                label = ", ".join(part for part in (side, name) if part) or None
                axes.plot(list(_places(own)), values, color=f"C{i}", linestyle=style, marker="o", label=label)
    open_loop = isinstance(results[0].shape, OpenLoop)
    axes.set(title=title, xlabel="requests/s asked for" if open_loop else "clients", ylabel=unit)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    _finished(axes)


def _places(results: Iterable[LevelResult]) -> Iterable[float]:
    return (
        result.shape.rate if isinstance(result.shape, OpenLoop) else float(result.shape.clients) for result in results
    )


def _finished(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize="small")
