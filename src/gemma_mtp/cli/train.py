"""`gemma-mtp train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

import typer

from gemma_mtp.cli import options
from gemma_mtp.cli.console import console
from gemma_mtp.cli.option_groups import REQUIRED, group, grouped, option
from gemma_mtp.cli.options import DATA, MODELS, use_threads
from gemma_mtp.errors import TrainingError
from gemma_mtp.locate import locate

if TYPE_CHECKING:
    from gemma_mtp.training.drafter_trainer import DrafterRecipe
    from gemma_mtp.training.losses import LossKind
    from gemma_mtp.training.run import Outcome
    from gemma_mtp.training.settings import DataSettings

WRITING, LEARNING, RUNNING, GATE = "What decoding will use", "Learning", "Running", "The gate"
#: exit code where the gate refuses what was trained
REFUSED = 3


@group(MODELS)
class ModelOptions:
    """The target, and the drafter to start from."""

    target: Path = option(
        REQUIRED, "The target: a directory, a GGUF file, or a name on the Hugging Face hub (see pull)."
    )
    out: Path = option(REQUIRED, "Directory for the drafter and the run's state.")
    drafter: Path | None = option(None, "The drafter to adapt. Else give --new.")
    adapter: Path | None = option(None, options.ADAPTER)
    quantize: str | None = option(None, options.QUANTIZE)
    strict: bool = option(False, options.STRICT)
    new: bool = option(False, "Make a new drafter of the official shape for the target.")


@group(MODELS)
class ShapeOptions:
    """The shape of a new drafter; the fields have DrafterShape's names."""

    hidden: int | None = option(None, "Hidden size. Default: the official one.", needs="--new")
    intermediate: int | None = option(None, "Width of the MLPs.", needs="--new")
    heads: int | None = option(None, "Query heads.", needs="--new")
    layers: int = option(4, "Layers: the last is full, the others are sliding.", needs="--new")
    centroids: int | None = option(None, "Make a centroid head of so many clusters of tokens.", needs="--new")
    centroid_top_k: int = option(32, "Clusters whose tokens are scored.", needs="--centroids")


@group(DATA)
class DataOptions:
    """What is trained on."""

    data: list[Path] = option(
        REQUIRED,
        "File or directory. May be repeated. Lines of .jsonl files have text, prompt or messages. Any other file is"
        " one text.",
    )
    pattern: str = option("*", 'Files of directories to take, such as "*.py".')
    regenerate: bool = option(
        False, "Train on what the target writes after each text: the default, and always so for prompts."
    )
    as_is: bool = option(False, "Train on texts as they stand. With --regenerate: on both.")
    length: int = option(512, "Tokens of a row. Longer documents are cut into rows.")
    max_new_tokens: int = option(256, "Most tokens that the target writes after a prompt.")
    written_tokens: int = option(400_000, "Most tokens that the target writes in all.")
    cache: Path | None = option(None, "Where written texts are kept for other runs. Default: in --out.")


@group(GATE)
class GateOptions:
    """How the gate measures, and what it lets pass."""

    held_out: Path | None = option(None, "Data to measure acceptance on. Default: a part of --data.")
    held_out_prompts: int = option(24, "Prompts that acceptance is measured on.")
    gate_steps: int | None = option(None, "Measure every so many steps too.")
    patience: int | None = option(
        None, "Stop after so many measurements without gain, and keep the best weights.", needs="--gate-steps"
    )
    draft_tokens: int = option(4, "Drafts a round when measuring.", "-k")
    gate_tokens: int = option(128, "Tokens after each prompt when measuring.")
    force: bool = option(False, "Export also what is worse than the start.")


@group(WRITING)
class DecodingOptions:
    """The decoding to come."""

    temperature: list[float] | None = option(
        None, "May be repeated; one given twice counts twice. Default: 0 and 1.", "-t"
    )
    top_k: int = option(0, "0: all tokens.")
    top_p: float = option(1.0, "1: all tokens.")


@group(LEARNING)
class LearningOptions:
    """What is made small, and how, and for how long."""

    loss: str = option(
        "lk", "kl, ce, tv, lk (KL far from the target, total variation near it) or lk-log (-log acceptance)."
    )
    draft_steps: int = option(5, "Drafts unrolled from every row.")
    step_decay: float = option(0.9, "Weight of a draft against the one before it.")
    own_tokens: float = option(
        0.9, "Share of rows that are drafted with the drafter's own tokens. Their loss ends where they go wrong."
    )
    steps: int | None = option(None, "Optimiser steps.")
    epochs: float | None = option(None, "Passes through the data. Default: 2, without --steps and --minutes.")
    minutes: float | None = option(None, "Minutes that the steps take, instead of --steps and --epochs.")
    batch: int = option(8, "Rows of one optimiser step.")
    lr: float = option(1e-3, "Peak learning rate of AdamW.")
    matrix_lr: float | None = option(None, "Train the layers' matrices by Muon, at this peak learning rate.")
    warmup: float = option(0.03, "Share of the run in which learning rates rise.")
    clip: float = option(1.0, "Longest gradient; longer ones are clipped.")


@group(RUNNING)
class RunningOptions:
    """What the run takes of the machine, and what it leaves there."""

    dtype: str = option("auto", "float32, bfloat16, or auto: bfloat16 where it is fast.")
    device: str = option("auto", options.DEVICE)
    threads: int | None = option(None, options.THREADS)
    memory: int = option(
        2048,
        "Most megabytes of activations, logits and gradients, beside weights and the optimiser's state.",
    )
    store_target: bool = option(
        False, "Keep the target's states, keys and values on disk after the first pass through the data."
    )
    compile: bool = option(False, "Compile the models first: a minute or two, then faster.")
    seed: int = option(1, "For initial weights, order and sampled text.")
    checkpoint_steps: int = option(100, "Steps between checkpoints.")
    resume: bool = option(False, "Go on from the run's last checkpoint.")
    tensorboard: bool = option(False, "Log to TensorBoard too (extra: train).")


