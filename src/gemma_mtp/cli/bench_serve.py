"""`gemma-mtp bench-serve`."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from gemma_mtp.cli import bench_serve_report as shown
from gemma_mtp.cli.acceptance import spread
from gemma_mtp.cli.console import console
from gemma_mtp.cli.generate import parse_draft_tokens
from gemma_mtp.cli.options import DATA, DRAFTING, OUTPUT, SAMPLING, option
from gemma_mtp.cli.progress import progress
from gemma_mtp.datasets import Example
from gemma_mtp.engine.pair import bundled_directory
from gemma_mtp.errors import DataError, SamplingError, ServerError
from gemma_mtp.json_files import write_json
from gemma_mtp.measure.load import ClosedLoop, Extent, OpenLoop, Send, Shape
from gemma_mtp.measure.load_plot import plot_load
from gemma_mtp.measure.load_requests import RequestMix
from gemma_mtp.measure.load_runs import LevelResult, Ratio, failed_share, measure_levels, ratios
from gemma_mtp.measure.plot import check_plot

if TYPE_CHECKING:
    import httpx

Number = TypeVar("Number", int, float)

SERVER, LOAD = "Server", "Load"
REQUESTS = 100
FAILED = 1


@dataclass(frozen=True)
class Plan:
    """What is sent: how, what, and how often."""

    shapes: Sequence[Shape]
    sides: dict[str, dict[str, Any]]
    extent: Extent
    repeats: int
    seed: int
    max_in_flight: int | None
    timeout: float
    examples: Sequence[Example]
    output_tokens: tuple[int, int]
    settings: dict[str, Any]
    shared_prefix_tokens: int
    fresh: bool


@dataclass(frozen=True)
class Measured:
    """What came of it, on a server's model."""

    model: str
    results: list[LevelResult]

    @property
    def compared(self) -> list[tuple[str, dict[str, Ratio]]]:
        """Of every level with two sides: the second over the first."""
        levels: dict[Shape, list[LevelResult]] = {}
        for result in self.results:
            levels.setdefault(result.shape, []).append(result)
        return [(own[0].shape.label, ratios(*own)) for own in levels.values() if len(own) == 2]


