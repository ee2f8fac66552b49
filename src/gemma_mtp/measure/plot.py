"""Acceptance as a picture. Needs matplotlib: the `plot` extra."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_mtp.measure.figure import End, colours, finish, key, label_ends, new_figure, save_figure
from gemma_mtp.measure.shares import Shares, conditional, joint

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

    from gemma_mtp.measure.acceptance import AcceptanceReport
    from gemma_mtp.measure.speedup import Prediction

#: positions beside each other, so that their intervals do not lie upon each other
ASIDE = 0.06


def plot_acceptance(
    reports: Mapping[str, AcceptanceReport],
    path: Path,
    predictions: Mapping[str, Sequence[Prediction]] | None = None,
    title: str = "Acceptance",
    subtitle: str = "",
) -> None:
    """Draw labelled reports of one K: conditional and joint acceptance by position with intervals, the histogram of
    acceptance lengths, and the predicted speed-ups where given, dashed beyond the measured positions."""
    width, height = (15.5, 4.8) if predictions is None else (11.5, 9.0)
    figure = new_figure(width, height, title, subtitle)
    axes = figure.subplots(*((1, 3) if predictions is None else (2, 2))).flatten()
    colour = colours(reports)
    _by_position(
        axes[0], "Given the ones before (conditional)", {k: conditional(r) for k, r in reports.items()}, colour
    )
    _by_position(axes[1], "With the ones before (joint)", {k: joint(r) for k, r in reports.items()}, colour)
    _histogram(axes[2], reports, colour)
    if predictions is not None:
        _speedups(axes[3], predictions, colour)
    save_figure(figure, path)


def _by_position(axes: Axes, title: str, shares: Mapping[str, Shares], colour: Mapping[str, str]) -> None:
    ends = []
    for i, (label, own) in enumerate(shares.items()):
        places = [position + 1 + (i - (len(shares) - 1) / 2) * ASIDE for position in range(len(own.values))]
        axes.plot(places, own.values, marker="o", markersize=4, color=colour[label])
        if own.intervals is not None:
            axes.vlines(places, *zip(*own.intervals, strict=True), color=colour[label], linewidth=1.2)
        ends.append(End(places[-1], own.values[-1], label, colour[label]))
    with_intervals = any(own.intervals is not None for own in shares.values())
    interval = "; 95% intervals over prompts" if with_intervals else ""
    axes.set(xlabel="draft position", ylabel=f"share of rounds{interval}", ylim=(0, 1.02))
    _whole_numbers(axes.xaxis)
    finish(axes, title)
    label_ends(axes, ends)


def _histogram(axes: Axes, reports: Mapping[str, AcceptanceReport], colour: Mapping[str, str]) -> None:
    """Bars by accepted drafts, the lower axis; the upper one counts the target's own token too."""
    width = 0.8 / len(reports)
    said = []
    for i, (label, report) in enumerate(reports.items()):
        pooled = report.pooled
        places = [n + (i - (len(reports) - 1) / 2) * width for n in range(pooled.draft_tokens + 1)]
        axes.bar(places, [count / max(1, pooled.rounds) for count in pooled.histogram], width, color=colour[label])
        axes.axvline(pooled.mean_accepted, color=colour[label], linestyle=":", linewidth=1.2)
        means = f"mean {pooled.mean_accepted:.2f} (length {pooled.mean_length:.2f})"
        said.append((f"{label}: {means}, n = {pooled.rounds}", colour[label]))
    axes.set(xlabel="accepted drafts a round, without the target's own token", ylabel="share of rounds")
    axes.set_ylim(top=(1.1 + 0.09 * len(said)) * axes.get_ylim()[1])  # room for the key
    with_own: tuple[Callable[[Any], Any], Callable[[Any], Any]] = (lambda n: n + 1, lambda n: n - 1)
    above = axes.secondary_xaxis(-0.19, functions=with_own)
    above.set_xlabel("acceptance length, with the target's own token")
    above.spines["bottom"].set_visible(False)
    _whole_numbers(axes.xaxis)
    _whole_numbers(above.xaxis)
    prompts = sorted({len(report.prompts) for report in reports.values()})
    finish(axes, f"Rounds by accepted drafts; {' or '.join(map(str, prompts))} prompts")
    key(axes, said)


def _whole_numbers(axis: Axis) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))


def _speedups(axes: Axes, predictions: Mapping[str, Sequence[Prediction]], colour: Mapping[str, str]) -> None:
    """Solid as far as acceptance was measured; the rest goes on from its last point."""
    ends = []
    for label, rows in predictions.items():
        measured = [p for p in rows if not p.extrapolated]
        beyond = [*measured[-1:], *(p for p in rows if p.extrapolated)]
        for part, style, marker in ((beyond, "--", "none"), (measured, "-", colour[label])):
            axes.plot([p.draft_tokens for p in part], [p.speedup for p in part], linestyle=style, marker="o",
                      markersize=4, markerfacecolor=marker, color=colour[label])  # fmt: skip
        ends.append(End(rows[-1].draft_tokens, rows[-1].speedup, label, colour[label]))
    axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set(xlabel="drafts a round (K); dashed: beyond what was measured", ylabel="over plain decoding")
    axes.set_ylim(bottom=0)
    _whole_numbers(axes.xaxis)
    finish(axes, "Predicted speed-up on this machine")
    label_ends(axes, ends)
