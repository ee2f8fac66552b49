"""The engine under load, and what the server adds to it.

    python benchmarks/serving.py batch      # 16 running sequences to one at a time, no drafts
    python benchmarks/serving.py engine     # 1, 4 and 16 running sequences: no drafts and auto, their ratio
    python benchmarks/serving.py server     # the same load on the engine in this process and on `gemma-mtp serve`
    python benchmarks/serving.py prefix     # time to the first token of a prompt whose beginning is known
    python benchmarks/serving.py memory     # resident memory over 10,000 mixed requests; --server: the server's

Loads are closed loops of so many clients, but for `batch`, whose requests all wait in the engine's queue, so that as
many run as may. Sides take turns and begin in turn; a figure is the median over the repetitions, a ratio the median of
the repetitions' ratios, with the least and the greatest.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable

import gemma_mtp.cli.environment  # noqa: F401  isort: skip  (before PyTorch)

import argparse
import asyncio
import contextlib
import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine_load import Requests, greedy, held_out, mixed, serve_options, streamed_from_engine, to_engine, to_server
from machine import describe
from rich.console import Console
from rich.table import Table

from gemma_mtp import SamplingParams, load_pair
from gemma_mtp.backend.native import set_threads
from gemma_mtp.cpu_clock import CpuClock
from gemma_mtp.engine.pair import Pair
from gemma_mtp.engine.request import Request
from gemma_mtp.engine.settings import EngineSettings
from gemma_mtp.engine.thread import EngineThread
from gemma_mtp.measure.load import ClosedLoop, Extent, Reply, Send, run_load
from gemma_mtp.measure.load_client import connect, first_model
from gemma_mtp.measure.load_runs import LevelResult, Ratio, failed_share, measure_levels, ratios
from gemma_mtp.measure.load_server import own_server

PREFIX_TAIL = 32
#: readings of the resident memory after the first
READINGS = 20
MIXED_CLIENTS = 16
MEBIBYTE = 1 << 20

Content = dict[str, Any]


def measure_batch(pair: Pair, args: argparse.Namespace) -> Content:
    """Tokens a second without drafts by how many sequences run at a time, and over the first number's; the outputs must
    be the same."""
    requests = greedy(held_out(pair, args.prompt_tokens), args.max_tokens, 0)
    speeds: dict[int, list[float]] = {running: [] for running in args.sequences}
    outputs: dict[int, list[list[int]]] = {}
    with contextlib.ExitStack() as stack:
        engines = {}
        for running in args.sequences:
            settings = EngineSettings(running, max_waiting=args.requests * running, prefix_reuse=False)
            engines[running] = stack.enter_context(EngineThread(pair, settings))
        for repeat in range(args.repeats + 1):  # the first warms up
            for running in list(args.sequences)[:: -1 if repeat % 2 else 1]:
                started = time.perf_counter()
                generations = [engines[running].submit(requests(i)) for i in range(args.requests * running)]
                outputs[running] = [generation.wait().token_ids for generation in generations]
                taken = time.perf_counter() - started
                if repeat:
                    speeds[running].append(sum(map(len, outputs[running])) / taken)
    first = args.sequences[0]
    return {
        "tokens_per_second": speeds,
        "ratios_to_first": {
            running: asdict(Ratio.of([a / b for a, b in zip(own, speeds[first], strict=True)]))
            for running, own in speeds.items()
        },
        "same_outputs": {
            running: all(a == b for a, b in zip(own, outputs[first], strict=False)) for running, own in outputs.items()
        },
    }


def measure_engine(pair: Pair, args: argparse.Namespace) -> Content:
    """Tokens a second without drafts and with `auto`, by running sequences; the outputs must be the same."""
    prompts, results, same = held_out(pair, args.prompt_tokens), list[LevelResult](), {}
    for sequences in args.sequences:
        # prompts come again, and are to be read anew
        with EngineThread(pair, EngineSettings(max_running=sequences, prefix_reuse=False)) as engine:
            outputs: dict[str, dict[int, list[int]]] = {"no drafts": {}, "auto": {}}
            sides = {
                "no drafts": _side(engine, greedy(prompts, args.max_tokens, 0), outputs["no drafts"]),
                "auto": _side(engine, greedy(prompts, args.max_tokens, "auto"), outputs["auto"]),
            }
            extent = Extent(args.requests * sequences, warmup=sequences)
            results += asyncio.run(measure_levels([ClosedLoop(sequences)], sides, extent, args.repeats))
        same[str(sequences)] = outputs["no drafts"] == outputs["auto"]
    return {**_levels(results), "same_outputs": same}


def _side(engine: EngineThread, requests: Requests, outputs: dict[int, list[int]]) -> Callable[[int], Send]:
    send = to_engine(engine, requests, outputs.__setitem__)
    return lambda run: send


def measure_server(pair: Pair, args: argparse.Namespace) -> Content:
    """Tokens a second of one load on the engine in this process and on a server, which is another process; both read
    whole or as streams."""
    prompts = held_out(pair, args.prompt_tokens)
    options = [*serve_options(args), "--no-prefix-reuse", "--max-running", str(max(args.sequences))]
    requests = greedy(prompts, args.max_tokens, "auto")

    async def measured(engine: EngineThread, url: str) -> list[LevelResult]:
        async with connect(url) as client:
            model = await first_model(client)
            sides = {
                "engine": lambda run: (to_engine if args.whole else streamed_from_engine)(engine, requests),
                "server": lambda run: to_server(client, model, requests, args.whole),
            }
            found = []
            for sequences in args.sequences:
                extent = Extent(args.requests * sequences, warmup=sequences)
                found += await measure_levels([ClosedLoop(sequences)], sides, extent, args.repeats)
            return found

    settings = EngineSettings(max_running=max(args.sequences), prefix_reuse=False)
    with own_server(options) as server, EngineThread(pair, settings) as engine:
        clock = CpuClock([os.getpid(), server.process.pid])
        results = asyncio.run(measured(engine, server.url))
        elsewhere = clock.share_elsewhere()
    if failed_share(results):
        raise SystemExit(f"requests to the server failed: {[result.summary.errors for result in results]}")
    return {"cpu_share_elsewhere": elsewhere, **_levels(results)}


def _levels(results: Sequence[LevelResult]) -> Content:
    """Both sides of every level, and the second over the first."""
    levels = []
    for first, second in zip(results[::2], results[1::2], strict=True):
        sides = {result.side: result.to_dict(with_records=False) for result in (first, second)}
        found = {name: asdict(ratio) for name, ratio in ratios(first, second).items()}
        levels.append({"clients": first.shape.clients, "sides": sides, "ratios": found})  # type: ignore[union-attr]
    return {"levels": levels}


def measure_prefix(pair: Pair, args: argparse.Namespace) -> Content:
    """Seconds to the first token of a prompt, of another with the same beginning, and of one with another beginning."""
    config = pair.target.config
    limit = config.max_position_embeddings - PREFIX_TAIL - 2
    if args.prefix_tokens > limit:
        raise SystemExit(f"--prefix-tokens is {args.prefix_tokens}, but the target takes at most {limit}.")
    draw = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {"first": [], "same beginning": [], "another beginning": []}
    reused = []

    def tokens(count: int) -> list[int]:
        return draw.integers(3, config.vocab_size, count).tolist()

    with EngineThread(pair, EngineSettings(max_running=1)) as engine:
        for repeat in range(args.repeats + 1):  # the first warms up
            known, other = tokens(args.prefix_tokens), tokens(args.prefix_tokens)
            turn = [("first", known), ("same beginning", known)]
            turn.insert(2 * (repeat % 2), ("another beginning", other))
            for name, beginning in turn:
                before = engine.stats().prefix_hit_tokens
                request = Request([*beginning, *tokens(PREFIX_TAIL)], SamplingParams(max_tokens=2, ignore_eos=True))
                started = time.perf_counter()
                generation = engine.submit(request)
                next(iter(generation))
                taken = time.perf_counter() - started
                generation.wait()
                if repeat:
                    seconds[name].append(taken)
                    reused += [engine.stats().prefix_hit_tokens - before] if name == "same beginning" else []
    compared = {
        name: [own / first for own, first in zip(seconds[name], seconds["first"], strict=True)]
        for name in list(seconds)[1:]
    }
    return {
        "prefix_tokens": args.prefix_tokens,
        "tail_tokens": PREFIX_TAIL,
        "reused_tokens": reused,
        "seconds": seconds,
        "ratios_to_first": {name: asdict(Ratio.of(own)) for name, own in compared.items()},
    }


def measure_memory(pair: Pair, args: argparse.Namespace) -> Content:
    """Resident memory of the engine's process, or the server's, from the end of the warm-up to that of the requests."""
    requests = mixed(held_out(pair))
    if args.server:
        with own_server(serve_options(args)) as server:
            content = asyncio.run(_served_memory(server.url, server.process.pid, requests, args))
        return {"cpu_share_elsewhere": None, **content}  # decides nothing here
    with EngineThread(pair, EngineSettings(max_running=MIXED_CLIENTS)) as engine:
        send = to_engine(engine, requests, cancelled=lambda number: number % 16 == 0, at_once=True)
        return asyncio.run(_memory(send, os.getpid(), args))


async def _served_memory(url: str, process: int, requests: Requests, args: argparse.Namespace) -> Content:
    async with connect(url) as client:
        return await _memory(to_server(client, await first_model(client), requests), process, args)


def _later(send: Send, offset: int, number: int) -> Awaitable[Reply | Callable[[], Reply]]:
    return send(offset + number)


async def _memory(send: Send, process: int, args: argparse.Namespace) -> Content:
    readings: list[tuple[int, int]] = []
    done = 0
    for size in (args.warmup, *np.diff(np.linspace(0, args.requests, READINGS + 1).astype(int)).tolist()):
        offset = done
        records = await run_load(ClosedLoop(MIXED_CLIENTS), functools.partial(_later, send, offset), Extent(size))
        failed = [record.reply.error for record in records if not record.completed]
        if failed:
            raise SystemExit(f"{len(failed)} requests failed: {set(failed)}")
        del records
        done += size
        gc.collect()
        readings.append((done, resident_bytes(process)))
    numbers, resident = np.array(readings, dtype=float).T
    later = len(numbers) // 2
    return {
        "warmup": args.warmup,
        "requests": args.requests,
        "process": "server" if args.server else "engine",
        "readings": readings,
        "growth_bytes": int(resident[-1] - resident[0]),
        "slope_bytes_per_request": float(np.polyfit(numbers[later:], resident[later:], 1)[0]),
    }


def resident_bytes(process: int) -> int:
    """Of a process (Linux)."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def show_batch(content: Content) -> Table:
    table = _table("running", "tokens/s", "to the first", "same outputs")
    for running, speeds in content["tokens_per_second"].items():
        same = "yes" if content["same_outputs"][running] else "NO"
        ratio = _ratio(content["ratios_to_first"][running])
        table.add_row(str(running), f"{statistics.median(speeds):.1f}", ratio, same)
    return table


