"""A plan as a picture: memory against context, for each choice of weights. Needs matplotlib: the `plot` extra."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from gemma_mtp.measure.figure import SOFT, End, colours, finish, key, label_ends, new_figure, save_figure
from gemma_mtp.measure.plan import Load, takes
from gemma_mtp.sizes.run import Loaded
from gemma_mtp.units import counted, shown_bytes

POINTS = 40
#: parts of a plan from the bottom, and what they are called
PARTS = {
    "weights": "weights", "drafter": "drafter", "kv_full": "keys and values, full layers",
    "kv_sliding": "keys and values, sliding layers", "activations": "activations", "workspace": "workspace",
    "process": "process",
}  # fmt: skip
PART_COLOURS = ("#1d55b5", "#6d9be8", "#c2571a", "#e8a878", "#0b7a4b", "#7fc4a4", "#8a94a1")


def plot_plan(
    name: str, choices: Mapping[str, Loaded], load: Load, memory: int | None, path: Path, gpu: bool = False
) -> None:
    """Draw the total against the context of the load's sequences, and of the first choice its parts. Raises DataError
    where the file can not be written."""

    of = "" if memory is None else f" · {shown_bytes(memory)} of memory"
    sequences = counted(load.sequences, "sequence")
    figure = new_figure(11, 5.0, f"What {name} takes", f"{sequences}{of} · planned, not measured")
    left, right = figure.subplots(1, 2)
    most = next(iter(choices.values())).target.text.max_position_embeddings
    contexts = [max(1, round(most * i / POINTS)) for i in range(POINTS + 1)]
    totals = {
        label: [takes(loaded, Load(load.sequences, n, load.draft_tokens), gpu).total / 1e9 for n in contexts]
        for label, loaded in choices.items()
    }
    colour = colours(choices)
    for label, of_one in totals.items():
        left.plot(contexts, of_one, color=colour[label])
    left.set(xlabel="tokens of each sequence", ylabel="GB", ylim=(0, 1.1 * max(map(max, totals.values()))))
    label_ends(left, [End(contexts[-1], of_one[-1], label, colour[label]) for label, of_one in totals.items()])
    parts = {label: takes(loaded, load, gpu).to_dict() for label, loaded in choices.items()}
    bottoms = [0.0] * len(parts)
    for part, shade in zip(PARTS, PART_COLOURS, strict=True):
        sizes = [taken[part] / 1e9 for taken in parts.values()]
        right.bar(list(choices), sizes, bottom=bottoms, color=shade)
        bottoms = [bottom + size for bottom, size in zip(bottoms, sizes, strict=True)]
    right.set(ylabel="GB", ylim=(0, 1.1 * max(bottoms)), xlim=(-0.6, len(parts) + 0.6))
    named = [(PARTS[part], shade) for part, shade in zip(PARTS, PART_COLOURS, strict=True)]
    key(right, named[::-1])
    for axes in (left, right):
        if memory is not None and memory / 1e9 < axes.get_ylim()[1]:  # beyond it, it would press all else flat
            axes.axhline(memory / 1e9, color=SOFT, linestyle=":", linewidth=1)
            axes.annotate("memory", (axes.get_xlim()[0], memory / 1e9), va="bottom", color=SOFT, fontsize=9)
    finish(left, "All that is taken")
    finish(right, f"By part, at {load.context} tokens")
    save_figure(figure, path)
