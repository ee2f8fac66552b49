"""`gemma-mtp bench-serve`."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from gemma_mtp.cli import bench_serve_report as shown
from gemma_mtp.cli import options
from gemma_mtp.cli.console import console
from gemma_mtp.cli.option_groups import argument, group, option
from gemma_mtp.cli.options import DATA, DRAFTING, OUTPUT, SAMPLING
from gemma_mtp.cli.progress import progress
from gemma_mtp.datasets import Example
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


@group(SERVER)
class ServerOptions:
    """The server that is loaded."""

    url: str | None = option(
        None,
        "A running server with OpenAI's API, such as http://127.0.0.1:8000; without it, `gemma-mtp serve` is"
        " started on a free port, and stopped at the end.",
    )
    api_key: str | None = option(None, "Sent as a bearer token.", envvar="GEMMA_MTP_API_KEY")
    model: str | None = option(None, "The model to ask for; default: the server's first.")
    serve_options: str = option(
        "", "Options of the `gemma-mtp serve` that is started, such as '--target DIR --max-running 32'."
    )

    def check(self) -> None:
        if self.url is not None and self.serve_options:
            raise ServerError("--serve-options are for a server that is started here; leave them out with --url.")


@group(LOAD)
class LoadOptions:
    """When requests are sent, and how many."""

    rate: str | None = option(None, "Open loop: requests a second, one load after the other, such as 1,2,4,8.")
    clients: str | None = option(
        None,
        "Closed loop: so many clients, each with one request under way; such as 1,4,16. Default, without --rate: 1.",
    )
    fixed_intervals: bool = option(False, "With --rate: equal gaps instead of Poisson arrivals.")
    requests: int | None = option(None, f"Requests of each load; default: {REQUESTS}, or what --duration allows.")
    duration: float | None = option(None, "Seconds for which each load sends requests.")
    warmup: int = option(4, "Requests at the beginning of each load that are not counted.")
    repeats: int = option(1, "Runs of each load; the sides of --compare-drafting take turns.")
    max_in_flight: int | None = option(
        None, "With --rate: at most so many requests under way; others wait, and their wait counts."
    )
    timeout: float = option(600.0, "Seconds after which a request has failed.")
    seed: int = option(0, "Of arrivals, order of prompts, lengths, and sampling.")

    def shapes(self) -> list[Shape]:
        if self.rate is not None and self.clients is not None:
            raise SamplingError("--rate and --clients are loads of two kinds; give one of them.")
        if self.rate is not None:
            return [OpenLoop(v, self.fixed_intervals) for v in _numbers("--rate", self.rate, float, "0.5,1,2")]
        if self.fixed_intervals:
            raise SamplingError("--fixed-intervals is for requests that come at a rate; give --rate.")
        clients = "1" if self.clients is None else self.clients
        return [ClosedLoop(value) for value in _numbers("--clients", clients, int, "1,4,16")]

    def extent(self) -> Extent:
        requests = REQUESTS if self.requests is None and self.duration is None else self.requests
        return Extent(requests, self.duration, self.warmup)


@group(DATA)
class PromptOptions(options.ExampleOptions):
    """Which prompts are sent, and what they begin with."""

    data: list[Path] | None = argument(
        None,
        "Prompts: JSON lines with text, prompt or messages, plain text, source files, or directories of them;"
        " texts are completed, prompts and messages sent as chats. Default: the bundled pair's held-out Python.",
    )
    limit: int = option(1000, options.LIMIT)
    shared_prefix_tokens: int = option(
        0, "Begin all prompts with the same text of about so many tokens (needs the server's /tokenize)."
    )
    fresh: bool = option(
        True,
        "Whether each prompt gets a first line of its own (after a shared prefix), so that the server finds"
        " nothing but that prefix among earlier prompts.",
        "--fresh-prompts/--same-prompts",
    )


@group(SAMPLING)
class RequestOptions:
    """What requests ask for."""

    output_tokens: str = option("128", "Tokens to ask for: a number, or a range.", "-n")
    temperature: float = option(0.0, "0 is greedy.", "-t")
    top_p: float | None = option(None, "Sent where given.")
    top_k: int | None = option(None, "Sent where given; an extension of OpenAI's API.")
    ignore_eos: bool = option(
        True,
        "Whether outputs have just the length asked for; sends the extension ignore_eos, which not every server has.",
        "--ignore-eos/--stop-at-eos",
    )

    def settings(self) -> dict[str, Any]:
        """Fields of every request's body; what is out of its range is the server's to refuse."""
        optional = {"top_p": self.top_p, "top_k": self.top_k, "ignore_eos": self.ignore_eos or None}
        given = {name: value for name, value in optional.items() if value is not None}
        return {"temperature": self.temperature, **given}


@group(DRAFTING)
class DraftingOptions:
    """How requests ask for drafts."""

    draft_tokens: str | None = option(None, "Drafts a round, auto or a number, sent as our extension.", "-k")
    compare_drafting: bool = option(
        False, "Play each load without drafts and with them (--draft-tokens, default auto), in turn."
    )

    def sides(self) -> dict[str, dict[str, Any]]:
        """Label of each side, and what its requests say beside the others'."""
        given = None if self.draft_tokens is None else options.parse_draft_tokens(self.draft_tokens)
        if not self.compare_drafting:
            return {"": {} if given is None else {"draft_tokens": given}}
        if given == 0:
            raise SamplingError(
                "--draft-tokens is 0, which --compare-drafting compares with; give auto or another number."
            )
        drafts = "auto" if given is None else given
        return {"no drafts": {"draft_tokens": 0}, f"drafts {drafts}": {"draft_tokens": drafts}}