def show_levels(content: Content) -> Table:
    table = _table(
        "clients", *content["levels"][0]["sides"], "tokens/s", "time to first token", "time per token",
        "drafts a token", "same",
    )  # fmt: skip
    for level in content["levels"]:
        speeds = [
            statistics.median(own["output_tokens_per_second"] for own in side["repeats"])
            for side in level["sides"].values()
        ]
        found = [
            _ratio(level["ratios"].get(name))
            for name in ("output_tokens_per_second", "time_to_first_token", "time_per_output_token")
        ]
        drafts = [_drafts_a_token(side) for side in level["sides"].values()]
        same = content.get("same_outputs", {}).get(str(level["clients"]))
        said = "" if same is None else "yes" if same else "NO"
        table.add_row(str(level["clients"]), *(f"{speed:.1f}" for speed in speeds), *found, ", ".join(drafts), said)
    return table


def _drafts_a_token(side: Content) -> str:
    return f"{(side['accepted_drafts'] + side['rejected_drafts']) / side['output_tokens']:.3f}"


def show_prefix(content: Content) -> Table:
    table = _table("prompt", "ms to the first token", "to the first prompt", "tokens reused")
    for name, seconds in content["seconds"].items():
        reused = f"{statistics.median(content['reused_tokens']):g}" if name == "same beginning" else ""
        ratio = _ratio(content["ratios_to_first"].get(name))
        table.add_row(name, f"{1000 * statistics.median(seconds):.1f}", ratio, reused)
    return table


