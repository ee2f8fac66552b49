"""Training tokens a second, beside a straightforward implementation with transformers' modules doing the same work.

    export OMP_WAIT_POLICY=PASSIVE                     # as the command has it: idle threads sleep
    python benchmarks/training.py                      # the bundled pair; --compile adds a compiled side
    python benchmarks/training.py --target DIR --drafter DIR --length 512 --batch 8 --json FILE
    python benchmarks/training.py --vocabulary 262144 --length 128 --batch 2 --slab-rows 8 64

Both sides do whole steps: the frozen target's pass over a batch, five unrolled drafts from every row, the same loss
against the target's distribution, backward, clipping, AdamW. They take turns on the same batches, and the figure is the
median over the turns. The straightforward side runs `Gemma4ForCausalLM` and `Gemma4AssistantForCausalLM` (5.22.2) with
4-D masks that give each row what decoding would show it, whole-vocabulary logits and autograd; its loss on the first
batch must be ours. `--memory` is our memory bound in MB; the other side holds the whole batch.

With `--vocabulary` the pair is a random one with so many tokens and small layers, and the text is random: what is
measured is what a vocabulary costs. The straightforward side would not fit into memory; ours with slabs of other sizes
take its place. Beside the time stand the processor's time and the memory at its peak, beyond weights and the
optimiser's state, which is to be less than `--memory`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from machine import processor
from rich.console import Console
from rich.table import Table
from torch import Tensor

from gemma_mtp.backend.native import set_threads
from gemma_mtp.checkpoint import load_drafter, load_target, read_target_config, save_drafter, save_target
from gemma_mtp.config import TargetConfig
from gemma_mtp.datasets import read_examples
from gemma_mtp.engine.pair import DTYPES, bundled_directory
from gemma_mtp.freed_memory import keep_freed_memory
from gemma_mtp.model.drafter import Drafter
from gemma_mtp.model.target import Target
from gemma_mtp.tokenizer import Tokenizer
from gemma_mtp.training.examples import Batch, BatchOrder, ExampleSet, TokenExample
from gemma_mtp.training.losses import choice_at, wanted
from gemma_mtp.training.memory import MEGABYTE, plan_blocks
from gemma_mtp.training.optim import Masters, Optimiser
from gemma_mtp.training.shapes import initialise, new_drafter_config
from gemma_mtp.training.step import DraftStep, Objective, StepStats
from gemma_mtp.training.unroll import trained_head

#: a step of one side: batch to loss
Side = Callable[[Batch], float]


def ours(
    target: Path, drafter: Path, dtype: torch.dtype, objective: Objective, args: Any, compile: bool = False
) -> Callable[..., float]:
    """`gemma-mtp train`'s step: a `Side`, which may be told how many rows a slab has."""
    frozen, model = load_target(target, dtype), load_drafter(drafter, dtype).requires_grad_(True)
    step = DraftStep(frozen, model, objective, args.length, compile)
    masters = Masters(model)
    optimiser = Optimiser(model, masters, 1e-5)
    plan = plan_blocks(step, args.length, args.batch, args.memory * MEGABYTE)

    def one(batch: Batch, slab_rows: int | None = None) -> float:
        stats, counts = StepStats.zeros(objective.steps, torch.device("cpu")), batch.reached(objective.steps)
        masters.clear()
        table = masters.gradient(trained_head(model))
        for first, last in plan.blocks(0, args.batch):
            step.block(batch.rows(first, last), counts, stats, table, slab_rows or plan.slab_rows)
            masters.accumulate()
        masters.clip()
        optimiser.step(1.0)
        masters.publish()
        return stats.loss.item()

    return one


