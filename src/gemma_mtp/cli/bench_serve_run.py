"""What `gemma-mtp bench-serve` does: play the loads, and report."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import typer

from gemma_mtp.cli import bench_serve_report as shown
from gemma_mtp.cli import options
from gemma_mtp.cli.bench_serve import (
    DraftingOptions,
    LoadOptions,
    OutputOptions,
    PromptOptions,
    RequestOptions,
    ServerOptions,
)
from gemma_mtp.cli.console import console
from gemma_mtp.cli.progress import progress
from gemma_mtp.datasets import Example
from gemma_mtp.json_files import write_json
from gemma_mtp.measure.figure import measured_on
from gemma_mtp.measure.load import Send, Shape
from gemma_mtp.measure.load_client import connect, first_model, shared_prefix, stream
from gemma_mtp.measure.load_plot import plot_load
from gemma_mtp.measure.load_requests import RequestMix
from gemma_mtp.measure.load_runs import LevelResult, Ratio, failed_share, measure_levels, ratios
from gemma_mtp.measure.load_server import own_server

#: exit code where more requests failed than may
FAILED = 1


@dataclass(frozen=True)
class Plan:
    """What is sent: how, what, and how often."""

    load: LoadOptions
    prompts: PromptOptions
    asked: RequestOptions
    drafting: DraftingOptions
    examples: Sequence[Example]


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
    """Play the loads, write what was asked for, and print the report."""
    plan = Plan(load, prompts, asked, drafting, prompts.examples(options.sources_of(prompts.data)))
    with contextlib.ExitStack() as stack, progress("starting the server") as say:
        address = server.url or stack.enter_context(own_server(server.words())).url
        measured = asyncio.run(_measure(plan, address, server.api_key, server.model, say))
    if output.as_json is not None:
        write_json(output.as_json, _content(plan, measured, server, output.records))
    if output.plot is not None:
        plot_load(measured.results, output.plot, "Latency and throughput of a server", _subtitle(measured, server))
    shown.print_report(console(), measured.results, measured.compared)
    if failed_share(measured.results) > output.max_failed:
        raise typer.Exit(FAILED)


def _subtitle(measured: Measured, server: ServerOptions) -> str:
    """Of a picture: of a server elsewhere nobody knows the machine."""
    if server.url is not None:
        return measured_on(measured.model, f"asked at {server.url}")
    import torch

    from gemma_mtp.backend.processor import processor

    return measured_on(measured.model, processor(torch.device("cpu")))


async def _measure(
    plan: Plan, url: str, api_key: str | None, model: str | None, say: Callable[[str], object]
) -> Measured:
    load, shared = plan.load, plan.prompts.shared_prefix_tokens
    async with connect(url, api_key) as client:
        name = await first_model(client) if model is None else model
        prefix = ""
        if shared:
            text = "\n\n".join(str(example.content) for example in plan.examples)
            prefix = await shared_prefix(client, name, text, shared)
        mix = RequestMix(
            plan.examples, name, plan.asked.lengths(), plan.asked.settings(), prefix, plan.prompts.fresh, load.seed
        )

        def sender(more: dict[str, Any]) -> Callable[[int], Send]:
            return lambda run: lambda number: stream(client, mix.ask(run, number, **more), load.timeout)

        sides = {side: sender(more) for side, more in plan.drafting.sides().items()}
        results = await measure_levels(
            load.shapes(), sides, load.extent(), load.repeats, load.seed, load.max_in_flight, say
        )
        return Measured(name, results)


def _content(plan: Plan, measured: Measured, server: ServerOptions, records: bool) -> dict[str, Any]:
    """What `--json` writes; times in seconds."""
    return {
        "url": server.url,
        "serve_options": server.serve_options if server.url is None else None,
        "model": measured.model,
        "prompts": len(plan.examples),
        "output_tokens": list(plan.asked.lengths()),
        "settings": plan.asked.settings(),
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