def bench_serve(
    data: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Prompts: JSON lines with text, prompt or messages, plain text, source files, or directories of them;"
            " texts are completed, prompts and messages sent as chats. Default: the bundled pair's held-out Python.",
        ),
    ] = None,
    url: Annotated[
        str | None,
        option(
            "--url",
            help="A running server with OpenAI's API, such as http://127.0.0.1:8000; without it, `gemma-mtp serve` is"
            " started on a free port, and stopped at the end.",
            panel=SERVER,
        ),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", help="Sent as a bearer token.", envvar="GEMMA_MTP_API_KEY", rich_help_panel=SERVER),
    ] = None,
    model: Annotated[
        str | None, option("--model", help="The model to ask for; default: the server's first.", panel=SERVER)
    ] = None,
    serve_options: Annotated[
        str,
        option(
            "--serve-options",
            help="Options of the `gemma-mtp serve` that is started, such as '--target DIR --max-running 32'.",
            panel=SERVER,
        ),
    ] = "",
    rate: Annotated[
        str | None,
        option("--rate", help="Open loop: requests a second, one load after the other, such as 1,2,4,8.", panel=LOAD),
    ] = None,
    clients: Annotated[
        str | None,
        option(
            "--clients",
            help="Closed loop: so many clients, each with one request under way; such as 1,4,16. Default, without"
            " --rate: 1.",
            panel=LOAD,
        ),
    ] = None,
    fixed_intervals: Annotated[
        bool, option("--fixed-intervals", help="With --rate: equal gaps instead of Poisson arrivals.", panel=LOAD)
    ] = False,
    requests: Annotated[
        int | None,
        option(
            "--requests", help=f"Requests of each load; default: {REQUESTS}, or what --duration allows.", panel=LOAD
        ),
    ] = None,
    duration: Annotated[
        float | None, option("--duration", help="Seconds for which each load sends requests.", panel=LOAD)
    ] = None,
    warmup: Annotated[
        int, option("--warmup", help="Requests at the beginning of each load that are not counted.", panel=LOAD)
    ] = 4,
    repeats: Annotated[
        int, option("--repeats", help="Runs of each load; the sides of --compare-drafting take turns.", panel=LOAD)
    ] = 1,
    max_in_flight: Annotated[
        int | None,
        option(
            "--max-in-flight",
            help="With --rate: at most so many requests under way; others wait, and their wait counts.",
            panel=LOAD,
        ),
    ] = None,
    timeout: Annotated[
        float, option("--timeout", help="Seconds after which a request has failed.", panel=LOAD)
    ] = 600.0,
    seed: Annotated[
        int, option("--seed", help="Of arrivals, order of prompts, lengths, and sampling.", panel=LOAD)
    ] = 0,
    pattern: Annotated[
        str, option("--pattern", help="Which files of a directory to read, such as '*.py'.", panel=DATA)
    ] = "*",
    limit: Annotated[
        int, option("--limit", help="At most so many prompts, spread evenly over the data.", panel=DATA)
    ] = 1000,
    shared_prefix_tokens: Annotated[
        int,
        option(
            "--shared-prefix-tokens",
            help="Begin all prompts with the same text of about so many tokens (needs the server's /tokenize).",
            panel=DATA,
        ),
    ] = 0,
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh-prompts/--same-prompts",
            help="Whether each prompt gets a first line of its own (after a shared prefix), so that the server finds"
            " nothing but that prefix among earlier prompts.",
            rich_help_panel=DATA,
        ),
    ] = True,
    output_tokens: Annotated[
        str, option("--output-tokens", "-n", help="Tokens to ask for: a number, or a range.", panel=SAMPLING)
    ] = "128",
    temperature: Annotated[float, option("--temperature", "-t", help="0 is greedy.", panel=SAMPLING)] = 0.0,
    top_p: Annotated[float | None, option("--top-p", help="Sent where given.", panel=SAMPLING)] = None,
    top_k: Annotated[
        int | None, option("--top-k", help="Sent where given; an extension of OpenAI's API.", panel=SAMPLING)
    ] = None,
    ignore_eos: Annotated[
        bool,
        typer.Option(
            "--ignore-eos/--stop-at-eos",
            help="Whether outputs have just the length asked for; sends the extension ignore_eos, which not every"
            " server has.",
            rich_help_panel=SAMPLING,
        ),
    ] = True,
    draft_tokens: Annotated[
        str | None,
        option("--draft-tokens", "-k", help="Drafts a round, auto or a number, sent as our extension.", panel=DRAFTING),
    ] = None,
    compare_drafting: Annotated[
        bool,
        option(
            "--compare-drafting",
            help="Play each load without drafts and with them (--draft-tokens, default auto), in turn.",
            panel=DRAFTING,
        ),
    ] = False,
    as_json: Annotated[Path | None, option("--json", help="Write all figures to this file.", panel=OUTPUT)] = None,
    records: Annotated[
        bool, option("--records", help="With --json: every request's times and counts too.", panel=OUTPUT)
    ] = False,
    plot: Annotated[
        Path | None,
        option("--plot", help="Draw latencies and throughput to this file, .png, .svg or .pdf.", panel=OUTPUT),
    ] = None,
    max_failed: Annotated[
        float,
        option(
            "--max-failed",
            help="Exit with 1 where more than this share of requests failed (or none was completed); refusals with"
            " Retry-After are no failures.",
            panel=OUTPUT,
        ),
    ] = 0.01,
) -> None:
    """Load a server with requests and measure latencies, throughput, failures and acceptance by streaming."""
    check_plot(plot)
    if as_json is not None and as_json.is_dir():
        raise DataError(f"--json is {as_json}, which is a directory; name a file.")
    _check(limit=limit, repeats=repeats, requests=requests, max_in_flight=max_in_flight, warmup=warmup,
           shared_prefix_tokens=shared_prefix_tokens, duration=duration, timeout=timeout, seed=seed)  # fmt: skip
    if not 0 <= max_failed <= 1:
        raise SamplingError(f"--max-failed is {max_failed:g}, but must be a share from 0 to 1.")
    if url is not None and serve_options:
        raise ServerError("--serve-options are for a server that is started here; leave them out with --url.")
    plan = Plan(
        shapes=_shapes(rate, clients, fixed_intervals),
        sides=_sides(draft_tokens, compare_drafting),
        extent=Extent(REQUESTS if requests is None and duration is None else requests, duration, warmup),
        repeats=repeats,
        seed=seed,
        max_in_flight=max_in_flight,
        timeout=timeout,
        examples=spread(data or [bundled_directory() / "heldout_prompts.jsonl"], pattern, limit),
        output_tokens=_range(output_tokens),
        settings=_settings(temperature, top_p, top_k, ignore_eos),
        shared_prefix_tokens=shared_prefix_tokens,
        fresh=fresh,
    )
    if missing := [name for name in ("httpx", "httpx_aiohttp") if importlib.util.find_spec(name) is None]:
        raise ServerError(
            f"bench-serve needs {missing[0]}, which is not installed; pip install 'gemma-mtp[bench-serve]'."
        )
    with contextlib.ExitStack() as stack, progress("starting the server") as say:
        if url is None:
            from gemma_mtp.measure.load_server import own_server

            address = stack.enter_context(own_server(_words(serve_options))).url
        else:
            address = url
        measured = asyncio.run(_measure(plan, address, api_key, model, say))
    if as_json is not None:
        write_json(as_json, _content(plan, measured, url, serve_options, records))
    if plot is not None:
        plot_load(measured.results, plot, measured.model)
    shown.print_report(console(), measured.results, measured.compared)
    if failed_share(measured.results) > max_failed:
        raise typer.Exit(FAILED)


