"""Whether `auto` drafts as well as the best fixed length, at several acceptances, in one run whose sides take turns.

    python benchmarks/auto_length.py                        # 112 M random parameters: fp32, bf16 and int8
    python benchmarks/auto_length.py --busy                 # the same beside a process that keeps one core busy
    python benchmarks/auto_length.py --weights bfloat16 --acceptance 0.8 --draft-tokens 2 3 4 6 --repeats 9

Every side decodes the same prompt to the same length. The first pass plays all fixed lengths; later passes play the
fastest of them and `auto`, in rotated order, and only they count. The figure of a row is the median over the passes of
the speed of `auto` to that of the fixed length with the best median; speeds are those of decoding, prefill excluded.
That length is picked after the fact from several, so that noise favours it.
"""

from __future__ import annotations

import gemma_mtp.cli.environment  # noqa: F401  isort: skip  (before PyTorch)

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from decode import _length as length
from machine import describe
from ours import unreliable
from pairs import cache_directory, written_pair
from rich.console import Console
from rich.table import Table

from gemma_mtp import SamplingParams, load_pair
from gemma_mtp.backend.native import set_threads
from gemma_mtp.cpu_clock import CpuClock
from gemma_mtp.decoding.draft_length import DraftTokens
from gemma_mtp.engine.pair import Pair

#: what is loaded for each name of weights
WEIGHTS: dict[str, dict[str, str]] = {
    "float32": {"dtype": "float32"}, "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "quantize": "int8"}, "int4": {"dtype": "bfloat16", "quantize": "int4"},
}  # fmt: skip
#: fixed lengths that go on after the first pass
FINALISTS = 3
BUSY = "while True: pass"


@contextlib.contextmanager
def neighbour(busy: bool) -> Iterator[None]:
    """With `busy`, a process that never rests, on the first core that this one may use."""
    if not busy:
        yield
        return
    core = min(os.sched_getaffinity(0))
    process = subprocess.Popen([sys.executable, "-c", f"import os; os.sched_setaffinity(0, {{{core}}})\n{BUSY}"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def speed(pair: Pair, drafts: DraftTokens, prompt: list[int], tokens: int) -> tuple[float, float, int]:
    """Tokens a second of decoding, drafts a round, and the number of rounds."""
    result = pair.generate(prompt, SamplingParams(max_tokens=tokens, ignore_eos=True), draft_tokens=drafts)
    rounds = result.decode_rounds
    return (len(result.token_ids) - 1) / result.decode_seconds, result.drafted / len(rounds), len(rounds)


def compared(pair: Pair, acceptance: float, args: argparse.Namespace) -> dict[str, object]:
    """One row: `auto` and the best fixed length at this acceptance."""
    prompt = list(range(3, 3 + args.prompt_tokens))
    # in a pass all sides meet the same luck, position by position; another pass has another
    sides: list[DraftTokens] = ["auto", *args.draft_tokens]
    passes = [pair if acceptance == 1 else unreliable(pair, acceptance, seed) for seed in range(args.repeats + 1)]
    first = {side: speed(passes[-1], side, prompt, args.tokens)[0] for side in sides}
    finalists = sorted(args.draft_tokens, key=lambda k: -first[k])[:FINALISTS]
    playing: list[DraftTokens] = ["auto", *finalists]
    speeds: dict[DraftTokens, list[float]] = {side: [] for side in playing}
    drafts = []
    for repeat in range(args.repeats):
        turn = repeat % len(playing)
        for side in [*playing[turn:], *playing[:turn]]:
            of_side, per_round, _ = speed(passes[repeat], side, prompt, args.tokens)
            speeds[side].append(of_side)
            drafts += [per_round] if side == "auto" else []
    best = max(finalists, key=lambda k: statistics.median(speeds[k]))
    ratios = [ours / theirs for ours, theirs in zip(speeds["auto"], speeds[best], strict=True)]
    return {
        "acceptance": acceptance, "best_fixed": best, "best_fixed_speed": statistics.median(speeds[best]),
        "auto_speed": statistics.median(speeds["auto"]), "auto_drafts": statistics.fmean(drafts),
        "first_auto_to_best": first["auto"] / first[best], "ratio": statistics.median(ratios),
        "lowest": min(ratios), "highest": max(ratios),
        "total_ratio": sum(1 / x for x in speeds[best]) / sum(1 / x for x in speeds["auto"]),
    }  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", default="small", choices=("small", "mid", "e2b"))
    parser.add_argument("--cache", type=Path, default=cache_directory(), help="for random pairs")
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=["float32", "bfloat16", "int8"])
    parser.add_argument("--acceptance", type=float, nargs="+", default=[0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    parser.add_argument("--draft-tokens", type=length, nargs="+", default=[1, 2, 3, 4, 5, 6, 8, 16], help="numbers")
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5, help="passes that count, after the first")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--busy", action="store_true", help="beside a process that keeps one core busy")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    set_threads(args.threads)
    console, rows = Console(width=110), []
    clock = CpuClock([os.getpid()])
    with neighbour(args.busy):
        for weights in args.weights:
            pair = load_pair(*written_pair(args.pair, args.cache), device="cpu", **WEIGHTS[weights])  # type: ignore[arg-type]
            for acceptance in args.acceptance:
                rows.append({"weights": weights, **compared(pair, acceptance, args)})
                console.print(rows[-1], highlight=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    for column in ("weights", "accepted", "best K", "its tokens/s", "auto, tokens/s", "drafts a round", "auto to best",
                   "lowest", "highest"):  # fmt: skip
        table.add_column(column, justify="right")
    for row in rows:
        figures = (row["best_fixed_speed"], row["auto_speed"], row["auto_drafts"])
        table.add_row(str(row["weights"]), f"{row['acceptance']:g}", str(row["best_fixed"]),
                      *(f"{figure:.1f}" for figure in figures),
                      *(f"{row[name]:.3f}" for name in ("ratio", "lowest", "highest")))  # fmt: skip
    console.print(table)
    about = {**describe(), "cpu_share_elsewhere": clock.share_elsewhere(), "busy": args.busy}
    console.print(", ".join(f"{name} {value}" for name, value in about.items()), highlight=False, soft_wrap=True)
    if args.json is not None:
        args.json.write_text(json.dumps({"about": about, "rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(parse())
