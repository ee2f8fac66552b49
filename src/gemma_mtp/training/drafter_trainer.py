"""Trains a drafter for a frozen target, within a budget of wall time."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from gemma_mtp.config import DrafterConfig
from gemma_mtp.errors import TrainingError
from gemma_mtp.model.drafter import Drafter
from gemma_mtp.model.layers import rope_for
from gemma_mtp.model.target import Target
from gemma_mtp.training import data
from gemma_mtp.training.losses import DraftLoss, draft_loss, query_rope, target_rows
from gemma_mtp.training.optim import Masters, Optimiser, save_masters, traceable, trapezoid
from gemma_mtp.training.shapes import initialise


@dataclass(frozen=True)
class DrafterRecipe:
    """Half of each batch is corpus, half the target's own text. `steps` drafts are unrolled from every row."""

    minutes: float
    batch_size: int = 8
    steps: int = 5
    matrix_lr: float = 6e-3
    embedding_lr: float = 3e-3
    checkpoint_minutes: float = 2.0
    seed: int = 1
    threads: int = 2
    compile: bool = True


@dataclass(frozen=True)
class Acceptance:
    """Shares measured on given text, not decoded: `by_position[i]` is draft i's, given the drafts before it."""

    by_position: list[float]
    mean_length: float

    @staticmethod
    def of(hits: Tensor, reached: Tensor) -> Acceptance:
        """From counts per step; the text itself plays the target's choices."""
        shares = (hits / reached.clamp(min=1)).tolist()
        return Acceptance(shares, 1.0 + float(hits.sum() / reached[0].clamp(min=1)))


@dataclass(frozen=True)
class DrafterResult:
    drafter: Drafter
    steps: int
    tokens: int
    seconds: float


class DraftStep:
    """Tokens to loss: the frozen target's pass, then the drafter's unrolled steps."""

    def __init__(self, target: Target, drafter: Drafter, length: int, steps: int, compile: bool) -> None:
        dtype = target.norm.weight.dtype
        self.target, self.drafter, self.steps = target, drafter, steps
        self.target_rope = rope_for(target.config, torch.arange(length), dtype)
        self.query_rope = query_rope(drafter, length, dtype)
        if compile:
            traceable()
        self.rows: Callable[..., Any] = torch.compile(target_rows, dynamic=False) if compile else target_rows
        self.loss: Callable[..., DraftLoss] = torch.compile(draft_loss, dynamic=False) if compile else draft_loss

    def __call__(self, tokens_BT: Tensor) -> DraftLoss:
        rows = self.rows(self.target, tokens_BT, self.target_rope)
        return self.loss(self.drafter, rows, self.query_rope, self.steps)


def train_drafter(
    target: Target,
    config: DrafterConfig,
    corpus: data.TokenArray,
    written: data.TokenArray,
    recipe: DrafterRecipe,
    directory: Path,
    on_checkpoint: Callable[[Drafter], None] = lambda drafter: None,
    resume: bool = False,
) -> DrafterResult:
    """Train for `recipe.minutes` on rows of corpus [N, T] and of target-written text [M, T]; logs to drafter.csv.

    `target` is only read, in the dtype it comes in. Raises TrainingError where the loss stops being a number.
    """
    torch.set_num_threads(recipe.threads)
    drafter = Drafter(config)
    initialise(drafter, recipe.seed)
    masters = Masters(drafter)
    drafter.to(target.norm.weight.dtype)
    masters.working = dict(drafter.named_parameters())
    checkpoint = directory / "drafter-masters.safetensors"
    if resume and checkpoint.exists():
        masters.load(load_file(checkpoint))
    optimiser = Optimiser(drafter, masters, recipe.matrix_lr, recipe.embedding_lr)
    length, half = corpus.shape[1], recipe.batch_size // 2
    step_of = DraftStep(target.requires_grad_(False), drafter, length, recipe.steps, recipe.compile)
    sources = ((corpus, recipe.batch_size - half), (written, half))
    orders = [data.BatchOrder(rows_NT, count, recipe.seed) for rows_NT, count in sources]
    budget, start = recipe.minutes * 60, time.monotonic()
    step, last_checkpoint = 0, start
    counts = torch.zeros(2, recipe.steps)
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "drafter.csv").open("w", newline="") as file:
        log = csv.writer(file)
        log.writerow(["step", "tokens", "loss", "grad_norm", "lr_share", "seconds", "mean_acceptance_length"])
        while (elapsed := time.monotonic() - start) < budget:
            share = trapezoid(elapsed / budget)
            result = step_of(torch.cat([order.batch(step) for order in orders]))
            result.loss.backward()
            norm = masters.gather_gradients()
            value = result.loss.item()
            if not math.isfinite(value):
                raise TrainingError(f"the drafter's loss became {value} at step {step}; lower the learning rates.")
            optimiser.step(share)
            masters.publish()
            step += 1
            fresh = torch.stack((result.hits, result.reached)).float()
            counts = fresh if step == 1 else 0.95 * counts + 0.05 * fresh
            seen, tokens, seconds = Acceptance.of(*counts), step * recipe.batch_size * length, time.monotonic() - start
            log.writerow([step, tokens, f"{value:.4f}", f"{norm:.3f}", f"{share:.3f}", f"{seconds:.1f}",
                          f"{seen.mean_length:.3f}"])  # fmt: skip
            if step % 20 == 0:
                file.flush()
                shares = " ".join(f"{a:.2f}" for a in seen.by_position)
                left = max(0.0, budget - seconds) / 60
                print(f"drafter step {step} loss {value:.3f} norm {norm:.2f} lr {share:.2f} accepts {shares}"
                      f" {tokens / seconds:.0f} tok/s, {left:.1f} min left", flush=True)  # fmt: skip
            if time.monotonic() - last_checkpoint > recipe.checkpoint_minutes * 60:
                last_checkpoint = time.monotonic()
                save_masters(masters, checkpoint)
                on_checkpoint(drafter)
    save_masters(masters, checkpoint)
    on_checkpoint(drafter)
    return DrafterResult(drafter, step, step * recipe.batch_size * length, time.monotonic() - start)


@torch.no_grad()
def acceptance_on_rows(target: Target, drafter: Drafter, rows_NT: data.TokenArray, steps: int) -> Acceptance:
    """Acceptance if the rows' own tokens were the target's choices: true of text the target wrote greedily."""
    step_of = DraftStep(target, drafter, rows_NT.shape[1], steps, compile=False)
    totals = torch.zeros(2, steps)
    for start in range(0, len(rows_NT), 8):
        result = step_of(torch.from_numpy(rows_NT[start : start + 8].astype(np.int64)))
        totals += torch.stack((result.hits, result.reached))
    return Acceptance.of(*totals)
