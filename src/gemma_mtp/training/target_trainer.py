"""Trains the bundled target from scratch, within a budget of wall time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma_mtp.config import TargetConfig
from gemma_mtp.errors import TrainingError
from gemma_mtp.model.layers import rope_for
from gemma_mtp.model.target import Target
from gemma_mtp.training import data
from gemma_mtp.training.attention import TrainingKeyValues
from gemma_mtp.training.log import RunLog
from gemma_mtp.training.optim import Masters, Optimiser, choose_dtype, traceable, trapezoid
from gemma_mtp.training.shapes import initialise
from gemma_mtp.training.state import load_state, save_state


@dataclass(frozen=True)
class TargetRecipe:
    """How long and how fast. Learning rates are peaks; `batch_size` counts rows of `row_length` tokens."""

    minutes: float
    batch_size: int = 8
    row_length: int = 512
    matrix_lr: float = 4e-3
    embedding_lr: float = 3e-3
    checkpoint_minutes: float = 2.0
    seed: int = 0
    threads: int = 2
    compile: bool = True


@dataclass(frozen=True)
class TargetResult:
    """What the model card reports."""

    target: Target
    steps: int
    tokens: int
    seconds: float
    held_out_nats_per_token: float
    held_out_bits_per_byte: float


class RowLoss:
    """Mean next-token cross-entropy of rows of one length."""

    def __init__(self, target: Target, row_length: int) -> None:
        self.target, self.row_length = target, row_length
        weight = target.norm.weight
        self.device = weight.device
        self.rope = rope_for(target.config, torch.arange(row_length, device=self.device), weight.dtype)

    def __call__(self, tokens_BT: Tensor) -> Tensor:
        tokens_BT = tokens_BT.to(self.device)
        hidden = self.target(tokens_BT, self.rope, TrainingKeyValues(self.target.config, self.row_length))
        logits = self.target.logits(hidden[:, :-1]).flatten(0, 1)
        return F.cross_entropy(logits.float(), tokens_BT[:, 1:].flatten())


def compiled(loss_of: RowLoss) -> Callable[[Tensor], Tensor]:
    """The loss as one compiled graph: a quarter faster on two cores, after a minute or two of compiling."""
    traceable()
    compiled_loss: Callable[[Tensor], Tensor] = torch.compile(loss_of.__call__, dynamic=False)
    return compiled_loss


def train_target(
    config: TargetConfig,
    training: data.TokenArray,
    held_out: data.TokenArray,
    held_out_bytes: int,
    recipe: TargetRecipe,
    directory: Path,
    on_checkpoint: Callable[[Target], None] = lambda target: None,
    resume: bool = False,
    device: str = "cpu",
) -> TargetResult:
    """Train for `recipe.minutes`, the learning rate reaching zero at the end. Logs to `directory/target.csv`.

    Raises TrainingError where the loss stops being a number.
    """
    torch.set_num_threads(recipe.threads)
    target = Target(config.text)
    initialise(target, recipe.seed)  # on the CPU: the same weights on every device
    target.to(device)
    masters = Masters(target)
    target.to(choose_dtype("auto", torch.device(device)))
    masters.working = dict(target.named_parameters())
    optimiser = Optimiser(target, masters, recipe.embedding_lr, recipe.matrix_lr)
    checkpoint = directory / "target-state.safetensors"
    step, before = 0, 0.0
    if resume and checkpoint.exists():
        facts, _ = load_state(checkpoint, masters, optimiser)
        step, before = facts["step"], facts["seconds"]
    loss_of = RowLoss(target, recipe.row_length)
    training_loss = compiled(loss_of) if recipe.compile else loss_of
    batches = data.BatchOrder(data.rows(training, recipe.row_length), recipe.batch_size, recipe.seed)
    budget, start = recipe.minutes * 60, time.monotonic() - before
    last_checkpoint, smooth = time.monotonic(), None
    with RunLog(directory, "target", step) as log:
        while (elapsed := time.monotonic() - start) < budget:
            share = trapezoid(elapsed / budget)
            loss = training_loss(batches.batch(step))
            loss.backward()
            masters.clear()
            masters.accumulate()
            norm, value = masters.clip(), loss.item()
            if not math.isfinite(value):
                raise TrainingError(f"the target's loss became {value} at step {step}; lower the learning rates.")
            optimiser.step(share)
            masters.publish()
            step += 1
            smooth = value if smooth is None else 0.95 * smooth + 0.05 * value
            tokens, seconds = step * recipe.batch_size * recipe.row_length, time.monotonic() - start
            values = {"tokens": float(tokens), "loss": value, "gradient_norm": norm, "lr_share": share,
                      "seconds": seconds, "tokens_per_second": tokens / seconds}  # fmt: skip
            log.row(step, seconds / budget, values, f"step {step} loss {smooth:.3f} {tokens / seconds:.0f} tokens/s")
            if time.monotonic() - last_checkpoint > recipe.checkpoint_minutes * 60:
                last_checkpoint = time.monotonic()
                log.flush()
                save_state(checkpoint, masters, optimiser, {"step": step, "seconds": seconds}, {})
                on_checkpoint(target)
    save_state(checkpoint, masters, optimiser, {"step": step, "seconds": time.monotonic() - start}, {})
    on_checkpoint(target)
    nats = held_out_loss(loss_of, held_out)
    tokens_per_byte = held_out.size / held_out_bytes
    return TargetResult(target, step, step * recipe.batch_size * recipe.row_length, time.monotonic() - start, nats,
                        nats / math.log(2) * tokens_per_byte)  # fmt: skip


@torch.no_grad()
def held_out_loss(loss_of: RowLoss, held_out: data.TokenArray, batch_size: int = 8) -> float:
    """Mean nats per token over every whole row of the held-out files."""
    rows_NT = data.rows(held_out, loss_of.row_length)
    losses, counts = [], []
    for start in range(0, len(rows_NT), batch_size):
        batch = torch.from_numpy(rows_NT[start : start + batch_size].astype("int64"))
        losses.append(float(loss_of(batch)))
        counts.append(len(batch))
    return sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
