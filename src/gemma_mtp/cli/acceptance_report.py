"""How `gemma-mtp acceptance` prints what it measured."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from gemma_mtp.cli.console import COLUMNS, plain_table, print_table, say
from gemma_mtp.measure.acceptance import AcceptanceReport, Comparison
from gemma_mtp.measure.speedup import (
    Interval,
    MeasuredSpeedup,
    Prediction,
    SteadyCosts,
    best,
    break_even,
    predict,
    speedup_intervals,
)

#: tasks or files shown in the table; JSON has all
MOST_TASKS = 30
#: what a share takes, with the space before it
SHARE_COLUMNS = 6
LENGTHS = "the length counts the target's own token of every round (correction or bonus), accepted drafts do not"
PREDICTED = (
    "predicted from round costs measured on this machine: length that breaks even, mean acceptance length,"
    " bounds of the speed-up"
)
EXTRAPOLATED = "* positions beyond those measured are taken to be as good as the last"


@dataclass(frozen=True)
class Measured:
    """All that is known of one setting. `costs` are those of rounds that choose as the setting does; `comparison` is
    from the other drafter to this one."""

    label: str
    thinking: bool | None
    report: AcceptanceReport
    costs: SteadyCosts
    speedup: MeasuredSpeedup | None
    comparison: Comparison | None

    @functools.cached_property
    def predictions(self) -> list[Prediction]:
        return predict(self.report.pooled, self.costs.best)

    @functools.cached_property
    def intervals(self) -> list[Interval]:
        return speedup_intervals(self.report, self.costs)


def to_json(measured: Sequence[Measured]) -> dict[str, Any]:
    """The object `--json` prints, beside the data's name."""
    return {
        "draft_tokens": measured[0].report.draft_tokens,
        "lengths": {
            "mean_acceptance_length": "with the target's own token of every round (1 to K + 1)",
            "mean_accepted_drafts": "without it (0 to K)",
            "acceptance_histogram": "rounds by accepted drafts, without it (0 to K)",
            "acceptance_length_histogram": "rounds by tokens committed, with it (1 to K + 1)",
        },
        "settings": [_setting(m) for m in measured],
    }


def _setting(m: Measured) -> dict[str, Any]:
    content = {
        "label": m.label,
        "thinking": m.thinking,
        **m.report.to_dict(),
        "round_seconds_by_draft_tokens": list(m.costs.best.seconds),
        "costs_disturbed": m.costs.disturbed,
        "busy_elsewhere": m.costs.busy,
        "predicted": [
            {**asdict(prediction), "speedup_low": interval.low, "speedup_high": interval.high}
            for prediction, interval in zip(m.predictions, m.intervals, strict=True)
        ],
        "best_draft_tokens": None if m.costs.disturbed else best(m.predictions).draft_tokens,
        "break_even_draft_tokens": None if m.costs.disturbed else break_even(m.predictions),
    }
    if m.speedup is not None:
        content["measured_speedup"] = {**asdict(m.speedup), "ratio": m.speedup.ratio}
    if m.comparison is not None:
        content["against"] = asdict(m.comparison)
    return content


def print_report(console: Console, measured: Sequence[Measured]) -> None:
    """Tables: lengths, acceptance by position, histogram, by task, what pays; then a sentence for each setting."""
    K, prompts = measured[0].report.draft_tokens, len(measured[0].report.prompts)
    say(console, f"{prompts} prompts, {K} drafts a round, {measured[0].report.verification} verification\n")
    pooled = {m.label: m.report.pooled for m in measured}
    _section(console, "mean lengths", [_lengths(measured)], LENGTHS)
    conditional = {label: acceptance.by_position for label, acceptance in pooled.items()}
    joint = {label: acceptance.joint_by_position for label, acceptance in pooled.items()}
    histogram = {label: [n / max(1, a.rounds) for n in a.histogram] for label, a in pooled.items()}
    _section(console, "acceptance at position, given the ones before", _shares(range(1, K + 1), conditional))
    _section(console, "acceptance at position, together with the ones before", _shares(range(1, K + 1), joint))
    _section(console, "share of rounds by accepted drafts", _shares(range(K + 1), histogram))
    tasks = len(measured[0].report.by_task)
    if tasks > 1:
        more = f"and {tasks - MOST_TASKS} better ones, which --json has" if tasks > MOST_TASKS else ""
        _section(console, "mean acceptance length by task or file", [_by_task(measured)], more)
    quiet = [m for m in measured if not m.costs.disturbed]
    if quiet:
        _section(console, PREDICTED, [_paying(quiet)], EXTRAPOLATED if quiet[0].predictions[-1].extrapolated else "")
    for m in measured:
        say(console, f"{m.label}: {_verdict(m)}")


