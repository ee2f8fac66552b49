"""How `gemma-mtp bench-serve` prints what it measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table

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
TOO_FEW = (
    "-: too few requests to say (p90 takes 10, p95 20, p99 100); intervals of p50 and p99 hold with 95% confidence"
)
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
    for title, chosen in LATENCIES.items():
        _section(console, title, _latencies(results, chosen))
    open_loop = isinstance(results[0].shape, OpenLoop)
    if open_loop:
        _section(console, SEND_DELAY, _latencies(results, lambda summary: summary.send_delay))
    if compared:
        _section(console, "drafting on to off: median of the repetitions, least to greatest", _ratios(compared))
    for note in (TOO_FEW, COUNTED[open_loop]):
        console.print(note, highlight=False, soft_wrap=True)


def _section(console: Console, title: str, table: Table) -> None:
    console.print(title, style="bold", highlight=False, soft_wrap=True)
    console.print(table)
    console.print()


def _table(*columns: str, wrapped: int = 0) -> Table:
    """The first column and the last `wrapped` ones give way on narrow terminals."""
    table = Table(box=None, pad_edge=False)
    for i, column in enumerate(columns):
        whole = 0 < i < len(columns) - wrapped
        table.add_column(column, justify="right" if i else "left", no_wrap=whole)
    return table


def _throughput(results: Sequence[LevelResult]) -> Table:
    table = _table("", "requests", "requests/s", "tokens/s", "tokens", "prompt", "reused", "accepted")
    for result in results:
        own = result.summary
        accepted = "" if own.acceptance is None else f"{own.acceptance:.0%}"
        table.add_row(
            result.label, f"{own.completed}/{own.requests}", f"{own.requests_per_second:.2f}",
            f"{own.output_tokens_per_second:.1f}", str(own.output_tokens), str(own.prompt_tokens),
            str(own.cached_tokens), accepted,
        )  # fmt: skip
    return table


def _failures(results: Sequence[LevelResult]) -> Table:
    table = _table("", "refused (429)", "asked to wait", "failed", "kinds", wrapped=1)
    for result in results:
        own = result.summary
        wait = "" if own.mean_retry_after is None else _duration(own.mean_retry_after)
        kinds = ", ".join(f"{kind}: {count}" for kind, count in own.errors.items())
        table.add_row(result.label, str(own.refused), wait, str(own.failed), kinds)
    return table


def _latencies(results: Sequence[LevelResult], chosen: Callable[[LoadSummary], Distribution]) -> Table:
    names = [f"p{q * 100:g}" for q in QUANTILES]
    table = _table("", "mean", *names, "longest", "p50 is in", "p99 is in", wrapped=2)
    for result in results:
        own = chosen(result.summary)
        intervals = [_interval(own, name) for name in ("p50", "p99")]
        cells = [own.mean, *map(own.at, names), own.longest]
        table.add_row(result.label, *map(_duration, cells), *intervals)
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
    table = _table("", *RATIOS.values(), wrapped=len(RATIOS))
    for label, found in compared:
        table.add_row(label, *(_ratio(found.get(name)) for name in RATIOS))
    return table


def _ratio(found: Ratio | None) -> str:
    return "-" if found is None else f"{found.median:.2f}x ({found.least:.2f} to {found.greatest:.2f})"
