"""Decode speed at batch 1: ours plain and drafted, beside transformers plain and assisted, on one checkpoint.

    python benchmarks/decode.py                                   # the bundled pair, held-out Python, greedy
    python benchmarks/decode.py --target T --drafter D --token-ids
    python benchmarks/decode.py --useless-drafter --draft-tokens auto --no-transformers --max-tokens 100

Every repetition runs every side over the same prompts, in rotated order; a side's figure is the median over the
repetitions of tokens per second of wall time, prefill included. Beside it: the floor, which is the time to read once,
at the bandwidth measured in the same process, the weights a decode step needs.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from gemma_mtp import SamplingParams, load_pair
from gemma_mtp.engine.pair import DTYPES, DraftTokens, Pair, bundled_directory
from gemma_mtp.model.drafter import Drafter
from gemma_mtp.model.target import Target
from gemma_mtp.training.evaluate import read_prompts

BANDWIDTH_BYTES = 512 << 20


@dataclass
class Side:
    """One way to decode: prompt token ids in, output token ids out."""

    name: str
    run: Callable[[list[int]], list[int]]
    speeds: list[float] = field(default_factory=list)
    outputs: list[list[int]] = field(default_factory=list)
    acceptance_length: float | None = None

    @property
    def speed(self) -> float:
        """Tokens a second, median over the repetitions."""
        return statistics.median(self.speeds)


def ours(pair: Pair, draft_tokens: DraftTokens, max_tokens: int) -> Side:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    lengths: list[float] = []

    def run(prompt: list[int]) -> list[int]:
        result = pair.generate(prompt, params, draft_tokens=draft_tokens)
        lengths.append(result.mean_acceptance_length)
        side.acceptance_length = statistics.mean(lengths)
        return result.token_ids

    side = Side("plain" if draft_tokens == 0 else f"drafted, K = {draft_tokens}", run)
    return side


def useless_drafter(pair: Pair) -> Drafter:
    """One of the same shape with random weights: what `auto` may lose with a drafter that is not worth its time."""
    assert pair.drafter is not None
    drafter = Drafter(pair.drafter.config).to(pair.drafter.embed_tokens.weight.dtype).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in drafter.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    drafter.pack_(pair.target.native)
    return drafter


def transformers_sides(
    target: Path, drafter: Path, dtype: torch.dtype, draft_tokens: int, max_tokens: int
) -> list[Side]:
    """Hugging Face's own generate, without end-of-sequence so that all sides write as many tokens."""
    import transformers
    from transformers import AutoModelForCausalLM

    transformers.logging.set_verbosity_error()
    model = AutoModelForCausalLM.from_pretrained(target, dtype=dtype).eval()
    assistant = AutoModelForCausalLM.from_pretrained(drafter, dtype=dtype).eval()
    for each in (model, assistant):
        each.generation_config.eos_token_id = None
    assistant.generation_config.num_assistant_tokens = draft_tokens
    assistant.generation_config.num_assistant_tokens_schedule = "constant"

    def side(name: str, **options: Any) -> Side:
        def run(prompt: list[int]) -> list[int]:
            ids = torch.tensor([prompt])
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_tokens, **options
            )
            return out[0, len(prompt) :].tolist()

        return Side(name, run)

    return [
        side("transformers plain"),
        side(f"transformers assisted, K = {draft_tokens}", assistant_model=assistant),
    ]


def measure(sides: Sequence[Side], prompts: Sequence[list[int]], repeats: int) -> None:
    """A warm-up of each side, then `repeats` rounds over all sides, beginning with another one each time."""
    for side in sides:
        side.run(prompts[0])
    for repeat in range(repeats):
        for side in [*sides[repeat % len(sides) :], *sides[: repeat % len(sides)]]:
            started = time.perf_counter()
            outputs = [side.run(prompt) for prompt in prompts]
            seconds = time.perf_counter() - started
            side.speeds.append(sum(map(len, outputs)) / seconds)
            side.outputs = outputs