def _section(console: Console, title: str, tables: Iterable[Table], note: str = "") -> None:
    say(console, title, "bold")
    for table in tables:
        print_table(console, table)
    say(console, f"{note}\n" if note else "")


def _lengths(measured: Sequence[Measured]) -> Table:
    table = plain_table("", "tokens", "rounds", "acceptance length", "accepted drafts")
    for m in measured:
        pooled, tokens = m.report.pooled, str(m.report.tokens)
        table.add_row(m.label, tokens, str(pooled.rounds), f"{pooled.mean_length:.2f}", f"{pooled.mean_accepted:.2f}")
    return table


def _shares(columns: Sequence[int], rows: Mapping[str, Sequence[float]]) -> Iterator[Table]:
    """One table, or several below each other where so many columns are wider than a terminal."""
    most = max(1, (COLUMNS - max(map(len, rows))) // SHARE_COLUMNS)
    each = -(-len(columns) // -(-len(columns) // most))
    for first in range(0, len(columns), each):
        table = plain_table("", *map(str, columns[first : first + each]))
        for label, shares in rows.items():
            table.add_row(label, *(f"{share:.2f}" for share in shares[first : first + each]))
        yield table


def _by_task(measured: Sequence[Measured]) -> Table:
    """The lowest first: those are what to look at."""
    tasks = [m.report.by_task for m in measured]
    table = plain_table("", *(m.label for m in measured))
    for task in sorted(tasks[0], key=lambda task: tasks[0][task].mean_length)[:MOST_TASKS]:
        table.add_row(task, *(f"{own[task].mean_length:.2f}" for own in tasks))
    return table


def _paying(measured: Sequence[Measured]) -> Table:
    """A round's cost is the length at which it breaks even; beside it, what length, and what speed-ups are likely."""
    table = plain_table("drafts", *(m.label for m in measured))
    for k, rows in enumerate(zip(*(m.predictions for m in measured), strict=True)):
        lengths = (f"{p.expected_length:.2f}{'*' if p.extrapolated else ' '}" for p in rows)
        bounds = (f"{m.intervals[k].low:.2f}-{m.intervals[k].high:.2f}x" for m in measured)
        cells = (f"{p.cost:.2f} {length} {bound}" for p, length, bound in zip(rows, lengths, bounds, strict=True))
        table.add_row(str(k), *cells)
    return table


def _verdict(m: Measured) -> str:
    fastest, most = best(m.predictions), break_even(m.predictions)
    bounds = m.intervals[fastest.draft_tokens]
    if m.costs.disturbed:
        text = (
            f"no speed-up is predicted: other work took {m.costs.busy:.0%} of the processor while rounds were timed;"
            " measure again on a quiet machine"
        )
    elif fastest.draft_tokens == 0:
        text = "drafting does not pay here"
    else:
        text = (
            f"fastest with {fastest.draft_tokens} drafts a round"
            f" ({fastest.speedup:.2f}x, {bounds.low:.2f} to {bounds.high:.2f})"
        )
        text += "" if bounds.sure else ", which may be no gain"
        last = m.predictions[-1].draft_tokens
        text += f", breaks even up to {most}" + (" or more" if most == last else "")
    if m.speedup is not None:
        text += f"; measured at {m.report.draft_tokens} drafts: {m.speedup}"
    if m.comparison is not None:
        c = m.comparison
        text += (
            f"; against the other drafter's {c.before:.3f}: {c.difference:+.3f} ({c.confidence:.0%} interval"
            f" {c.low:+.3f} to {c.high:+.3f})"
        )
    return text
