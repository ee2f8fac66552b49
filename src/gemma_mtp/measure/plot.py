"""Acceptance as a picture. Needs matplotlib: the `plot` extra."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_mtp.errors import CheckpointError, DataError, missing_extra
from gemma_mtp.files.replace import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

    from gemma_mtp.measure.acceptance import AcceptanceReport
    from gemma_mtp.measure.speedup import Prediction

FORMATS = (".png", ".svg", ".pdf")


def check_plot(path: Path | None) -> None:
    """Before anything is measured: DataError where the picture could not be written afterwards."""
    if path is None:
        return
    if path.suffix not in FORMATS:
        raise DataError(f"--plot is {path}, but must end in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}.")
    if not path.absolute().parent.is_dir():
        raise DataError(f"--plot is {path}, but its directory does not exist; create it.")
    if importlib.util.find_spec("matplotlib") is None:
        raise DataError(missing_extra("--plot", "matplotlib", "plot"))


def plot_acceptance(
    reports: Mapping[str, AcceptanceReport],
    path: Path,
    predictions: Mapping[str, Sequence[Prediction]] | None = None,
    title: str = "",
) -> None:
    """Draw labelled reports of one K: conditional and joint acceptance by position, the histogram of acceptance
    lengths, and the predicted speed-ups where given."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.5, 4.2) if predictions is None else (10, 8.4), layout="constrained")
    axes = figure.subplots(*((1, 3) if predictions is None else (2, 2))).flatten()
    if title:
        figure.suptitle(title)
    _by_position(axes[0], "given the ones before (conditional)", {k: r.pooled.by_position for k, r in reports.items()})
    _by_position(axes[1], "with the ones before (joint)", {k: r.pooled.joint_by_position for k, r in reports.items()})
    _histogram(axes[2], reports)
    if predictions is not None:
        _speedups(axes[3], predictions)
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Write under a temporary name, then rename. Raises DataError."""
    try:
        replace_file(path, lambda partial: figure.savefig(partial, format=path.suffix[1:], dpi=150))
    except CheckpointError as error:
        raise DataError(str(error)) from None


def _by_position(axes: Axes, title: str, shares: Mapping[str, Sequence[float]]) -> None:
    for label, values in shares.items():
        axes.plot(range(1, len(values) + 1), values, marker="o", label=label)
    axes.set(title=f"Acceptance {title}", xlabel="draft position", ylabel="share of rounds", ylim=(0, 1))
    _whole_numbers(axes.xaxis)
    axes.grid(alpha=0.3)
    axes.legend()


def _histogram(axes: Axes, reports: Mapping[str, AcceptanceReport]) -> None:
    """Bars by accepted drafts, the lower axis; the upper one counts the target's own token too."""
    width = 0.8 / len(reports)
    for i, (label, report) in enumerate(reports.items()):
        pooled = report.pooled
        places = [n + (i - (len(reports) - 1) / 2) * width for n in range(pooled.draft_tokens + 1)]
        shares = [count / max(1, pooled.rounds) for count in pooled.histogram]
        bars = axes.bar(places, shares, width, label=f"{label}: mean {pooled.mean_length:.2f} with, "
                        f"{pooled.mean_accepted:.2f} without")  # fmt: skip
        axes.axvline(pooled.mean_accepted, color=bars.patches[0].get_facecolor(), linestyle="--", linewidth=1)
    axes.set(xlabel="accepted drafts a round, without the target's own token", ylabel="share of rounds")
    axes.set_ylim(top=1.3 * axes.get_ylim()[1])  # room for the legend
    with_own: tuple[Callable[[Any], Any], Callable[[Any], Any]] = (lambda n: n + 1, lambda n: n - 1)
    above = axes.secondary_xaxis("top", functions=with_own)
    above.set_xlabel("acceptance length, with the target's own token")
    _whole_numbers(axes.xaxis)
    _whole_numbers(above.xaxis)
    axes.legend(fontsize="small")


def _whole_numbers(axis: Axis) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))


def _speedups(axes: Axes, predictions: Mapping[str, Sequence[Prediction]]) -> None:
    for label, rows in predictions.items():
        axes.plot([p.draft_tokens for p in rows], [p.speedup for p in rows], marker="o", label=label)
    axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set(title="Predicted speed-up on this machine", xlabel="drafts a round (K)", ylabel="over plain decoding")
    axes.grid(alpha=0.3)
    axes.legend()