@grouped
def train(
    models: ModelOptions,
    shape: ShapeOptions,
    data: DataOptions,
    gate: GateOptions,
    decoding: DecodingOptions,
    learning: LearningOptions,
    running: RunningOptions,
) -> None:
    """Train or adapt a drafter for a target, and export it if it is not worse than the one it started from.

    Started by torchrun, several processes share each step. Exits with 3 where the gate refuses the drafter.
    """
    _check(models, learning, running)
    use_threads(running.threads)
    drafter = None if models.drafter is None else locate(models.drafter, "drafter")

    from gemma_mtp.engine.pair import choose_device
    from gemma_mtp.freed_memory import keep_freed_memory
    from gemma_mtp.progress import say
    from gemma_mtp.training.parallel import joined_world
    from gemma_mtp.training.run import run_training
    from gemma_mtp.training.settings import RunSettings
    from gemma_mtp.training.shapes import DrafterShape
    from gemma_mtp.weight_types import parse_weight_types

    settings = RunSettings(
        target=locate(models.target), out=models.out, drafter=drafter, adapter=models.adapter,
        data=_data(data, gate, running),
        new=DrafterShape(**vars(shape)), recipe=_recipe(gate, decoding, learning, running),
        temperatures=tuple(decoding.temperature or (0.0, 1.0)), draft_tokens=gate.draft_tokens,
        gate_tokens=gate.gate_tokens, dtype=running.dtype, device=running.device,
        quantize=parse_weight_types(models.quantize or "none"), strict=models.strict, force=gate.force,
        resume=running.resume, tensorboard=running.tensorboard,
    )  # fmt: skip
    keep_freed_memory()
    with joined_world(choose_device(running.device)) as world:
        try:
            outcome = run_training(settings, world, say)
        except KeyboardInterrupt:
            if world.leads:
                say(how_to_go_on(models.out))
            raise
    if outcome is not None:
        _report(outcome, models.out)
        if not outcome.exported:
            raise typer.Exit(REFUSED)


def how_to_go_on(out: Path) -> str:
    """What to do after Ctrl-C."""
    from gemma_mtp.training.drafter_trainer import CHECKPOINT
    from gemma_mtp.training.run import STATE

    checkpoint = out / STATE / CHECKPOINT
    if checkpoint.exists():
        return f"interrupted; {checkpoint} keeps what was trained: go on by the same command with --resume."
    return "interrupted before the first step; the same command goes on from the texts written so far."


def _data(data: DataOptions, gate: GateOptions, running: RunningOptions) -> DataSettings:
    from gemma_mtp.training.settings import DataSettings

    return DataSettings(
        tuple(data.data), data.pattern, gate.held_out, gate.held_out_prompts, data.length,
        data.regenerate or not data.as_is, data.as_is, data.max_new_tokens, data.written_tokens, data.cache,
        running.store_target,
    )  # fmt: skip


def _recipe(
    gate: GateOptions, decoding: DecodingOptions, learning: LearningOptions, running: RunningOptions
) -> DrafterRecipe:
    from gemma_mtp.training.drafter_trainer import DrafterRecipe
    from gemma_mtp.training.step import Objective

    objective = Objective(
        cast("LossKind", learning.loss), learning.draft_steps, learning.step_decay, learning.own_tokens, decoding.top_k,
        decoding.top_p,
    )  # fmt: skip
    endless = learning.steps is None and learning.minutes is None and learning.epochs is None
    return DrafterRecipe(
        objective, learning.steps, 2.0 if endless else learning.epochs, learning.minutes, learning.batch, learning.lr,
        learning.matrix_lr, learning.warmup, learning.clip, running.memory, running.checkpoint_steps, gate.gate_steps,
        gate.patience, running.seed, running.compile,
    )  # fmt: skip


def _check(models: ModelOptions, learning: LearningOptions, running: RunningOptions) -> None:
    if models.new == (models.drafter is not None):
        raise TrainingError("give either --drafter, to adapt one, or --new, to make one.")
    from gemma_mtp.training.losses import LOSSES

    if learning.loss not in LOSSES:
        raise TrainingError(f"--loss is {learning.loss!r}, but must be one of {', '.join(LOSSES)}.")
    if sum(value is not None for value in (learning.steps, learning.epochs, learning.minutes)) > 1:
        raise TrainingError("--steps, --epochs and --minutes exclude each other; give one of them.")
    if running.dtype not in ("auto", "float32", "bfloat16"):
        raise TrainingError(f"--dtype is {running.dtype!r}, but must be auto, float32 or bfloat16.")


def _report(outcome: Outcome, out: Path) -> None:
    from gemma_mtp.training.gate import setting

    shown = console()
    for line in outcome.verdict.lines():
        shown.print(line, soft_wrap=True)
    for before, after in zip(outcome.start, outcome.now, strict=True):
        shares = [", ".join(f"{share:.3f}" for share in r.pooled.by_position) for r in (before, after)]
        shown.print(f"  {setting(after)}: acceptance by position {shares[0]} before, {shares[1]} after", soft_wrap=True)
    for when, speed in zip(("before", "after"), outcome.speeds, strict=True):
        shown.print(f"speed-up over plain decoding {when}: {speed}", soft_wrap=True)
    if not outcome.exported:
        refused = "not exported: the drafter is worse than the one it started from; --force exports it anyway."
        shown.print(refused, soft_wrap=True)
    else:
        shown.print(f"wrote {out}", soft_wrap=True)
