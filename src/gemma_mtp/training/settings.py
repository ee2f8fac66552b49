"""What a run of `gemma-mtp train` is told, and what of it can not work."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from gemma_mtp import checkpoint
from gemma_mtp.checkpoint.source import FLOAT_DTYPES
from gemma_mtp.config import TargetConfig
from gemma_mtp.decoding.noise import MAX_DRAFT_TOKENS
from gemma_mtp.errors import CheckpointError, TrainingError
from gemma_mtp.files.replace import replace_text
from gemma_mtp.training.drafter_trainer import CHECKPOINT, DrafterRecipe
from gemma_mtp.training.losses import choice_at
from gemma_mtp.training.material import HELD_OUT_PROMPTS
from gemma_mtp.training.shapes import DrafterShape
from gemma_mtp.weight_types import WeightTypes


@dataclass(frozen=True)
class DataSettings:
    """What is trained on: `paths` (files and directories), `regenerate` and `as_is` of it, in rows of `length`."""

    paths: tuple[Path, ...]
    pattern: str = "*"
    held_out: Path | None = None
    held_out_prompts: int = HELD_OUT_PROMPTS
    length: int = 512
    regenerate: bool = True
    as_is: bool = False
    max_new_tokens: int = 256
    written_tokens: int = 400_000
    cache: Path | None = None
    store_target: bool = False


@dataclass(frozen=True)
class RunSettings:
    """Everything that a run is told. Without `drafter`, a new one of shape `new` is made. `adapter` is merged
    into the target. `quantize` is what decoding
    will quantise while loading; what the target's checkpoint has quantised already stays so. `engine_device` is where
    the target writes and drafters are measured, if not on the `device` that they are trained on."""

    target: Path
    out: Path
    data: DataSettings
    drafter: Path | None = None
    adapter: Path | None = None
    new: DrafterShape = field(default_factory=DrafterShape)
    recipe: DrafterRecipe = field(default_factory=DrafterRecipe)
    temperatures: tuple[float, ...] = (0.0, 1.0)
    draft_tokens: int = 4
    gate_tokens: int = 128
    dtype: str = "auto"
    device: str = "auto"
    engine_device: str | None = None
    quantize: WeightTypes = field(default_factory=WeightTypes)
    strict: bool = False
    force: bool = False
    resume: bool = False
    tensorboard: bool = False


def check_settings(settings: RunSettings, target: TargetConfig) -> None:
    """Raise TrainingError naming an option whose value can not work, or SamplingError."""
    context = target.text.max_position_embeddings
    for name, value, least, most in _ranges(settings, context):
        if value is not None and not least <= value <= most:
            expected = f"{least} or more" if most == math.inf else f"from {least} to {most}"
            raise TrainingError(f"{name} is {value}, but must be {expected}.")
    recipe = settings.recipe
    positive = {"--lr": recipe.lr, "--matrix-lr": recipe.matrix_lr, "--epochs": recipe.epochs,
                "--minutes": recipe.minutes, "--clip": recipe.clip}  # fmt: skip
    for name, rate in positive.items():
        if rate is not None and not 0 < rate < math.inf:
            raise TrainingError(f"{name} is {rate}, but must be a number above 0.")
    for temperature in settings.temperatures:
        choice_at(temperature, recipe.objective.top_k, recipe.objective.top_p)


def _ranges(settings: RunSettings, context: int) -> Iterator[tuple[str, float | None, float, float]]:
    """Options with their values, and the least and the most that work; None: not given."""
    data, recipe, objective, endless = settings.data, settings.recipe, settings.recipe.objective, math.inf
    yield "--hidden", settings.new.hidden, 1, endless
    yield "--intermediate", settings.new.intermediate, 1, endless
    yield "--heads", settings.new.heads, 1, endless
    yield "--layers", settings.new.layers, 1, endless
    yield "--length", data.length, 16, context
    yield "--max-new-tokens", data.max_new_tokens, 1, endless
    yield "--written-tokens", data.written_tokens, 1, endless
    yield "--held-out-prompts", data.held_out_prompts, 2, endless
    yield "--draft-steps", objective.steps, 1, MAX_DRAFT_TOKENS
    yield "--step-decay", objective.step_decay, 0, endless
    yield "--own-tokens", objective.own_tokens, 0, 1
    yield "--batch", recipe.batch_size, 1, endless
    yield "--steps", recipe.steps, 1, endless
    yield "--warmup", recipe.warmup, 0, 1
    yield "--checkpoint-steps", recipe.checkpoint_steps, 1, endless
    yield "--gate-steps", recipe.gate_steps, 1, endless
    yield "--patience", recipe.patience, 1, endless
    yield "--draft-tokens", settings.draft_tokens, 1, MAX_DRAFT_TOKENS
    yield "--gate-tokens", settings.gate_tokens, settings.draft_tokens + 2, endless


def check_output(settings: RunSettings, state: Path) -> None:
    """Raise TrainingError where the output can not be written, or another run's state lies there. Leaves nothing."""
    if (state / CHECKPOINT).exists() and not settings.resume:
        raise TrainingError(
            f"{state} holds an unfinished or finished run; go on with it by --resume, or give another --out."
        )
    probe, made = state / "writable", [path for path in (state, *state.parents) if not path.exists()]
    try:
        replace_text(probe, "yes")
        probe.unlink()
        for directory in made:
            directory.rmdir()
    except (CheckpointError, OSError) as error:
        raise TrainingError(f"the output directory {settings.out} can not be written: {error}") from None


def check_unquantised(drafter: Path) -> None:
    """Raises TrainingError for a drafter that `gemma-mtp quantize` wrote, or whose file has quantised values that are
    kept as they are, or rounds activations."""
    headers = checkpoint.text_headers(checkpoint.open_source(drafter, "drafter"))
    kept = any(checkpoint.kinds_of(header, fp8=False) for header in headers.values())
    blocks = checkpoint.stored_dtypes(drafter) - FLOAT_DTYPES.keys()
    if kept or blocks or checkpoint.read_weight_types(drafter) or checkpoint.rounded_products(headers.values()):
        raise TrainingError(
            f"{drafter} is a quantised drafter, which can not be trained; give the drafter it was made from, and"
            " --quantize to measure what is trained as it will be quantised."
        )
