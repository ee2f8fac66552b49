"""`gemma-mtp bench-serve`."""

from __future__ import annotations

import importlib.util

from gemma_mtp.cli.bench_serve_options import (
    DraftingOptions,
    LoadOptions,
    OutputOptions,
    PromptOptions,
    RequestOptions,
    ServerOptions,
    check_numbers,
)
from gemma_mtp.cli.option_groups import grouped
from gemma_mtp.errors import ServerError, missing_extra


@grouped
def bench_serve(
    server: ServerOptions,
    load: LoadOptions,
    prompts: PromptOptions,
    asked: RequestOptions,
    drafting: DraftingOptions,
    output: OutputOptions,
) -> None:
    """Load a server with requests, and measure latencies, throughput, failures and acceptance."""
    output.check()
    check_numbers(limit=prompts.limit, repeats=load.repeats, requests=load.requests, max_in_flight=load.max_in_flight,
                  warmup=load.warmup, shared_prefix_tokens=prompts.shared_prefix_tokens, duration=load.duration,
                  timeout=load.timeout, seed=load.seed)  # fmt: skip
    server.check()
    load.shapes(), drafting.sides()  # which refuse what can not be played
    asked.lengths()
    if missing := [name for name in ("httpx", "httpx_aiohttp") if importlib.util.find_spec(name) is None]:
        raise ServerError(missing_extra("bench-serve", missing[0], "bench-serve"))

    from gemma_mtp.cli import bench_serve_run

    bench_serve_run.bench_serve(server, load, prompts, asked, drafting, output)
