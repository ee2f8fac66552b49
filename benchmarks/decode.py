"""Decode speed at batch 1: ours plain and drafted, beside transformers and llama.cpp, on the same weights.

    python benchmarks/decode.py                             # the bundled pair, held-out Python, greedy
    python benchmarks/decode.py --pair small                # 112 M random parameters, a drafter that always agrees
    python benchmarks/decode.py --pair small --quantize int8
    python benchmarks/decode.py --pair small --acceptance 0.9 0.7 0.5 0 --draft-tokens auto --peers
    python benchmarks/decode.py --pair e2b                  # E2B's geometry: 10 GB of disk and of memory
    python benchmarks/decode.py --target T --drafter D --token-ids
    python benchmarks/decode.py --pair small --gguf Q8_0    # both programs on the very same GGUF files
    python benchmarks/decode.py --target T.gguf --token-ids # a file as it is, plain alone
    python benchmarks/decode.py --useless-drafter --draft-tokens auto --peers --max-tokens 100

Every repetition runs every side over the same prompts, in rotated order; a side's figure is the median over the
repetitions of tokens per second of wall time, prefill included. A side's floor is the speed at which its rounds would
take as long as reading once, at the bandwidth measured between the repetitions, the weights their steps need.
"""

from __future__ import annotations

import gemma_mtp.cli.environment  # noqa: F401  isort: skip  (before PyTorch)

import argparse
import importlib.util
import json
import os
import statistics
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from gguf_pair import gguf_pair
from machine import read_bandwidth
from ours import our_side, unreliable, useless_drafter
from pairs import cache_directory, written_pair
from peers import Peer, llama_cpp_peer, transformers_peer
from report import report, show
from sides import Side, measure

from gemma_mtp import load_pair
from gemma_mtp.backend.native import set_threads
from gemma_mtp.checkpoint import open_source
from gemma_mtp.cpu_clock import CpuClock
from gemma_mtp.datasets import read_examples
from gemma_mtp.decoding.draft_length import DraftTokens
from gemma_mtp.engine.pair import DTYPES, Pair, bundled_directory

