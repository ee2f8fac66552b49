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

from bundled_pair import corpus
from gemma_mtp.config import TargetConfig
from gemma_mtp.errors import TrainingError
from gemma_mtp.model.layers import rope_for
from gemma_mtp.model.target import Target
from gemma_mtp.training.attention import TrainingKeyValues
from gemma_mtp.training.log import RunLog
from gemma_mtp.training.optim import Masters, Optimiser, choose_dtype, traceable
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


def trapezoid(progress: float, warmup: float = 0.02, decay: float = 0.45) -> float:
    """Share of the peak learning rate at `progress` (0 to 1) of the run: up, flat, then linearly to zero."""
    if progress < warmup:
        return (progress + 1e-3) / (warmup + 1e-3)
    return max(0.0, min(1.0, (1.0 - progress) / decay))


class TargetTrainer:
    """State of one run: weights, optimiser, and how far it is."""

    def __init__(self, config: TargetConfig, recipe: TargetRecipe, checkpoint: Path, device: str) -> None:
        self.recipe, self.checkpoint = recipe, checkpoint
        self.target = Target(config.text)
        initialise(self.target, recipe.seed)  # on the CPU: the same weights on every device
        self.target.to(device)
        self.masters = Masters(self.target)
        self.target.to(choose_dtype("auto", torch.device(device)))
        self.masters.working = dict(self.target.named_parameters())
        self.optimiser = Optimiser(self.target, self.masters, recipe.embedding_lr, recipe.matrix_lr)
        self.step, self._started = 0, time.monotonic()
        self._smooth: float | None = None

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    @property
    def tokens(self) -> int:
        return self.step * self.recipe.batch_size * self.recipe.row_length

    def resume(self) -> None:
        """Go on from the last checkpoint, if there is one."""
        if self.checkpoint.exists():
            facts, _ = load_state(self.checkpoint, self.masters, self.optimiser)
            self.step, self._started = facts["step"], time.monotonic() - facts["seconds"]

    def save(self) -> None:
        facts = {"step": self.step, "seconds": self.seconds}
        save_state(self.checkpoint, self.masters, self.optimiser, facts, {})

    def take_step(self, loss: Tensor, lr_share: float) -> dict[str, float]:
        """Returns the step's figures. Raises TrainingError where the loss is no number."""
        loss.backward()
        self.masters.clear()
        self.masters.accumulate()
        norm, value = self.masters.clip(), loss.item()
        if not math.isfinite(value):
            raise TrainingError(f"the target's loss became {value} at step {self.step}; lower the learning rates.")
        self.optimiser.step(lr_share)
        self.masters.publish()
        self.step += 1
        self._smooth = value if self._smooth is None else 0.95 * self._smooth + 0.05 * value
        tokens, seconds = self.tokens, self.seconds
        return {"tokens": float(tokens), "loss": value, "gradient_norm": norm, "lr_share": lr_share,
                "seconds": seconds, "tokens_per_second": tokens / seconds}  # fmt: skip

    def shown(self, values: dict[str, float]) -> str:
        return f"step {self.step} loss {self._smooth:.3f} {values['tokens_per_second']:.0f} tokens/s"


def train_target(
    config: TargetConfig,
    training: corpus.TokenArray,
    held_out: corpus.TokenArray,
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
    trainer = TargetTrainer(config, recipe, directory / "target-state.safetensors", device)
    if resume:
        trainer.resume()
    loss_of = RowLoss(trainer.target, recipe.row_length)
    training_loss = compiled(loss_of) if recipe.compile else loss_of
    batches = corpus.BatchOrder(corpus.rows(training, recipe.row_length), recipe.batch_size, recipe.seed)
    budget, last_checkpoint = recipe.minutes * 60, time.monotonic()
    with RunLog(directory, "target", trainer.step) as log:
        while (elapsed := trainer.seconds) < budget:
            values = trainer.take_step(training_loss(batches.batch(trainer.step)), trapezoid(elapsed / budget))
            log.row(trainer.step, values["seconds"] / budget, values, trainer.shown(values))
            if time.monotonic() - last_checkpoint > recipe.checkpoint_minutes * 60:
                last_checkpoint = time.monotonic()
                log.flush()
                trainer.save()
                on_checkpoint(trainer.target)
    trainer.save()
    on_checkpoint(trainer.target)
    nats = held_out_loss(loss_of, held_out)
    bits_per_byte = nats / math.log(2) * (held_out.size / held_out_bytes)
    return TargetResult(trainer.target, trainer.step, trainer.tokens, trainer.seconds, nats, bits_per_byte)


@torch.no_grad()
def held_out_loss(loss_of: RowLoss, held_out: corpus.TokenArray, batch_size: int = 8) -> float:
    """Mean nats per token over every whole row of the held-out files."""
    rows_NT = corpus.rows(held_out, loss_of.row_length)
    losses, counts = [], []
    for start in range(0, len(rows_NT), batch_size):
        batch = torch.from_numpy(rows_NT[start : start + batch_size].astype("int64"))
        losses.append(float(loss_of(batch)))
        counts.append(len(batch))
    return sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
