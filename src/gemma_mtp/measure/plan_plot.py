"""A plan as a picture: memory against context, for each choice of weights. Needs matplotlib: the `plot` extra."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from gemma_mtp.measure.figure import new_figure, save_figure
from gemma_mtp.measure.plan import Load, takes
from gemma_mtp.sizes.run import Loaded

POINTS = 40


def plot_plan(
    name: str, choices: Mapping[str, Loaded], load: Load, memory: int | None, path: Path, gpu: bool = False
) -> None:
    """Draw the total against the context of the load's sequences, and of the first choice its parts. Raises DataError
    where the file can not be written."""

    figure = new_figure(11, 5.0, f"What {name} takes", f"{load.sequences} sequences, planned and not measured")
    left, right = figure.subplots(1, 2)
    most = next(iter(choices.values())).target.text.max_position_embeddings
    contexts = [max(1, round(most * i / POINTS)) for i in range(POINTS + 1)]
    for label, loaded in choices.items():
        totals = [takes(loaded, Load(load.sequences, n, load.draft_tokens), gpu).total / 1e9 for n in contexts]
        (line,) = left.plot(contexts, totals)
        left.annotate(label, (contexts[-1], totals[-1]), ha="right", va="bottom", color=line.get_color())
    if memory is not None:
        left.axhline(memory / 1e9, color="black", linestyle=":", linewidth=1)
        left.annotate("memory", (0, memory / 1e9), va="bottom")
    left.set(xlabel="tokens of each sequence", ylabel="GB", title="all that is taken", ylim=(0, None))
    parts = [takes(loaded, load, gpu).to_dict() for loaded in choices.values()]
    bottoms = [0.0] * len(parts)
    for part in ("weights", "drafter", "kv_full", "kv_sliding", "activations", "workspace", "process"):
        sizes = [taken[part] / 1e9 for taken in parts]
        right.bar(list(choices), sizes, bottom=bottoms, label=part.replace("_", ", "))
        bottoms = [bottom + size for bottom, size in zip(bottoms, sizes, strict=True)]
    if memory is not None:
        right.axhline(memory / 1e9, color="black", linestyle=":", linewidth=1)
    right.set(ylabel="GB", title=f"by part, at {load.context} tokens")
    right.legend(fontsize="small")
    save_figure(figure, path)
