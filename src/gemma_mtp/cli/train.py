"""`gemma-mtp train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from gemma_mtp.cli import options
from gemma_mtp.cli.options import DATA, MODELS, option, use_threads
from gemma_mtp.engine.pair import choose_device
from gemma_mtp.errors import TrainingError
from gemma_mtp.training.drafter_trainer import DrafterRecipe
from gemma_mtp.training.environment import keep_freed_memory
from gemma_mtp.training.gate import setting
from gemma_mtp.training.losses import LOSSES
from gemma_mtp.training.parallel import joined_world
from gemma_mtp.training.run import Outcome, run_training
from gemma_mtp.training.settings import DataSettings, RunSettings
from gemma_mtp.training.shapes import DrafterShape
from gemma_mtp.training.step import Objective
from gemma_mtp.weight_types import parse_weight_types

WRITING, LEARNING, RUNNING, GATE = "What decoding will use", "Learning", "Running", "The gate"
#: exit code where the gate refuses what was trained
REFUSED = 3


def train(
    target: Annotated[Path, option("--target", help="Target checkpoint directory.", panel=MODELS)],
    data: Annotated[
        list[Path],
        option(
            "--data",
            help="File or directory; may be repeated. Lines of .jsonl files have text, prompt or messages; any other"
            " file is one text.",
            panel=DATA,
        ),
    ],
    out: Annotated[Path, option("--out", help="Where the drafter goes, and the run's state.", panel=MODELS)],
    drafter: Annotated[
        Path | None, option("--drafter", help="Drafter to adapt; else give --new.", panel=MODELS)
    ] = None,
    quantize: options.Quantize = None,
    new: Annotated[
        bool, option("--new", help="Make a new drafter of the official shape for the target.", panel=MODELS)
    ] = False,
    hidden: Annotated[
        int | None, option("--hidden", help="With --new: hidden size; default: the official one.", panel=MODELS)
    ] = None,
    intermediate: Annotated[
        int | None, option("--intermediate", help="With --new: width of the MLPs.", panel=MODELS)
    ] = None,
    heads: Annotated[int | None, option("--heads", help="With --new: query heads.", panel=MODELS)] = None,
    layers: Annotated[
        int, option("--layers", help="With --new: layers, the last of them full, the others sliding.", panel=MODELS)
    ] = 4,
    centroids: Annotated[
        int | None,
        option("--centroids", help="With --new: a centroid head of so many clusters of tokens.", panel=MODELS),
    ] = None,
    centroid_top_k: Annotated[
        int, option("--centroid-top-k", help="With --centroids: clusters whose tokens are scored.", panel=MODELS)
    ] = 32,
    pattern: Annotated[
        str, option("--pattern", help='Files of directories to take, such as "*.py".', panel=DATA)
    ] = "*",
    regenerate: Annotated[
        bool,
        option(
            "--regenerate",
            help="Let the target write continuations and train on those; the default, and always so for prompts.",
            panel=DATA,
        ),
    ] = False,
    as_is: Annotated[
        bool,
        option("--as-is", help="Train on texts as they stand; with --regenerate, on both.", panel=DATA),
    ] = False,
    length: Annotated[
        int, option("--length", help="Tokens of a row; longer documents are cut into rows.", panel=DATA)
    ] = 512,
    max_new_tokens: Annotated[
        int, option("--max-new-tokens", help="Tokens the target writes after a prompt, at most.", panel=DATA)
    ] = 256,
    written_tokens: Annotated[
        int, option("--written-tokens", help="Tokens the target writes in all, at most.", panel=DATA)
    ] = 400_000,
    cache: Annotated[
        Path | None,
        option("--cache", help="Where written texts are kept for other runs; default: in --out.", panel=DATA),
    ] = None,
    held_out: Annotated[
        Path | None,
        option("--held-out", help="Data to measure acceptance on; default: a part of --data.", panel=GATE),
    ] = None,
    held_out_prompts: Annotated[
        int, option("--held-out-prompts", help="Prompts that acceptance is measured on.", panel=GATE)
    ] = 24,
    temperature: Annotated[
        list[float] | None,
        option(
            "--temperature",
            "-t",
            help="Of the decoding to come; may be repeated, and one given twice counts twice. [default: 0 and 1]",
            panel=WRITING,
        ),
    ] = None,
    top_k: Annotated[int, option("--top-k", help="Of the decoding to come; 0: all.", panel=WRITING)] = 0,
    top_p: Annotated[float, option("--top-p", help="Of the decoding to come; 1: all.", panel=WRITING)] = 1.0,
    loss: Annotated[
        str,
        option(
            "--loss",
            help="kl, ce, tv, lk (KL far from the target, total variation near it) or lk-log (-log acceptance).",
            panel=LEARNING,
        ),
    ] = "lk",
    draft_steps: Annotated[int, option("--draft-steps", help="Drafts unrolled from every row.", panel=LEARNING)] = 5,
    step_decay: Annotated[
        float, option("--step-decay", help="Weight of a draft against the one before it.", panel=LEARNING)
    ] = 0.9,
    own_tokens: Annotated[
        float,
        option(
            "--own-tokens",
            help="Chance that drafts are fed the drafter's own tokens, their loss ending where they go wrong.",
            panel=LEARNING,
        ),
    ] = 0.9,
    steps: Annotated[int | None, option("--steps", help="Optimiser steps.", panel=LEARNING)] = None,
    epochs: Annotated[
        float | None, option("--epochs", help="Passes through the data; 2 if nothing else is given.", panel=LEARNING)
    ] = None,
    minutes: Annotated[
        float | None,
        option("--minutes", help="Wall time of the steps, in place of --steps and --epochs.", panel=LEARNING),
    ] = None,
    batch: Annotated[
        int,
        option("--batch", help="Texts of one optimiser step; gradients add up over blocks of it.", panel=LEARNING),
    ] = 8,
    lr: Annotated[float, option("--lr", help="Peak learning rate of AdamW.", panel=LEARNING)] = 1e-3,
    matrix_lr: Annotated[
        float | None,
        option("--matrix-lr", help="Train the layers' matrices by Muon, at this peak rate.", panel=LEARNING),
    ] = None,
    warmup: Annotated[float, option("--warmup", help="Share of the run in which rates rise.", panel=LEARNING)] = 0.03,
    clip: Annotated[float, option("--clip", help="Longest gradient.", panel=LEARNING)] = 1.0,
    dtype: Annotated[
        str, option("--dtype", help="float32, bfloat16, or auto: bfloat16 where it is fast.", panel=RUNNING)
    ] = "auto",
    device: Annotated[str, option("--device", help="auto, cpu, cuda or cuda:N.", panel=RUNNING)] = "auto",
    threads: Annotated[
        int | None, option("--threads", help="CPU threads; default: one for each core.", panel=RUNNING)
    ] = None,
    memory: Annotated[
        int,
        option(
            "--memory",
            help="Megabytes of activations, logits and gradients, beside weights and the optimiser; blocks and slabs of"
            " logits are cut to fit.",
            panel=RUNNING,
        ),
    ] = 2048,
    store_target: Annotated[
        bool,
        option(
            "--store-target",
            help="Keep the target's states, keys and values on disk after the first pass through the data.",
            panel=RUNNING,
        ),
    ] = False,
    compile: Annotated[
        bool, option("--compile", help="Compile the models first: a minute or two, then faster.", panel=RUNNING)
    ] = False,
    seed: Annotated[int, option("--seed", help="Of initial weights, order and sampled text.", panel=RUNNING)] = 1,
    checkpoint_steps: Annotated[
        int, option("--checkpoint-steps", help="Steps between checkpoints.", panel=RUNNING)
    ] = 100,
    resume: Annotated[bool, option("--resume", help="Go on from the run's last checkpoint.", panel=RUNNING)] = False,
    tensorboard: Annotated[
        bool, option("--tensorboard", help="Log to TensorBoard too (extra: train).", panel=RUNNING)
    ] = False,
    gate_steps: Annotated[
        int | None, option("--gate-steps", help="Measure in the engine every so many steps too.", panel=GATE)
    ] = None,
    patience: Annotated[
        int | None,
        option("--patience", help="Stop after so many measurements without gain; the best is kept.", panel=GATE),
    ] = None,
    draft_tokens: Annotated[int, option("--draft-tokens", "-k", help="Drafts a round when measuring.", panel=GATE)] = 4,
    gate_tokens: Annotated[int, option("--gate-tokens", help="Tokens a prompt when measuring.", panel=GATE)] = 128,
    force: Annotated[bool, option("--force", help="Export even what is worse than the start.", panel=GATE)] = False,
) -> None:
    """Train or adapt a drafter for a target, and export it if it is not worse than the one it started from.

    Started by torchrun, several processes share each step. Exits with 3 where the gate refuses the drafter.
    """
    _check(drafter, new, loss, steps, epochs, minutes, patience, gate_steps, dtype)
    use_threads(threads)
    if steps is None and minutes is None and epochs is None:
        epochs = 2.0
    objective = Objective(loss, draft_steps, step_decay, own_tokens, top_k, top_p)  # type: ignore[arg-type]
    settings = RunSettings(
        target=target, out=out, drafter=drafter,
        data=DataSettings(tuple(data), pattern, held_out, held_out_prompts, length, regenerate or not as_is, as_is,
                          max_new_tokens, written_tokens, cache, store_target),
        new=DrafterShape(hidden, intermediate, heads, layers, centroids, centroid_top_k),
        recipe=DrafterRecipe(objective, steps, epochs, minutes, batch, lr, matrix_lr, warmup, clip, memory,
                             checkpoint_steps, gate_steps, patience, seed, compile),
        temperatures=tuple(temperature or (0.0, 1.0)), draft_tokens=draft_tokens, gate_tokens=gate_tokens,
        dtype=dtype, device=device, quantize=parse_weight_types(quantize or "none"), force=force, resume=resume,
        tensorboard=tensorboard,
    )  # fmt: skip
    keep_freed_memory()
    console = Console(stderr=True, highlight=False)
    with joined_world(choose_device(device)) as world:
        outcome = run_training(settings, world, lambda text: console.print(text, soft_wrap=True))
    if outcome is not None:
        _report(outcome, out)
        if not outcome.exported:
            raise typer.Exit(REFUSED)


def _check(
    drafter: Path | None, new: bool, loss: str, steps: int | None, epochs: float | None, minutes: float | None,
    patience: int | None, gate_steps: int | None, dtype: str,
) -> None:  # fmt: skip
    if new == (drafter is not None):
        raise TrainingError("give either --drafter, to adapt one, or --new, to make one.")
    if loss not in LOSSES:
        raise TrainingError(f"--loss is {loss!r}, but must be one of {', '.join(LOSSES)}.")
    if sum(value is not None for value in (steps, epochs, minutes)) > 1:
        raise TrainingError("--steps, --epochs and --minutes exclude each other; give one of them.")
    if patience is not None and gate_steps is None:
        raise TrainingError("--patience counts measurements; give --gate-steps too.")
    if dtype not in ("auto", "float32", "bfloat16"):
        raise TrainingError(f"--dtype is {dtype!r}, but must be auto, float32 or bfloat16.")


def _report(outcome: Outcome, out: Path) -> None:
    console = Console(highlight=False)
    for line in outcome.verdict.lines():
        console.print(line, soft_wrap=True)
    for before, after in zip(outcome.start, outcome.now, strict=True):
        shares = [", ".join(f"{share:.3f}" for share in r.pooled.by_position) for r in (before, after)]
        console.print(
            f"  {setting(after)}: acceptance by position {shares[0]} before, {shares[1]} after", soft_wrap=True
        )
    for when, speed in zip(("before", "after"), outcome.speeds, strict=True):
        console.print(f"speed-up over plain decoding {when}: {speed}", soft_wrap=True)
    if not outcome.exported:
        console.print("not exported: the drafter is worse than the one it started from; --force exports it anyway.")
    else:
        console.print(f"wrote {out}", soft_wrap=True)