async def _measure(
    plan: Plan, url: str, api_key: str | None, model: str | None, say: Callable[[str], object]
) -> Measured:
    from gemma_mtp.measure.load_client import connect, first_model, shared_prefix

    async with connect(url, api_key) as client:
        name = await first_model(client) if model is None else model
        prefix = ""
        if plan.shared_prefix_tokens:
            text = "\n\n".join(str(example.content) for example in plan.examples)
            prefix = await shared_prefix(client, name, text, plan.shared_prefix_tokens)
        mix = RequestMix(plan.examples, name, plan.output_tokens, plan.settings, prefix, plan.fresh, plan.seed)
        sides = {side: _sender(client, mix, extensions, plan.timeout) for side, extensions in plan.sides.items()}
        results = await measure_levels(
            plan.shapes, sides, plan.extent, plan.repeats, plan.seed, plan.max_in_flight, say
        )
        return Measured(name, results)


def _sender(
    client: httpx.AsyncClient, mix: RequestMix, extensions: dict[str, Any], timeout: float
) -> Callable[[int], Send]:
    from gemma_mtp.measure.load_client import stream

    return lambda run: lambda number: stream(client, mix.ask(run, number, **extensions), timeout)


def _check(**values: float | None) -> None:
    """Of options by their names: those of `least` 0 may be 0, the others must be more."""
    for name, value in values.items():
        may_be_zero = name in ("warmup", "shared_prefix_tokens", "seed")
        if value is not None and not (value >= 0 if may_be_zero else value > 0):
            least = "0 or more" if may_be_zero else "more than 0"
            raise SamplingError(f"--{name.replace('_', '-')} is {value:g}, but must be {least}.")


def _shapes(rate: str | None, clients: str | None, fixed_intervals: bool) -> list[Shape]:
    if rate is not None and clients is not None:
        raise SamplingError("--rate and --clients are loads of two kinds; give one of them.")
    if rate is not None:
        return [OpenLoop(value, fixed_intervals) for value in _numbers("--rate", rate, float, "0.5,1,2")]
    if fixed_intervals:
        raise SamplingError("--fixed-intervals is for requests that come at a rate; give --rate.")
    return [ClosedLoop(value) for value in _numbers("--clients", "1" if clients is None else clients, int, "1,4,16")]


def _numbers(name: str, text: str, kind: Callable[[str], Number], example: str) -> list[Number]:
    try:
        values = [kind(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(0 < value < float("inf") for value in values):
        raise SamplingError(f"{name} is {text!r}, but must be numbers above 0, such as {example}.")
    return list(dict.fromkeys(values))


def _range(text: str) -> tuple[int, int]:
    parts = text.split("-")
    if not all(part.isdecimal() for part in parts) or len(parts) > 2 or not 0 < int(parts[0]) <= int(parts[-1]):
        raise SamplingError(f"--output-tokens is {text!r}, but must be a number or a range, such as 64 or 32-128.")
    return int(parts[0]), int(parts[-1])


def _sides(draft_tokens: str | None, compare: bool) -> dict[str, dict[str, Any]]:
    """Label of each side, and what its requests say beside the others'."""
    given = None if draft_tokens is None else parse_draft_tokens(draft_tokens)
    if not compare:
        return {"": {} if given is None else {"draft_tokens": given}}
    if given == 0:
        raise SamplingError("--draft-tokens is 0, which --compare-drafting compares with; give auto or another number.")
    drafts = "auto" if given is None else given
    return {"no drafts": {"draft_tokens": 0}, f"drafts {drafts}": {"draft_tokens": drafts}}


def _settings(temperature: float, top_p: float | None, top_k: int | None, ignore_eos: bool) -> dict[str, Any]:
    """Fields of every request's body; what is out of its range is the server's to refuse."""
    optional = {"top_p": top_p, "top_k": top_k, "ignore_eos": ignore_eos or None}
    return {"temperature": temperature, **{name: value for name, value in optional.items() if value is not None}}


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ServerError(f"--serve-options is {text!r}, which can not be split into words ({error}).") from None


def _content(plan: Plan, measured: Measured, url: str | None, serve_options: str, records: bool) -> dict[str, Any]:
    """What `--json` writes; times in seconds."""
    return {
        "url": url,
        "serve_options": serve_options if url is None else None,
        "model": measured.model,
        "prompts": len(plan.examples),
        "output_tokens": list(plan.output_tokens),
        "settings": plan.settings,
        "shared_prefix_tokens": plan.shared_prefix_tokens,
        "fresh_prompts": plan.fresh,
        "extent": asdict(plan.extent),
        "repeats": plan.repeats,
        "seed": plan.seed,
        "max_in_flight": plan.max_in_flight,
        "timeout": plan.timeout,
        "levels": [result.to_dict(records) for result in measured.results],
        "compared": [
            {"label": label, "ratios": {name: asdict(ratio) for name, ratio in found.items()}}
            for label, found in measured.compared
        ],
    }