def show_memory(content: Content) -> Table:
    table = _table("requests", "resident, MiB", "since the warm-up")
    first = content["readings"][0][1]
    for number, resident in content["readings"]:
        table.add_row(str(number), f"{resident / MEBIBYTE:.1f}", f"{(resident - first) / MEBIBYTE:+.1f}")
    table.add_row("slope", f"{content['slope_bytes_per_request']:+.0f} bytes", "a request, later half")
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    return table


def _ratio(found: dict[str, Any] | None) -> str:
    return "" if found is None else str(Ratio(**found))


MEASUREMENTS: dict[str, tuple[Callable[[Pair, argparse.Namespace], Content], Callable[[Content], Table]]] = {
    "batch": (measure_batch, show_batch),
    "engine": (measure_engine, show_levels),
    "server": (measure_server, show_levels),
    "prefix": (measure_prefix, show_prefix),
    "memory": (measure_memory, show_memory),
}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--target", type=Path, help="a checkpoint instead of the bundled pair, with --drafter")
    common.add_argument("--drafter", type=Path)
    common.add_argument("--quantize")
    common.add_argument("--threads", type=int, default=torch.get_num_threads())
    common.add_argument("--json", type=Path, help="write the figures to this file too")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="measurement", required=True)
    for name in ("batch", "engine", "server"):
        command = commands.add_parser(name, parents=[common])
        command.add_argument("--sequences", type=int, nargs="+", default=[1, 4, 16])
        command.add_argument("--requests", type=int, default=8, help="of each client, or running sequence")
        command.add_argument("--prompt-tokens", type=int, default=32, help="of a prompt, at most")
        command.add_argument("--max-tokens", type=int, default=128)
        command.add_argument("--repeats", type=int, default=5)
    command.add_argument("--whole", action="store_true", help="read answers at once, not as streams")
    command = commands.add_parser("prefix", parents=[common])
    command.add_argument("--prefix-tokens", type=int, default=1500)
    command.add_argument("--repeats", type=int, default=9)
    command = commands.add_parser("memory", parents=[common])
    command.add_argument("--requests", type=int, default=10_000)
    # prefix reuse goes on to blocks of the pool that were never written until all were: after some 1,500 requests
    command.add_argument("--warmup", type=int, default=2_000)
    command.add_argument("--server", action="store_true", help="of a `gemma-mtp serve`, instead of the engine here")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    set_threads(args.threads)
    pair = load_pair(args.target, args.drafter, device="cpu", quantize=args.quantize)
    measure, show = MEASUREMENTS[args.measurement]
    clock = CpuClock([os.getpid()])
    content = measure(pair, args)
    options = {name: value for name, value in vars(args).items() if name != "json"}
    content = {**describe(), "options": options, "cpu_share_elsewhere": clock.share_elsewhere(), **content}
    if args.json is not None:
        args.json.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
    console = Console(width=160)
    console.print(show(content), highlight=False)
    said = ", ".join(f"{name} {value}" for name, value in describe().items())
    console.print(f"{args.measurement} of {args.target or 'the bundled pair'}; {said}", highlight=False, soft_wrap=True)
    if content["cpu_share_elsewhere"] is not None:
        share = f"{content['cpu_share_elsewhere']:.0%}"
        console.print(f"other processes took {share} of the cores' time meanwhile", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main(parse())
