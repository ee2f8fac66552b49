"""A load's latencies and throughput as a picture. Needs matplotlib: the `plot` extra."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gemma_mtp.measure.figure import GROUND, LOADS, End, colours, finish, label_ends, new_figure, save_figure
from gemma_mtp.measure.load import OpenLoop, Record
from gemma_mtp.measure.load_runs import LevelResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MILLISECONDS = 1000.0
#: the side of plain decoding, as bench-serve calls it
PLAIN_SIDE = "no drafts"
#: styles of the figures of one side, which share a colour
LINES = ("-", ":")
#: a number of a level's summary, and its interval where it has one
Drawn = Callable[[LevelResult], tuple[float, float, float]]
NOTHING = (float("nan"),) * 3


def plot_load(results: Sequence[LevelResult], path: Path, title: str = "", subtitle: str = "") -> None:
    """Draw how times to the first token and of later tokens are distributed, and both and throughput over the levels.

    A side has a colour, a level a line style; lines carry their names. Raises DataError where the file can not be
    written.
    """
    figure = new_figure(11.5, 9, title, subtitle)
    axes = figure.subplots(2, 2).flatten()
    _cumulative(axes[0], "Time to first token", results, lambda record: record.time_to_first_token)
    _cumulative(axes[1], "Time per output token", results, lambda record: record.time_per_output_token)
    first_tokens = {name: _first_token(name) for name in ("p50", "p99")}
    _over_levels(axes[2], "Time to first token by load", "ms; 95% intervals", results, first_tokens)
    spread = "; least to greatest repetition" if any(len(result.by_repeat) > 1 for result in results) else ""
    _over_levels(axes[3], "Throughput by load", f"output tokens/s{spread}", results, {"": _speed})
    save_figure(figure, path)


def _first_token(name: str) -> Drawn:
    def found(result: LevelResult) -> tuple[float, float, float]:
        quantile = result.summary.time_to_first_token.quantiles.get(name)
        if quantile is None:
            return NOTHING
        return _milliseconds(quantile.value), _milliseconds(quantile.low), _milliseconds(quantile.high)

    return found


def _speed(result: LevelResult) -> tuple[float, float, float]:
    speeds = [repeat.output_tokens_per_second for repeat in result.by_repeat]
    return result.summary.output_tokens_per_second, min(speeds), max(speeds)


def _milliseconds(seconds: float | None) -> float:
    return float("nan") if seconds is None else MILLISECONDS * seconds


def _colours(results: Sequence[LevelResult]) -> dict[str, str]:
    sides = list(dict.fromkeys(result.side for result in results))
    return colours(sides, PLAIN_SIDE if PLAIN_SIDE in sides else "")


def _cumulative(
    axes: Axes, title: str, results: Sequence[LevelResult], value: Callable[[Record], float | None]
) -> None:
    """A curve carries its name at a height of its own, so that names of curves close to each other part."""
    colour, shapes = _colours(results), list(dict.fromkeys(result.shape for result in results))
    for i, result in enumerate(results):
        values = (value(record) for load in result.loads for record in load if record.completed)
        ordered = sorted(_milliseconds(found) for found in values if found is not None)
        if not ordered:
            continue
        shares = [n / len(ordered) for n in range(len(ordered) + 1)]
        style = LOADS[shapes.index(result.shape) % len(LOADS)]
        axes.step([*ordered[:1], *ordered], shares, where="post", color=colour[result.side], linestyle=style)
        at = (i + 1) / (len(results) + 1)
        place = ordered[min(len(ordered) - 1, int(at * len(ordered)))]
        axes.annotate(f"{result.label} (n = {len(ordered)})", (place, at), (4, 0), textcoords="offset points",
                      color=colour[result.side], fontsize=8, va="center", annotation_clip=False,
                      bbox=GROUND)  # fmt: skip
    axes.set(xlabel="ms", ylabel="share of requests", ylim=(0, 1.01))
    axes.set_xlim(left=0)
    finish(axes, title)


def _over_levels(
    axes: Axes, title: str, unit: str, results: Sequence[LevelResult], figures: Mapping[str, Drawn]
) -> None:
    open_loop = isinstance(results[0].shape, OpenLoop)
    axes.set(xlabel="requests/s asked for" if open_loop else "clients", ylabel=unit)
    ends = []
    for side, colour in _colours(results).items():
        own = [result for result in results if result.side == side]
        for (name, figure), style in zip(figures.items(), LINES, strict=False):
            drawn = [(_place(result), *figure(result)) for result in own]
            drawn = [point for point in drawn if not math.isnan(point[1])]
            if not drawn:
                continue
            places, values, lows, highs = zip(*drawn, strict=True)
            axes.plot(places, values, color=colour, linestyle=style, marker="o", markersize=4)
            axes.vlines(places, lows, highs, color=colour, linewidth=1.2)
            text = ", ".join(part for part in (side, name) if part)
            ends.append(End(places[-1], values[-1], text, colour))
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    finish(axes, title)
    label_ends(axes, ends)


def _place(result: LevelResult) -> float:
    """Where a level stands on the axis of loads."""
    return result.shape.rate if isinstance(result.shape, OpenLoop) else float(result.shape.clients)
