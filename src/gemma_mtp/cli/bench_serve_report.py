"""How `gemma-mtp bench-serve` prints what it measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from rich.console import Console
from rich.table import Table

from gemma_mtp.cli.console import plain_table, print_table
from gemma_mtp.measure.load import OpenLoop
from gemma_mtp.measure.load_runs import LevelResult, Ratio
from gemma_mtp.measure.load_stats import QUANTILES, Distribution, LoadSummary

#: titles of the latency tables, and which of a summary's distributions they show
LATENCIES: dict[str, Callable[[LoadSummary], Distribution]] = {
    "time to first token": lambda summary: summary.time_to_first_token,
    "time per output token after the first": lambda summary: summary.time_per_output_token,
    "between chunks of an answer": lambda summary: summary.chunk_gap,
    "end to end": lambda summary: summary.end_to_end,
}
SEND_DELAY = "from due to sent"
COUNTED = {
    True: "every latency counts from when a request was due, whether or not it could be sent",
    False: "each client sends when its last request is done: a slow server is asked less, and its queue stays short",
}
#: as latencies are called beside their intervals, where their titles are too long
SHORT = {"time per output token after the first": "time per output token", "between chunks of an answer": "chunks"}
TOO_FEW = "-: too few requests to say; p90 takes 10, p95 20, p99 100"
#: short names of the figures that two sides are compared by
RATIOS = {
    "requests_per_second": "requests/s",
    "output_tokens_per_second": "tokens/s",
    "time_to_first_token": "first token, p50",
    "time_per_output_token": "per token, p50",
    "end_to_end": "end to end, p50",
}


def print_report(
    console: Console, results: Sequence[LevelResult], compared: Sequence[tuple[str, dict[str, Ratio]]]
) -> None:
    """Tables: throughput, failures, every latency by level, and the sides' ratios."""
    _section(console, "throughput", _throughput(results))
    if any(result.summary.failed or result.summary.refused for result in results):
        _section(console, "failed requests", _failures(results))
    open_loop = isinstance(results[0].shape, OpenLoop)
    shown = {**LATENCIES, SEND_DELAY: lambda summary: summary.send_delay} if open_loop else LATENCIES
    for title, chosen in shown.items():
        _section(console, title, _latencies(results, chosen))
    intervals = _intervals(results, shown)
    if intervals.row_count:
        _section(console, "medians and p99 lie there with 95% confidence", intervals)
    if compared:
        spread = any(ratio.least is not None for _, found in compared for ratio in found.values())
        of = ": median of the repetitions (least to greatest)" if spread else ""
        _section(console, f"drafting on to off{of}", _ratios(compared))
    for note in (TOO_FEW, COUNTED[open_loop]):
        console.print(note, highlight=False)


def _section(console: Console, title: str, *tables: Table) -> None:
    console.print(title, style="bold", highlight=False)
    for table in tables:
        print_table(console, table)
    console.print()


def _table(*columns: str, words: int = 1) -> Table:
    """All of it fits 80 columns; numbers are never cut."""
    table = plain_table(*columns, words=words, no_wrap=True)
    table.padding = (0, 1, 0, 0)
    return table


def _count(number: int) -> str:
    """In at most six characters, up to ten billion."""
    if number < 1_000_000:
        return str(number)
    millions = number / 1e6
    return f"{millions:.1f}M" if millions < 100 else f"{millions:.0f}M"


def _throughput(results: Sequence[LevelResult]) -> Table:
    table = _table("", "done", "req/s", "tokens/s", "tokens", "prompt", "reused", "accepted")
    for result in results:
        own = result.summary
        accepted = "" if own.acceptance is None else f"{own.acceptance:.0%}"
        speed = own.output_tokens_per_second
        table.add_row(
            result.label, f"{own.completed}/{own.requests}", f"{own.requests_per_second:.2f}",
            f"{speed:.{0 if speed >= 1000 else 1}f}", *map(_count, (own.output_tokens, own.prompt_tokens)),
            _count(own.cached_tokens), accepted,
        )  # fmt: skip
    return table


def _failures(results: Sequence[LevelResult]) -> Table:
    table = _table("", "refused", "to wait", "failed")
    table.add_column("kinds", overflow="fold")
    for result in results:
        own = result.summary
        wait = "" if own.mean_retry_after is None else _duration(own.mean_retry_after)
        kinds = "\n".join(f"{kind}: {count}" for kind, count in own.errors.items())
        table.add_row(result.label, str(own.refused), wait, str(own.failed), kinds)
    return table


def _latencies(results: Sequence[LevelResult], chosen: Callable[[LoadSummary], Distribution]) -> Table:
    names = [f"p{q * 100:g}" for q in QUANTILES]
    table = _table("", "mean", *names, "longest")
    for result in results:
        own = chosen(result.summary)
        table.add_row(result.label, *map(_duration, (own.mean, *map(own.at, names), own.longest)))
    return table


def _intervals(results: Sequence[LevelResult], latencies: Mapping[str, Callable[[LoadSummary], Distribution]]) -> Table:
    """Of every latency that has any."""
    table = _table("", "", "p50", "p99", words=2)
    for title, chosen in latencies.items():
        for result in results:
            own = chosen(result.summary)
            found = [_interval(own, name) for name in ("p50", "p99")]
            if any(found):
                table.add_row(SHORT.get(title, title), result.label, *found)
    return table


def _interval(own: Distribution, name: str) -> str:
    if name not in own.quantiles:
        return ""
    found = own.quantiles[name]
    return "" if found.low is found.high is None else f"{_duration(found.low)} to {_duration(found.high)}"


def _duration(seconds: float | None) -> str:
    """With three digits, in milliseconds below a second."""
    if seconds is None:
        return "-"
    value, unit = (seconds, "s") if seconds >= 0.9995 else (1000 * seconds, "ms")
    decimals = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{decimals}f}{unit}"


def _ratios(compared: Sequence[tuple[str, dict[str, Ratio]]]) -> Table:
    """A row for each figure: beside each other they do not fit."""
    table = _table("", "", "ratio", words=2)
    for label, found in compared:
        for i, (name, title) in enumerate(RATIOS.items()):
            table.add_row("" if i else label, title, str(found.get(name, "-")))
    return table