def straightforward(target: Path, drafter: Path, dtype: torch.dtype, objective: Objective, args: Any) -> Side:
    """The same with transformers' modules, written the way one would write it first."""
    from transformers import Gemma4AssistantForCausalLM, Gemma4ForCausalLM

    frozen = Gemma4ForCausalLM.from_pretrained(target, dtype=dtype).eval().requires_grad_(False)
    model = Gemma4AssistantForCausalLM.from_pretrained(drafter, dtype=dtype).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), eps=1e-10)
    T, window = args.length, model.config.get_text_config().sliding_window
    distance = torch.arange(1, T + 1)[:, None] - torch.arange(T)[None, :]
    masks = {
        kind: torch.zeros(1, 1, T, T, dtype=dtype).masked_fill_(~visible, -torch.inf)
        for kind, visible in (
            ("full_attention", distance >= 1),
            ("sliding_attention", (distance >= 1) & (distance < window)),
        )
    }
    positions = torch.arange(1, T + 1)[None]

    def one(batch: Batch) -> float:
        tokens = batch.tokens_BT
        with torch.no_grad():
            out = frozen(tokens, output_hidden_states=True, return_shared_kv_states=True, use_cache=True)
            embeds, hidden = frozen.get_input_embeddings()(tokens), out.hidden_states[-1]
            probs = torch.stack([
                wanted(logits, choice_at(t), objective.hard_share).probs_NV
                for logits, t in zip(out.logits, batch.temperatures, strict=True)
            ])  # fmt: skip
        loss, reached = torch.zeros(()), torch.ones(tokens.shape)
        for i in range(objective.steps):
            valid = T - 2 - i
            inputs = torch.cat((embeds[:, 1 + i :], embeds.new_zeros(embeds.shape[0], 1 + i, embeds.shape[2])), 1)
            x = model.pre_projection(torch.cat((inputs, hidden), -1))
            state = model.model(
                inputs_embeds=x, attention_mask=masks, position_ids=positions, shared_kv_states=out.shared_kv_states,
                use_cache=False,
            ).last_hidden_state  # fmt: skip
            hidden = model.post_projection(state)
            log_q = model.lm_head(state)[:, :valid].float().log_softmax(-1)
            p, names, reached = probs[:, 1 + i : 1 + i + valid], tokens[:, 2 + i :, None], reached[:, :valid]
            costs = torch.nn.functional.kl_div(log_q, p, reduction="none").sum(-1)
            with torch.no_grad():
                weight = objective.own_tokens * reached + 1 - objective.own_tokens
                reached = reached * _chance(log_q, p, names, batch.temperatures)
            loss = loss + objective.step_decay**i * (costs * weight).mean() / objective.steps
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        return loss.item()

    return one


def _chance(log_q: Tensor, p: Tensor, names: Tensor, temperatures: tuple[float, ...]) -> Tensor:
    """[B, T]: the chance that each draft is accepted."""
    q = log_q.exp()
    ratio = p.gather(-1, names) / q.gather(-1, names).clamp(min=1e-38)
    coupled = torch.maximum(p, q * ratio).sum(-1).reciprocal()
    greedy = (log_q.argmax(-1) == names[..., 0]).float()
    return torch.where(torch.tensor(temperatures)[:, None] == 0, greedy, coupled)


