"""Where the time of a round goes: in the backend's operators, and outside of them (Python, tensors, text).

    python benchmarks/round_profile.py                      # the bundled pair, plain and with 4 drafts
    python benchmarks/round_profile.py --draft-tokens 0 2 8 --repeats 10

Every call of the operators is timed inside whole greedy generations; what is left of a round is overhead. Figures are
medians over the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

from decode import prompts_for
from machine import describe
from rich.console import Console
from rich.table import Table

from gemma_mtp import SamplingParams, load_pair
from gemma_mtp.backend.native import set_threads
from gemma_mtp.engine.pair import Pair


class Clock:
    """Seconds spent inside the wrapped calls since the last `take`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def wrap(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            started = time.perf_counter()
            result = call(*arguments)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
            return result

        return timed

    def take(self) -> dict[str, float]:
        taken, self.seconds = self.seconds, {}
        return taken


OPERATORS = ("draft", "target", "head")


def timed(pair: Pair, clock: Clock) -> None:
    """Have every call that greedy rounds make of the pair's backend timed."""
    for name, method in (("target", "forward"), ("head", "choose"), ("draft", "draft")):
        setattr(pair.backend, method, clock.wrap(name, getattr(pair.backend, method)))


def rounds(pair: Pair, clock: Clock, prompt: list[int], draft_tokens: int, max_tokens: int) -> list[dict[str, float]]:
    """Seconds of each whole round of one generation, and of its operators."""
    seconds: list[dict[str, float]] = []
    stream = pair.stream(prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True), draft_tokens=draft_tokens)
    next(stream, "")  # the prefill
    clock.take()
    before = stream.result.decode_seconds
    for _ in stream:
        now = stream.result.decode_seconds
        seconds.append({**clock.take(), "round": now - before})
        before = now
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draft-tokens", type=int, nargs="+", default=[0, 4])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantize")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    args.pair, args.token_ids = "bundled", False
    set_threads(args.threads)
    pair = load_pair(dtype=args.dtype, device="cpu", quantize=args.quantize)
    clock = Clock()
    timed(pair, clock)
    played: dict[int, list[dict[str, float]]] = {k: [] for k in args.draft_tokens}
    for repeat in range(args.repeats + 1):  # the first warms up
        for k in args.draft_tokens:
            for prompt in prompts_for(pair, args):
                found = rounds(pair, clock, prompt, k, args.max_tokens)
                played[k] += found if repeat else []
    table = Table(box=None, pad_edge=False)
    for column in ("drafts", "round, us", *(f"{name}, us" for name in OPERATORS), "outside, us", "outside"):
        table.add_column(column, justify="right")
    for k, found in played.items():
        whole = statistics.median(each["round"] for each in found)
        parts = [statistics.median(each.get(name, 0.0) for each in found) for name in OPERATORS]
        outside = statistics.median(each["round"] - sum(each.get(name, 0.0) for name in OPERATORS) for each in found)
        figures = [f"{seconds * 1e6:.0f}" for seconds in (whole, *parts, outside)]
        table.add_row(str(k), *figures, f"{outside / whole:.0%}")
    console = Console(width=110)
    console.print(table)
    console.print(", ".join(f"{name} {value}" for name, value in describe().items()), highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
