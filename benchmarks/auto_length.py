"""Whether `auto` drafts as well as the best fixed length, at several acceptances, in one run whose sides take turns.

    python benchmarks/auto_length.py                        # 112 M random parameters: fp32, bf16 and int8
    python benchmarks/auto_length.py --busy                 # the same beside a process that keeps one core busy
    python benchmarks/auto_length.py --weights bfloat16 --acceptance 0.8 --draft-tokens 2 3 4 6 --repeats 9

Every side decodes the same prompt to the same length. The first pass plays all fixed lengths; later passes play the
fastest of them and `auto`, in rotated order, and only they count. The figure of a row is the median over the passes of
the speed of `auto` to that of the fixed length with the best median; speeds are those of decoding, prefill excluded.
That length is picked after the fact from several, so that noise favours it.

Rounds of one length differ by a third and more on a shared machine, of which little is the policy's doing. So a second
figure counts every round at the median of all rounds of its length, whichever side played them: the time that `auto`
and the fixed lengths would have taken had no round been held up.
"""

from __future__ import annotations

import gemma_mtp.cli.environment  # noqa: F401  isort: skip  (before PyTorch)

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
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
from gemma_mtp.engine.draft_policy import Policies
from gemma_mtp.engine.engine import Engine
from gemma_mtp.engine.pair import Pair
from gemma_mtp.engine.request import Request
from gemma_mtp.engine.settings import EngineSettings

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


@dataclass(frozen=True)
class Played:
    """One generation: tokens a second of decoding, and of each round its number of drafts and its seconds."""

    speed: float
    rounds: list[tuple[int, float]]

    @property
    def drafts(self) -> float:
        """Drafts a round."""
        return statistics.fmean(drafts for drafts, _ in self.rounds)


def played(pair: Pair, drafts: DraftTokens, prompt: list[int], tokens: int) -> Played:
    engine = Engine(pair, EngineSettings(max_running=1, max_tokens=len(prompt) + tokens, prefix_reuse=False))
    generation = engine.submit(Request(prompt, SamplingParams(max_tokens=tokens, ignore_eos=True), drafts))
    result, rounds, before = generation.result, list[tuple[int, float]](), 0.0
    while not generation.ended:
        engine.step()
        generation.take()
        if len(result.decode_rounds) > len(rounds):
            rounds.append((result.decode_rounds[-1].drafted, result.decode_seconds - before))
            before = result.decode_seconds
    return Played((len(result.token_ids) - 1) / result.decode_seconds, rounds)


def typical_seconds(games: Iterable[Played]) -> dict[int, float]:
    """Drafts -> the median seconds of a round that makes so many, over all rounds of these generations."""
    seconds = defaultdict(list)
    for game in games:
        for drafts, took in game.rounds:
            seconds[drafts].append(took)
    return {drafts: statistics.median(of_one) for drafts, of_one in seconds.items()}


def compared(pair: Pair, acceptance: float, args: argparse.Namespace) -> dict[str, object]:
    """One row: `auto` and the best fixed length at this acceptance."""
    prompt = list(range(3, 3 + args.prompt_tokens))
    # in a pass all sides meet the same luck, position by position; another pass has another. They are one drafter's, so
    # that what `auto` learnt in one pass it knows in the next, as in the generations of any pair
    known: Policies = {}
    sides: list[DraftTokens] = ["auto", *args.draft_tokens]
    passes = [
        dataclasses.replace(pair if acceptance == 1 else unreliable(pair, acceptance, seed), policies=known)
        for seed in range(args.repeats + 1)
    ]
    first = {side: played(passes[-1], side, prompt, args.tokens).speed for side in sides}
    finalists = sorted(args.draft_tokens, key=lambda k: -first[k])[:FINALISTS]
    playing: list[DraftTokens] = ["auto", *finalists]
    games: dict[DraftTokens, list[Played]] = {side: [] for side in playing}
    for repeat in range(args.repeats):
        turn = repeat % len(playing)
        for side in [*playing[turn:], *playing[:turn]]:
            games[side].append(played(passes[repeat], side, prompt, args.tokens))
    speeds = {side: [game.speed for game in games[side]] for side in playing}
    best = max(finalists, key=lambda k: statistics.median(speeds[k]))
    ratios = [ours / theirs for ours, theirs in zip(speeds["auto"], speeds[best], strict=True)]
    typical = typical_seconds(itertools.chain(*games.values()))
    undisturbed = {side: sum(typical[k] for game in games[side] for k, _ in game.rounds) for side in playing}
    steady = min(finalists, key=lambda k: undisturbed[k])
    return {
        "acceptance": acceptance, "best_fixed": best, "best_fixed_speed": statistics.median(speeds[best]),
        "auto_speed": statistics.median(speeds["auto"]),
        "auto_drafts": statistics.fmean(game.drafts for game in games["auto"]),
        "first_auto_to_best": first["auto"] / first[best], "ratio": statistics.median(ratios),
        "lowest": min(ratios), "highest": max(ratios),
        "total_ratio": sum(1 / x for x in speeds[best]) / sum(1 / x for x in speeds["auto"]),
        "undisturbed_best": steady, "undisturbed_ratio": undisturbed[steady] / undisturbed["auto"],
        "typical_ms": {k: round(1000 * typical[k], 3) for k in sorted(typical)},
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
    console, rows = Console(width=130), []
    clock = CpuClock([os.getpid()])
    with neighbour(args.busy):
        for weights in args.weights:
            pair = load_pair(*written_pair(args.pair, args.cache), device="cpu", **WEIGHTS[weights])  # type: ignore[arg-type]
            for acceptance in args.acceptance:
                rows.append({"weights": weights, **compared(pair, acceptance, args)})
                console.print(rows[-1], highlight=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    for column in ("weights", "accepted", "best K", "its tokens/s", "auto, tokens/s", "drafts a round", "auto to best",
                   "lowest", "highest", "undisturbed", "its K"):  # fmt: skip
        table.add_column(column, justify="right")
    for row in rows:
        figures = (row["best_fixed_speed"], row["auto_speed"], row["auto_drafts"])
        table.add_row(str(row["weights"]), f"{row['acceptance']:g}", str(row["best_fixed"]),
                      *(f"{figure:.1f}" for figure in figures),
                      *(f"{row[name]:.3f}" for name in ("ratio", "lowest", "highest", "undisturbed_ratio")),
                      str(row["undisturbed_best"]))  # fmt: skip
    console.print(table)
    about = {**describe(), "cpu_share_elsewhere": clock.share_elsewhere(), "busy": args.busy}
    console.print(", ".join(f"{name} {value}" for name, value in about.items()), highlight=False, soft_wrap=True)
    if args.json is not None:
        args.json.write_text(json.dumps({"about": about, "rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(parse())