def batches(target: Path, length: int, batch: int, data: Path) -> BatchOrder:
    """Whole rows of the data's text, greedy and at temperature 1 in turn."""
    tokenizer = Tokenizer.from_dir(target)
    texts = (e.content for e in read_examples(data, "*.py") if isinstance(e.content, str))
    tokens = np.concatenate([np.array(tokenizer.encode(text), np.int32) for text in texts])
    rows = tokens[: len(tokens) // length * length].reshape(-1, length)
    return BatchOrder(ExampleSet.of(TokenExample(row, 0, float(i % 2)) for i, row in enumerate(rows)), batch, 0)


def written_pair(vocabulary: int, directory: Path) -> tuple[Path, Path]:
    """Target and drafter of random weights with small layers: the vocabulary is nearly all they cost."""
    bundled = read_target_config(bundled_directory() / "target").text
    text = replace(
        bundled, vocab_size=vocabulary, hidden_size=512, num_hidden_layers=5, num_kv_shared_layers=0,
        layer_types=bundled.layer_types[:5], hidden_size_per_layer_input=0, vocab_size_per_layer_input=0,
        use_double_wide_mlp=False,
    )  # fmt: skip
    config = TargetConfig(text)
    drafter_config = new_drafter_config(config)
    target, drafter = Target(text), Drafter(drafter_config)
    for model in (target, drafter):
        initialise(model, 0)
    save_target(target, config, directory / "target")
    save_drafter(drafter, drafter_config, directory / "drafter")
    return directory / "target", directory / "drafter"


def random_batches(args: argparse.Namespace) -> BatchOrder:
    """Rows of random tokens, greedy and at temperature 1 in turn."""
    rows = np.random.default_rng(0).integers(0, args.vocabulary, (4 * args.batch, args.length)).astype(np.int32)
    return BatchOrder(ExampleSet.of(TokenExample(row, 0, float(i % 2)) for i, row in enumerate(rows)), args.batch, 0)


def vocabulary(args: argparse.Namespace) -> dict[str, Any]:
    """Steps with slabs as planned and with those of `--slab-rows`, in turns."""
    set_threads(args.threads)
    keep_freed_memory()
    objective, dtype, order = Objective(steps=5), DTYPES[args.dtype], random_batches(args)
    with TemporaryDirectory() as directory:
        pair = written_pair(args.vocabulary, Path(directory))
        step = ours(*pair, dtype, objective, args)
    sides: dict[str, Side] = {"as planned": step}
    sides |= {f"{n} rows": partial(step, slab_rows=n) for n in args.slab_rows}
    step(order.batch(0))  # from here on the optimiser's state is there
    rows: dict[str, dict[str, Any]] = {}
    for name, side in sides.items():
        peak = allocated_peak(partial(side, order.batch(1)))
        rows[name] = {"peak_mb": peak / MEGABYTE, "seconds": [], "processor_seconds": []}
    for turn in range(2, 2 + args.turns):
        for name, side in sides.items():
            started, used = time.perf_counter(), time.process_time()
            side(order.batch(turn))
            rows[name]["processor_seconds"].append(time.process_time() - used)
            rows[name]["seconds"].append(time.perf_counter() - started)
    setting = {name: getattr(args, name) for name in ("vocabulary", "dtype", "threads", "batch", "length", "memory")}
    return {"sides": rows, **setting, "machine": processor(), "torch": torch.__version__}


def allocated_peak(work: Callable[[], object]) -> int:
    """The most by which what PyTorch's CPU allocator held rose during `work`: what `work` freed of before comes off."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = list(accumulate((e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())), initial=0))
    return max(now - least for now, least in zip(held, accumulate(held, min), strict=True))


def show_vocabulary(report: dict[str, Any]) -> None:
    table = Table("slabs", "s a step", "processor's s", "to planned", f"peak, of {report['memory']} MB")
    base = statistics.median(report["sides"]["as planned"]["processor_seconds"])
    for name, row in report["sides"].items():
        used = statistics.median(row["processor_seconds"])
        table.add_row(name, f"{statistics.median(row['seconds']):.1f}", f"{used:.1f}", f"{used / base:.2f}x",
                      f"{row['peak_mb']:.0f} MB")  # fmt: skip
    Console().print(table)


def main(args: argparse.Namespace) -> dict[str, Any]:
    set_threads(args.threads)
    keep_freed_memory()
    objective, dtype = Objective("kl", steps=5), DTYPES[args.dtype]
    order = batches(args.target, args.length, args.batch, args.data)
    sides: dict[str, Side] = {"gemma-mtp": ours(args.target, args.drafter, dtype, objective, args)}
    if args.compile:
        sides["gemma-mtp, compiled"] = ours(args.target, args.drafter, dtype, objective, args, True)
    sides["transformers, straightforward"] = straightforward(args.target, args.drafter, dtype, objective, args)
    losses = {name: side(order.batch(0)) for name, side in sides.items()}  # the first step warms up
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(1, args.turns + 1):
        for name, side in sides.items():
            started = time.perf_counter()
            side(order.batch(turn))
            seconds[name].append(time.perf_counter() - started)
    base = statistics.median(seconds["transformers, straightforward"])
    tokens = args.batch * args.length
    rows = {
        name: {"tokens_per_second": tokens / statistics.median(s), "ratio": base / statistics.median(s),
               "loss": losses[name]}
        for name, s in seconds.items()
    }  # fmt: skip
    setting = {name: getattr(args, name) for name in ("dtype", "threads", "batch", "length", "memory", "turns")}
    return {"sides": rows, **setting, "machine": processor(), "torch": torch.__version__}


def show(report: dict[str, Any]) -> None:
    table = Table("", "tokens/s", "to straightforward", "loss of the first step")
    for name, row in report["sides"].items():
        table.add_row(name, f"{row['tokens_per_second']:.0f}", f"{row['ratio']:.2f}x", f"{row['loss']:.4f}")
    Console().print(table)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, default=bundled_directory() / "target")
    parser.add_argument("--drafter", type=Path, default=bundled_directory() / "drafter")
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[1] / "src" / "gemma_mtp")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--memory", type=int, default=2048)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--vocabulary", type=int, help="a random pair with so many tokens, in place of --target")
    parser.add_argument("--slab-rows", type=int, nargs="*", default=[8, 64], help="with --vocabulary: beside the plan")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    options = parse()
    if options.vocabulary:
        result = vocabulary(options)
        show_vocabulary(result)
    else:
        result = main(options)
        show(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))