@group(OUTPUT)
class OutputOptions:
    """What is written, and what counts as a failure."""

    as_json: Path | None = option(None, "Write all figures to this file.", "--json")
    records: bool = option(False, "With --json: every request's times and counts too.")
    plot: Path | None = option(None, "Draw latencies and throughput to this file, .png, .svg or .pdf.")
    max_failed: float = option(
        0.01,
        "Exit with 1 where more than this share of requests failed (or none was completed); refusals with"
        " Retry-After are no failures.",
    )

    def check(self) -> None:
        check_plot(self.plot)
        if self.as_json is not None and self.as_json.is_dir():
            raise DataError(f"--json is {self.as_json}, which is a directory; name a file.")
        if not 0 <= self.max_failed <= 1:
            raise SamplingError(f"--max-failed is {self.max_failed:g}, but must be a share from 0 to 1.")


@dataclass(frozen=True)
class Plan:
    """What is sent: how, what, and how often."""

    shapes: Sequence[Shape]
    sides: dict[str, dict[str, Any]]
    load: LoadOptions
    examples: Sequence[Example]
    output_tokens: tuple[int, int]
    settings: dict[str, Any]
    prompts: PromptOptions


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
    server: ServerOptions,
    load: LoadOptions,
    prompts: PromptOptions,
    asked: RequestOptions,
    drafting: DraftingOptions,
    output: OutputOptions,
) -> None:
    """Load a server with requests and measure latencies, throughput, failures and acceptance by streaming."""
    output.check()
    _check(limit=prompts.limit, repeats=load.repeats, requests=load.requests, max_in_flight=load.max_in_flight,
           warmup=load.warmup, shared_prefix_tokens=prompts.shared_prefix_tokens, duration=load.duration,
           timeout=load.timeout, seed=load.seed)  # fmt: skip
    server.check()
    plan = Plan(
        shapes=load.shapes(), sides=drafting.sides(), load=load, prompts=prompts,
        examples=prompts.examples(options.sources_of(prompts.data)), output_tokens=_range(asked.output_tokens),
        settings=asked.settings(),
    )  # fmt: skip
    if missing := [name for name in ("httpx", "httpx_aiohttp") if importlib.util.find_spec(name) is None]:
        raise ServerError(
            f"bench-serve needs {missing[0]}, which is not installed; pip install 'gemma-mtp[bench-serve]'."
        )
    with contextlib.ExitStack() as stack, progress("starting the server") as say:
        if server.url is None:
            from gemma_mtp.measure.load_server import own_server

            address = stack.enter_context(own_server(_words(server.serve_options))).url
        else:
            address = server.url
        measured = asyncio.run(_measure(plan, address, server.api_key, server.model, say))
    if output.as_json is not None:
        write_json(output.as_json, _content(plan, measured, server, output.records))
    if output.plot is not None:
        plot_load(measured.results, output.plot, measured.model)
    shown.print_report(console(), measured.results, measured.compared)
    if failed_share(measured.results) > output.max_failed:
        raise typer.Exit(FAILED)


async def _measure(
    plan: Plan, url: str, api_key: str | None, model: str | None, say: Callable[[str], object]
) -> Measured:
    from gemma_mtp.measure.load_client import connect, first_model, shared_prefix

    load, shared = plan.load, plan.prompts.shared_prefix_tokens
    async with connect(url, api_key) as client:
        name = await first_model(client) if model is None else model
        prefix = ""
        if shared:
            text = "\n\n".join(str(example.content) for example in plan.examples)
            prefix = await shared_prefix(client, name, text, shared)
        mix = RequestMix(plan.examples, name, plan.output_tokens, plan.settings, prefix, plan.prompts.fresh, load.seed)
        sides = {side: _sender(client, mix, extensions, load.timeout) for side, extensions in plan.sides.items()}
        results = await measure_levels(
            plan.shapes, sides, load.extent(), load.repeats, load.seed, load.max_in_flight, say
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


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ServerError(f"--serve-options is {text!r}, which can not be split into words ({error}).") from None


def _content(plan: Plan, measured: Measured, server: ServerOptions, records: bool) -> dict[str, Any]:
    """What `--json` writes; times in seconds."""
    return {
        "url": server.url,
        "serve_options": server.serve_options if server.url is None else None,
        "model": measured.model,
        "prompts": len(plan.examples),
        "output_tokens": list(plan.output_tokens),
        "settings": plan.settings,
        "shared_prefix_tokens": plan.prompts.shared_prefix_tokens,
        "fresh_prompts": plan.prompts.fresh,
        "extent": asdict(plan.load.extent()),
        "repeats": plan.load.repeats,
        "seed": plan.load.seed,
        "max_in_flight": plan.load.max_in_flight,
        "timeout": plan.load.timeout,
        "levels": [result.to_dict(records) for result in measured.results],
        "compared": [
            {"label": label, "ratios": {name: asdict(ratio) for name, ratio in found.items()}}
            for label, found in measured.compared
        ],
    }