#: the other programs, by the package that brings them
PEERS = {"transformers": "transformers", "llama.cpp": "llama_cpp"}
INSTALLED = [name for name, package in PEERS.items() if importlib.util.find_spec(package)]
#: what is measured of each pair where the command line does not say, in about a minute
DEFAULTS: dict[str, dict[str, Any]] = {
    "bundled": {
        "draft_tokens": [2, 3, 4, 6, "auto"], "acceptance": [], "peers": INSTALLED, "prompts": 4, "max_tokens": 128,
        "repeats": 5,
    },
    "small": {
        "draft_tokens": [3, 4, "auto"], "acceptance": [1.0, 0.8], "peers": INSTALLED, "prompts": 1, "max_tokens": 96,
        "repeats": 5,
    },
    "mid": {
        "draft_tokens": [3, 4, "auto"], "acceptance": [1.0, 0.8], "peers": [], "prompts": 1, "max_tokens": 64,
        "repeats": 3,
    },
    "e2b": {
        "draft_tokens": [2, 4, 6, "auto"], "acceptance": [1.0, 0.8], "peers": [], "prompts": 1, "max_tokens": 32,
        "repeats": 3,
    },
}  # fmt: skip
#: the GGUF type that holds the same weights
GGUF_TYPES = {"float32": "F32", "bfloat16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}


def checkpoints(args: argparse.Namespace) -> tuple[Path, Path | None]:
    """The target and the drafter that are measured: directories, or GGUF files."""
    if args.target is not None:
        found = args.target, args.drafter
    elif args.pair == "bundled":
        found = bundled_directory() / "target", bundled_directory() / "drafter"
    else:
        found = written_pair(args.pair, args.cache)
    return found if args.gguf is None else gguf_pair(*found, args.gguf, args.cache)


def is_gguf(target: Path) -> bool:
    return target.suffix == ".gguf"


def prompts_for(pair: Pair, args: argparse.Namespace) -> list[list[int]]:
    if args.pair != "bundled" or args.token_ids:
        generator = torch.Generator().manual_seed(0)
        high = pair.target.config.vocab_size
        return torch.randint(3, high, (args.prompts, args.prompt_tokens), generator=generator).tolist()
    tokenizer = open_source(bundled_directory() / "target").tokenizer()  # GGUF files are written without
    examples = islice(read_examples(bundled_directory() / "heldout_prompts.jsonl"), args.prompts)
    return [example.token_ids(tokenizer) for example in examples]


def our_sides(pair: Pair, args: argparse.Namespace) -> list[Side]:
    """Plain, and every draft length at every acceptance asked for (none: the drafter's own)."""
    sides = [our_side(pair, 0, args.max_tokens)]
    if pair.drafter is None:
        return sides
    for acceptance in args.acceptance or [None]:
        drafting = pair if acceptance in (None, 1.0) else unreliable(pair, acceptance)
        for length in args.draft_tokens:
            side = our_side(drafting, length, args.max_tokens)
            side.name += "" if acceptance is None else f", acceptance {acceptance:g}"
            sides.append(side)
    return sides


def start_peers(target: Path, drafter: Path | None, prompts: list[list[int]], args: argparse.Namespace) -> list[Peer]:
    """The other programs asked for, on the same weights."""
    started = []
    if "transformers" in args.peers and drafter is not None and not is_gguf(target):
        started.append(transformers_peer(target, drafter, args.dtype, args.threads, prompts[0]))
    if "llama.cpp" in args.peers:
        kind = args.gguf or ("GGUF" if is_gguf(target) else GGUF_TYPES[args.quantize or args.dtype])
        files = (target, drafter)
        if drafter is not None and not is_gguf(target):
            files = gguf_pair(target, drafter, kind, args.cache)
        started.append(llama_cpp_peer(files, kind, args.threads, prompts, args.max_tokens))
    return started


def _length(text: str) -> DraftTokens:
    return "auto" if text == "auto" else int(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", choices=DEFAULTS, default="bundled", help="random ones are made once")
    parser.add_argument("--target", type=Path, help="a checkpoint instead, with --drafter; or a GGUF file, also alone")
    parser.add_argument("--drafter", type=Path)
    parser.add_argument("--cache", type=Path, default=cache_directory(), help="for random pairs and GGUF files")
    parser.add_argument("--draft-tokens", type=_length, nargs="+", help="auto or numbers")
    parser.add_argument("--acceptance", type=float, nargs="*", help="simulated, for a random pair; 1: its own")
    parser.add_argument("--useless-drafter", action="store_true", help="random weights in place of the drafter's")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of every side")
    parser.add_argument("--quantize", choices=("int8", "int4"), help="ours, beside the like of it in llama.cpp")
    parser.add_argument("--gguf", choices=GGUF_TYPES.values(), help="ours reads the pair from llama.cpp's files too")
    parser.add_argument("--peers", nargs="*", choices=PEERS, help="default: those that are installed")
    parser.add_argument("--peer-draft-tokens", type=int, default=3)
    parser.add_argument("--prompts", type=int)
    parser.add_argument("--prompt-tokens", type=int, default=16, help="length of random prompts")
    parser.add_argument("--token-ids", action="store_true", help="random prompts, for a target without tokenizer")
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    args = parser.parse_args()
    for name, value in DEFAULTS[args.pair].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if (args.target is None) != (args.drafter is None) and not (args.target and is_gguf(args.target)):
        parser.error("--target and --drafter go together")
    if args.gguf and args.quantize:
        parser.error("--gguf says what both sides' weights are: leave out --quantize")
    if args.acceptance and (args.pair == "bundled" or args.target):
        parser.error("--acceptance needs a pair that always agrees: --pair small, mid or e2b")
    return args


def measured(pair: Pair, target: Path, drafter: Path | None, args: argparse.Namespace) -> dict[str, Any]:
    """Measure our sides and the peers' in one run, and report it."""
    prompts = prompts_for(pair, args)
    peers = start_peers(target, drafter, prompts, args)
    sides = our_sides(pair, args)
    lengths = (0,) if drafter is None else (0, args.peer_draft_tokens)
    sides += [peer.side(length, args.max_tokens) for peer in peers for length in lengths]
    bandwidths: list[float] = []
    clock = CpuClock([os.getpid(), *(peer.popen.pid for peer in peers)])
    try:
        measure(sides, prompts, args.repeats, lambda: bandwidths.append(read_bandwidth(3)))
        elsewhere = clock.share_elsewhere()
    finally:
        for peer in peers:
            peer.close()
    run = {
        "pair": str(args.target or args.pair), "weights": args.gguf or args.quantize or args.dtype,
        "prompts": args.prompts, "max_tokens": args.max_tokens, "repeats": args.repeats,
        "cpu_share_elsewhere": elsewhere, "peers": {peer.name: peer.about for peer in peers},
    }  # fmt: skip
    return report(sides, statistics.median(bandwidths), run)


def main(args: argparse.Namespace) -> None:
    set_threads(args.threads)
    target, drafter = checkpoints(args)
    quantised = {} if args.quantize is None else {"quantize": args.quantize}
    dtype = "auto" if is_gguf(target) else args.dtype  # blocks stay blocks, and what lies beside them is not rounded
    pair = load_pair(target, drafter, dtype=dtype, device="cpu", use_drafter=drafter is not None, **quantised)
    if args.useless_drafter:
        pair = pair.with_drafter(useless_drafter(pair))
    content = measured(pair, target, drafter, args)
    if args.json is not None:
        args.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    show(content)


if __name__ == "__main__":
    main(parse())