def read_bandwidth(repeats: int = 7) -> float:
    """Bytes a second at which this process reads memory: the best of several sums over half a gigabyte."""
    buffer = torch.ones(BANDWIDTH_BYTES // 4)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        buffer.sum()
        seconds.append(time.perf_counter() - started)
    return BANDWIDTH_BYTES / min(seconds)


def step_bytes(target: Target, dtype: torch.dtype) -> int:
    """Weight bytes one decode step reads: all matrices, the tied table once as the head; one row of the others."""
    config = target.config
    with torch.device("meta"):
        tensors = Target(config).checkpoint_tensors()
    gathered = {"model.embed_tokens_per_layer.weight"}
    if not config.tie_word_embeddings:
        gathered.add("model.embed_tokens.weight")
    count = sum(tensor.numel() for name, tensor in tensors.items() if name not in gathered)
    if config.enable_moe_block:
        experts = sum(tensor.numel() for name, tensor in tensors.items() if ".experts." in name)
        count -= experts * (config.num_experts - config.top_k_experts) // config.num_experts
    return count * dtype.itemsize


def report(sides: Sequence[Side], floor_speed: float, bandwidth: float, args: argparse.Namespace) -> dict[str, Any]:
    """The run as plain values: machine, versions, speeds, ratios to our plain and to transformers plain."""
    plain = next(side for side in sides if side.name == "plain")
    peer = next((side for side in sides if side.name == "transformers plain"), None)
    rows = [
        {
            "side": side.name,
            "tokens_per_second": side.speed,
            "spread": [min(side.speeds), max(side.speeds)],
            "ratio_to_plain": side.speed / plain.speed,
            "ratio_to_transformers_plain": None if peer is None else side.speed / peer.speed,
            "mean_acceptance_length": side.acceptance_length,
            "identical_to_plain": side.outputs == plain.outputs,
        }
        for side in sides
    ]
    return {
        "machine": processor(), "threads": torch.get_num_threads(), "python": platform.python_version(),
        "torch": torch.__version__, "dtype": args.dtype, "prompts": args.prompts, "max_tokens": args.max_tokens,
        "repeats": args.repeats, "read_gigabytes_per_second": bandwidth / 1e9,
        "plain_floor_tokens_per_second": floor_speed, "share_of_floor": plain.speed / floor_speed, "sides": rows,
    }  # fmt: skip


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} ({len(names)} cores)" if names else platform.processor()


def show(content: dict[str, Any]) -> None:
    console = Console(width=110)
    table = Table(box=None, pad_edge=False)
    for column in ("", "tokens/s", "to plain", "to transformers", "acceptance length", "same tokens"):
        table.add_column(column, justify="left" if column == "" else "right")
    for row in content["sides"]:
        peer, length = row["ratio_to_transformers_plain"], row["mean_acceptance_length"]
        table.add_row(
            row["side"], f"{row['tokens_per_second']:.1f}", f"{row['ratio_to_plain']:.2f}x",
            "" if peer is None else f"{peer:.2f}x", "" if length is None else f"{length:.2f}",
            "yes" if row["identical_to_plain"] else "NO",
        )  # fmt: skip
    console.print(table)
    console.print(
        f"{content['machine']}, {content['threads']} threads, torch {content['torch']}, {content['dtype']},"
        f" {content['prompts']} prompts of {content['max_tokens']} new tokens, median of {content['repeats']}\n"
        f"memory reads at {content['read_gigabytes_per_second']:.1f} GB/s; reading a step's weights allows"
        f" {content['plain_floor_tokens_per_second']:.0f} tokens/s plain;"
        f" plain reaches {content['share_of_floor']:.0%}",
        highlight=False,
        soft_wrap=True,
    )


def _length(text: str) -> DraftTokens:
    return "auto" if text == "auto" else int(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    bundled = bundled_directory()
    parser.add_argument("--target", type=Path, default=bundled / "target")
    parser.add_argument("--drafter", type=Path, default=bundled / "drafter")
    parser.add_argument("--draft-tokens", type=_length, nargs="+", default=[2, 3, 4, 6, "auto"], help="auto or numbers")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of both sides")
    parser.add_argument("--prompts", type=int, default=4, help="how many of the held-out prompts")
    parser.add_argument("--token-ids", action="store_true", help="random prompts, for a target without tokenizer")
    parser.add_argument("--useless-drafter", action="store_true", help="random weights in place of the drafter's")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-transformers", action="store_true")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    return parser.parse_args()


def main(args: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(args.threads)
    pair = load_pair(args.target, args.drafter, dtype=args.dtype, device="cpu")
    if args.useless_drafter:
        pair.drafter = useless_drafter(pair)
    if args.token_ids:
        generator = torch.Generator().manual_seed(0)
        high = pair.target.config.vocab_size
        prompts = torch.randint(3, high, (args.prompts, 64), generator=generator).tolist()
    else:
        texts = read_prompts(bundled_directory() / "heldout_prompts.jsonl")[: args.prompts]
        prompts = [pair.encode(text) for _, text in texts]
    sides = [ours(pair, k, args.max_tokens) for k in (0, *args.draft_tokens)]
    if not args.no_transformers:
        sides += transformers_sides(args.target, args.drafter, DTYPES[args.dtype], 4, args.max_tokens)
    measure(sides, prompts, args.repeats)
    bandwidth = read_bandwidth()
    content = report(sides, bandwidth / step_bytes(pair.target, DTYPES[args.dtype]), bandwidth, args)
    if args.json is not None:
        args.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    show(content)
    return content


if __name__ == "__main__":
    main(parse())
