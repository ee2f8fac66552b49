"""Trains a drafter for a frozen target: batches, schedule, checkpoints, and when to stop."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma_mtp.errors import TrainingError
from gemma_mtp.interrupts import interrupted_later
from gemma_mtp.model.drafter import Drafter
from gemma_mtp.model.target import Target
from gemma_mtp.training.examples import PAD_MULTIPLE, BatchOrder, ExampleSet, padded_length
from gemma_mtp.training.log import RunLog
from gemma_mtp.training.memory import MEGABYTE, BlockPlan, memory_reported, plan_blocks
from gemma_mtp.training.optim import Masters, Optimiser, cosine
from gemma_mtp.training.parallel import World
from gemma_mtp.training.state import load_facts, load_state, save_state
from gemma_mtp.training.step import DraftStep, Objective, StepStats, StoredRows
from gemma_mtp.training.unroll import trained_head

CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True)
class DrafterRecipe:
    """How a drafter is trained. One of `steps`, `epochs` and `minutes` (wall time of the steps) says how long; only the
    first two give the same weights again. Learning rates are peaks; with `matrix_lr` the layers' matrices take Muon.
    `batch_size` counts sequences; they are worked through in blocks that hold `memory_mb` of
    activations, logits and gradients at most."""

    objective: Objective = field(default_factory=Objective)
    steps: int | None = None
    epochs: float | None = None
    minutes: float | None = None
    batch_size: int = 8
    lr: float = 1e-3
    matrix_lr: float | None = None
    warmup: float = 0.03
    clip: float = 1.0
    memory_mb: int = 2048
    checkpoint_steps: int = 100
    gate_steps: int | None = None
    patience: int | None = None
    seed: int = 1
    compile: bool = False

    def total_steps(self, examples: int) -> int | None:
        """Optimiser steps of the run, or None where wall time decides."""
        if self.steps is not None or self.epochs is None:
            return self.steps
        return max(1, round(self.epochs * examples / self.batch_size))


@dataclass(frozen=True)
class DrafterResult:
    """`best_step` is the step whose weights the drafter has: the last, unless the gate preferred an earlier one."""

    steps: int
    best_step: int
    tokens: int
    seconds: float
    predicted_length: float


#: where a setting is called otherwise on the command line
OPTIONS = {"batch_size": "batch", "objective.steps": "draft-steps", "data files": "data"}


def recipe_identity(recipe: DrafterRecipe) -> dict[str, Any]:
    """The settings that must be the same for a run to go on as it would have. Memory is one: it decides the blocks,
    and so the order of sums."""
    settings = asdict(recipe)
    settings.pop("checkpoint_steps")
    return settings


def check_resumable(checkpoint: Path, identity: Mapping[str, Any]) -> None:
    """Raise TrainingError naming the settings of `identity` that the checkpoint's run was given otherwise."""
    kept = _flat(load_facts(checkpoint)["recipe"])
    given = _flat(json.loads(json.dumps(identity)))
    others = [name for name, value in given.items() if kept.get(name) != value]
    if others:
        shown = ", ".join(_difference(name, kept.get(name), given[name]) for name in others)
        raise TrainingError(
            f"{checkpoint} was made with other settings: {shown}; give the same ones, or another --out to start anew."
        )


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    objective = settings.get("objective", {})
    rest = {name: value for name, value in settings.items() if name != "objective"}
    return {**rest, **{f"objective.{name}": value for name, value in objective.items()}}


def _difference(name: str, before: Any, now: Any) -> str:
    option = "--" + OPTIONS.get(name, name.removeprefix("objective.").removesuffix("_mb").replace("_", "-"))
    return option if name in ("target", "data", "data files") else f"{option} was {before} and is now {now}"


#: measures the drafter's mean acceptance length in the engine
Gate = Callable[[int], float]


