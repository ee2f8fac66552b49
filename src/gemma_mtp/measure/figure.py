"""How pictures look: one colour a side, lines named at their ends, and below the title what was measured, where and
when. Needs matplotlib: the `plot` extra."""

from __future__ import annotations

import datetime
import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gemma_mtp.errors import CheckpointError, DataError, missing_extra
from gemma_mtp.files.replace import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
#: of plain decoding, here and on the server's page
PLAIN = "#525e6c"
#: of the sides with drafts, in their order; told apart in grey, too
DRAFTED = ("#1d55b5", "#c2571a", "#0b7a4b", "#7a3fb0")
#: line styles, one a load
LOADS = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1, 2)), (0, (1, 1)))
SOFT = "#525e6c"
#: behind text that lies upon lines
GROUND = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}
#: points between two labels at line ends
LABEL_GAP = 11.0


def check_plot(option: str, path: Path) -> None:
    """Before anything is measured: DataError where the picture could not be written afterwards."""
    if path.suffix not in FORMATS:
        raise DataError(f"{option} is {path}, but must end in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}.")
    if not path.absolute().parent.is_dir():
        raise DataError(f"{option} is {path}, but its directory does not exist; create it.")
    if importlib.util.find_spec("matplotlib") is None:
        raise DataError(missing_extra(option, "matplotlib", "plot"))


def save_figure(figure: Figure, path: Path) -> None:
    """Write under a temporary name, then rename. Raises DataError."""
    try:
        replace_file(path, lambda partial: figure.savefig(partial, format=path.suffix[1:], dpi=150))
    except CheckpointError as error:
        raise DataError(str(error)) from None


def new_figure(width: float, height: float, title: str, subtitle: str) -> Figure:
    """Returns an empty figure. `subtitle` says of what, where and when (`measured_on`)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - 0.62 / height), hspace=0.06)  # type: ignore[union-attr, call-arg]
    figure.text(0.01, 1 - 0.12 / height, title, fontsize=14, fontweight="bold", va="top")
    figure.text(0.01, 1 - 0.40 / height, subtitle, fontsize=9, color=SOFT, va="top")
    return figure


def measured_on(what: str, machine: str) -> str:
    """The subtitle of a picture of what was measured just now."""
    return f"{what} · {machine} · {datetime.datetime.now().astimezone():%Y-%m-%d}"


def colours(sides: Iterable[str], plain: str = "") -> dict[str, str]:
    """Returns the colour of each side; `plain` is the one without drafts, if any."""
    drafted = [side for side in dict.fromkeys(sides) if side != plain]
    found = {side: DRAFTED[i % len(DRAFTED)] for i, side in enumerate(drafted)}
    return {plain: PLAIN, **found} if plain else found


@dataclass(frozen=True)
class End:
    """Where a line ends, and what stands there."""

    x: float
    y: float
    text: str
    colour: str


def label_ends(axes: Axes, ends: Sequence[End]) -> None:
    """Name lines at their right ends, in their colours. Names that would lie upon each other are moved apart."""
    transform = axes.transData.transform
    points = 72 / axes.figure.dpi
    low = float("-inf")
    for end in sorted(ends, key=lambda end: end.y):
        place = float(transform((end.x, end.y))[1]) * points
        low = max(place, low + LABEL_GAP)
        axes.annotate(end.text, (end.x, end.y), (7, low - place), textcoords="offset points", color=end.colour,
                      fontsize=9, va="center", annotation_clip=False)  # fmt: skip


def key(axes: Axes, lines: Sequence[tuple[str, str]]) -> None:
    """Lines of text in their colours, at the upper right: what bars are, which have no ends."""
    for i, (text, colour) in enumerate(lines):
        axes.annotate(text, (1, 1), (-5, -5 - 13 * i), xycoords="axes fraction", textcoords="offset points",
                      color=colour, fontsize=9, ha="right", va="top", bbox=GROUND)  # fmt: skip


def finish(axes: Axes, title: str) -> None:
    """Title at the left, a pale grid behind, and no frame where nothing is read off."""
    axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold")
    axes.grid(color="#dbe0e6", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
