"""A comparison of outputs as a picture. Needs matplotlib: the `plot` extra."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from gemma_mtp.measure.figure import DRAFTED, PLAIN, SOFT, End, finish, label_ends, new_figure, save_figure
from gemma_mtp.measure.identity import Compared, repeatable


def plot_identity(compared: Sequence[Compared], path: Path, subtitle: str) -> None:
    """Draw shares of identical and of repeatable outputs by concurrency, and where outputs part with which margin.
    Raises DataError where the file can not be written."""
    figure = new_figure(11.5, 4.8, "Outputs with drafting on and off", subtitle)
    left, right = figure.subplots(1, 2)
    clients = sorted({one.clients for one in compared})
    lines: dict[str, tuple[str, Callable[[Compared], bool]]] = {
        "plain, repeated": (PLAIN, lambda one: repeatable(one.plain)),
        "drafted, repeated": (DRAFTED[0], lambda one: repeatable(one.drafted)),
        "drafted to plain": (DRAFTED[1], lambda one: one.identical),
    }
    ends = []
    for label, (colour, holds) in lines.items():
        shares = [_share([holds(one) for one in compared if one.clients == n and not one.failed]) for n in clients]
        left.plot(clients, shares, marker="o", markersize=4, color=colour)
        ends.append(End(clients[-1], shares[-1], label, colour))
    left.set(xlabel="requests at a time", ylabel="share of prompts with identical outputs", ylim=(0, 1.02))
    label_ends(left, ends)
    finish(left, f"Identical outputs; {len(compared) // len(clients)} prompts")
    margins = [
        (one.parting.token, one.parting.margin) for one in compared if one.parting and one.parting.margin is not None
    ]
    for token, margin in margins:
        right.plot(token, margin, marker="o", markersize=4, color=DRAFTED[1])
    parted = sum(not one.identical for one in compared if not one.failed)
    right.set(xlabel="token at which they part", ylabel="margin between the two tokens there, nats")
    if not margins:
        said = "no outputs part" if parted == 0 else "no log-probabilities where they part"
        right.annotate(said, (0.5, 0.5), xycoords="axes fraction", ha="center", color=SOFT)
    finish(right, f"Where outputs part; {parted} do")
    save_figure(figure, path)


def _share(held: Sequence[bool]) -> float:
    return sum(held) / len(held) if held else float("nan")