class DrafterTrainer:
    """State of one run: weights, optimiser, and how far it is. `target_name` tells targets apart when resuming, and
    `told` are settings beside the recipe that must be the same then."""

    def __init__(
        self, target: Target, drafter: Drafter, examples: ExampleSet, recipe: DrafterRecipe, directory: Path,
        world: World = World(), stored_rows: StoredRows | None = None, target_name: str = "",
        told: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.target_name, self.told = target_name, told or {}
        self.drafter, self.recipe, self.world = drafter.requires_grad_(True), recipe, world
        self.checkpoint = directory / CHECKPOINT
        self.masters = Masters(drafter)
        self.optimiser = Optimiser(drafter, self.masters, recipe.lr, recipe.matrix_lr)
        self.length = padded_length(int(examples.lengths.max()))
        # what is compiled is compiled for one shape
        multiple = self.length if recipe.compile else PAD_MULTIPLE
        self.batches = BatchOrder(examples, recipe.batch_size, recipe.seed, multiple)
        self.draft_step = DraftStep(target.requires_grad_(False), drafter, recipe.objective, self.length,
                                    recipe.compile, stored_rows)  # fmt: skip
        self.total = recipe.total_steps(len(examples))
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.best_length, self.best_step, self.gates_without_gain = -math.inf, 0, 0
        self.best: dict[str, Tensor] = {}
        self.smooth: list[list[float]] = []

    def resume(self) -> None:
        """Go on from the last checkpoint, if there is one. Raises TrainingError where it is of another run."""
        if not self.checkpoint.exists():
            return
        check_resumable(self.checkpoint, self._identity())
        facts, self.best = load_state(self.checkpoint, self.masters, self.optimiser)
        del facts["recipe"]
        for name, value in facts.items():
            setattr(self, name, value)

    @torch.no_grad()
    def head_states(self, count: int) -> Tensor:
        """About `count` of the drafter's head states [N, H], from all steps of rows of the data."""
        found: list[Tensor] = []
        for step in range(self.batches.per_epoch):
            batch = self.batches.batch(step).rows(0, 1)
            states = self.draft_step.unroll(self.draft_step.compute_rows(batch.tokens_BT), batch.tokens_BT.shape[1])
            found += [state[0, batch.firsts[0] : batch.lengths[0] - 2 - i] for i, state in enumerate(states)]
            if sum(map(len, found)) >= count:
                break
        return torch.cat(found)

    def save(self) -> None:
        """Write the checkpoint (rank 0)."""
        if self.world.leads:
            names = ("step", "tokens", "seconds", "best_length", "best_step", "gates_without_gain", "smooth")
            facts = {"recipe": self._identity(), **{name: getattr(self, name) for name in names}}
            save_state(self.checkpoint, self.masters, self.optimiser, facts, self.best)

    def train(self, log: RunLog, gate: Gate | None = None) -> DrafterResult:
        """Run to the end, or until the gate has seen no gain `patience` times.

        Raises TrainingError where the loss stops being a number, memory does not suffice or a file can not be written.
        """
        recipe = self.recipe
        limit = recipe.memory_mb * MEGABYTE
        advice = f"lower --memory (now {recipe.memory_mb} MB), --length or --draft-steps"
        with memory_reported(f"in one sequence of {self.length} tokens", "lower --length or --draft-steps"):
            plan = plan_blocks(self.draft_step, self.length, recipe.batch_size, limit)
        log.display.say(plan.describe(self.length, limit))
        clock = time.monotonic() - self.seconds
        try:
            self._steps(plan, clock, advice, log, gate)
        except KeyboardInterrupt:  # between two steps: one that has begun is ended first
            log.flush()
            self.save()
            raise
        if gate is not None and recipe.gate_steps is not None:
            self._finish_with_best(gate)
        log.flush()
        self.save()
        return DrafterResult(self.step, self.best_step or self.step, self.tokens, self.seconds, self._length_seen())

    def _steps(self, plan: BlockPlan, clock: float, advice: str, log: RunLog, gate: Gate | None) -> None:
        recipe = self.recipe
        while (progress := self._progress(clock)) < 1 and not self._stopped_early():
            with memory_reported(f"in a block of {plan.sequences} sequences", advice), interrupted_later():
                values = self._one_step(plan, progress)
            self.seconds = time.monotonic() - clock
            values["tokens_per_second"] = self.tokens / self.seconds
            log.row(self.step, self._progress(clock), values, self._shown(values))
            gate_due = recipe.gate_steps is not None and self.step % recipe.gate_steps == 0
            if gate is not None and gate_due:
                self._pass_gate(gate)
            if gate_due or self.step % recipe.checkpoint_steps == 0:
                log.flush()
                self.save()

    def _one_step(self, plan: BlockPlan, progress: float) -> dict[str, float]:
        recipe = self.recipe
        batch = self.batches.batch(self.step)
        counts = batch.reached(recipe.objective.steps)
        start, stop = self.world.part(recipe.batch_size)
        stats = StepStats.zeros(recipe.objective.steps, self.draft_step.device)
        self.masters.clear()
        table = self.masters.gradient(trained_head(self.drafter))
        for first, last in plan.blocks(start, stop):
            self.draft_step.block(batch.rows(first, last), counts, stats, table, plan.slab_rows)
            self.masters.accumulate()
        self._sum_over_processes(stats)
        norm, loss = self.masters.clip(recipe.clip), stats.loss.item()
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise TrainingError(f"the loss became {loss} at step {self.step}; lower --lr, or use --dtype float32.")
        share = cosine(progress, recipe.warmup)
        self.optimiser.step(share)
        self.masters.publish()
        self.step += 1
        self.tokens += sum(batch.lengths)
        seen = [stats.reached_K.tolist(), stats.accepted_K.tolist()]
        weight = 0.05 if self.smooth else 1.0
        old = self.smooth or seen
        self.smooth = [
            [a + weight * (b - a) for a, b in zip(x, y, strict=True)] for x, y in zip(old, seen, strict=True)
        ]
        return {"loss": loss, "gradient_norm": norm, "lr_share": share, "tokens": float(self.tokens),
                "predicted_length": self._length_seen()}  # fmt: skip

    def _sum_over_processes(self, stats: StepStats) -> None:
        masters = self.masters.fp32.values()
        for master in masters:
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        self.world.sum_([*(m.grad for m in masters if m.grad is not None), stats.loss, stats.reached_K,
                         stats.accepted_K])  # fmt: skip

    def _progress(self, clock: float) -> float:
        if self.total is not None:
            return self.step / self.total
        assert self.recipe.minutes is not None
        share: float = self.world.from_leader((time.monotonic() - clock) / (60 * self.recipe.minutes))
        return share

    def _pass_gate(self, gate: Gate) -> None:
        length = self.world.from_leader(gate(self.step) if self.world.leads else None)
        if length > self.best_length:
            self.best_length, self.best_step, self.gates_without_gain = length, self.step, 0
            self.best = {name: p.detach().clone() for name, p in self.masters.fp32.items()}
        else:
            self.gates_without_gain += 1

    def _finish_with_best(self, gate: Gate) -> None:
        """Measure the last weights too, and take the best of all that were measured."""
        if self.step != self.best_step:
            self._pass_gate(gate)
        self.masters.load(self.best)

    def _stopped_early(self) -> bool:
        return self.recipe.patience is not None and self.gates_without_gain >= self.recipe.patience

    def _length_seen(self) -> float:
        """Mean acceptance length that decoding would have on what was trained on lately."""
        return 1 + sum(self.smooth[1]) / max(1e-9, self.smooth[0][0]) if self.smooth else 1.0

    def _shown(self, values: dict[str, float]) -> str:
        shares = [a / r if r else 0.0 for r, a in zip(*self.smooth, strict=True)]
        accepted = " ".join(f"{share:.2f}" for share in shares)
        return (
            f"step {self.step} loss {values['loss']:.3f} accepts {accepted} length {values['predicted_length']:.2f}"
            f" {values['tokens_per_second']:.0f} tokens/s"
        )

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on as it would have."""
        return {
            **recipe_identity(self.recipe), **self.told, "target": self.target_name,
            "data": self.batches.examples.digest(),
        }  # fmt: skip
