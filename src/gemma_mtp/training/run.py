"""A whole run of `gemma-mtp train`: data, the target's own text, training, the gate, export."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch

from gemma_mtp import checkpoint
from gemma_mtp.backend.select import make_backend
from gemma_mtp.checkpoint.origin import origin_of
from gemma_mtp.config.pairing import check_pair
from gemma_mtp.datasets import read_examples
from gemma_mtp.engine.pair import Pair, choose_device, load_pair
from gemma_mtp.errors import TrainingError
from gemma_mtp.files.replace import claimed, replace_text
from gemma_mtp.json_files import write_json
from gemma_mtp.measure.acceptance import OnPrompt, Prompt, prompts_of
from gemma_mtp.model.drafter import CentroidHead, Drafter
from gemma_mtp.model.target import Target
from gemma_mtp.progress import Display, loading
from gemma_mtp.training.centroids import FIT_STATES, Recall, fit_head
from gemma_mtp.training.drafter_trainer import (
    CHECKPOINT,
    DrafterResult,
    DrafterTrainer,
    check_resumable,
    recipe_identity,
)
from gemma_mtp.training.examples import ExampleSet
from gemma_mtp.training.export import CARD, CardFacts, card, export_drafter
from gemma_mtp.training.gate import EngineGate, Reports, Speed, Verdict, judge, mean_length, setting
from gemma_mtp.training.log import RunLog
from gemma_mtp.training.material import Material, gather, hold_out
from gemma_mtp.training.memory import memory_reported
from gemma_mtp.training.optim import choose_dtype
from gemma_mtp.training.parallel import World
from gemma_mtp.training.settings import RunSettings, check_output, check_settings, check_unquantised
from gemma_mtp.training.shapes import initialise, new_drafter_config
from gemma_mtp.training.target_store import TargetStore
from gemma_mtp.training.written import Writing, fingerprint, write_texts
from gemma_mtp.weight_types import WeightTypes, merge
from gemma_mtp.weights.matrix import matrices

#: where a run keeps its state inside the output directory
STATE = "training"
#: settings that change nothing of what comes out, or that the card gives by what came of them
OF_THE_MACHINE = {"store_target", "cache", "memory_mb", "checkpoint_steps", "compile", "held_out_prompts"}


T = TypeVar("T")


@dataclass(frozen=True)
class Outcome:
    """What came of a run: whether the drafter was exported, and why. `speeds` are the start's and the drafter's."""

    exported: bool
    verdict: Verdict
    start: Reports
    now: Reports
    speeds: tuple[Speed, Speed]
    result: DrafterResult
    facts: CardFacts
    recall: Recall | None


class Run:
    """One run under way: the loaded models and where its files lie."""

    def __init__(self, settings: RunSettings, world: World, say: Callable[[str], None]) -> None:
        self.settings, self.world, self.say = settings, world, say
        self.state = settings.out / STATE
        source = checkpoint.open_source(settings.target, adapter=settings.adapter)
        target_config = checkpoint.read_target_config(source)
        check_settings(settings, target_config)
        if (self.state / CHECKPOINT).exists() and settings.resume:  # before anything takes long
            identity = {**recipe_identity(settings.recipe), **told(settings), "target": _target_name(settings)}
            check_resumable(self.state / CHECKPOINT, identity)
        elif settings.resume:
            self.say(f"{self.state} holds no checkpoint to go on from: beginning anew")
        self.device = choose_device(settings.device)
        self.dtype = choose_dtype(settings.dtype, self.device)
        if settings.drafter is not None:
            self.config = checkpoint.read_drafter_config(settings.drafter)
        else:
            self.config = new_drafter_config(target_config, settings.new)
        check_pair(target_config, self.config)
        self.weight_types = merge(checkpoint.read_weight_types(source), settings.quantize)
        if settings.drafter is not None:
            check_unquantised(settings.drafter)
        # training scores the whole vocabulary; a centroid head is made when it is done
        self.plain_config = replace(self.config, use_ordered_embeddings=False)
        self.known_head: CentroidHead | None = None
        self.tokenizer = source.tokenizer()
        if world.leads:  # one process alone, or two would move the same probe
            check_output(settings, self.state)
        with loading(quiet=not world.leads) as on_bytes:
            self.target = checkpoint.load_target(source, self.dtype, self.device, settings.quantize, settings.strict,
                                                 partial(on_bytes, "target"))  # fmt: skip
            quantised = any(matrix.stored.quantised or matrix.activations for matrix in matrices(self.target))
            self.target.dequantise_()
        self.target_name = _target_name(settings)
        self.pair = self._engine_pair(quantised)

    def _engine_pair(self, quantised: bool) -> Pair:
        """Returns the target again, as the engine runs it. It shares the weights where it runs on the same device, and
        is not quantised."""
        settings = self.settings
        device = self.device if settings.engine_device is None else choose_device(settings.engine_device)
        if device != self.device or quantised:
            with loading(quiet=not self.world.leads) as on_bytes:
                return load_pair(
                    settings.target,
                    adapter=settings.adapter,
                    device=device,
                    quantize=settings.quantize,
                    use_drafter=False,
                    on_bytes=on_bytes,
                )
        with torch.device("meta"):
            target = Target(self.target.config)
        target.load_state_dict(self.target.state_dict(), assign=True)
        backend = make_backend(target.eval().requires_grad_(False))
        return Pair(backend, self.tokenizer, checkpoint.read_generation_config(settings.target))

    def material(self) -> Material:
        """The data, tokenised, with prompts held out of it or read from elsewhere."""
        data, vocab_size = self.settings.data, self.target.config.vocab_size
        found = gather(read_examples(data.paths, data.pattern), self.tokenizer, vocab_size, data.length)
        if data.held_out is None:
            return hold_out(found, data.held_out_prompts)
        held_out = prompts_of(self.pair, islice(read_examples(data.held_out, data.pattern), data.held_out_prompts))
        return Material(found, held_out)

    def examples(self, material: Material, starting: Path) -> ExampleSet:
        """What is trained on: the texts as they stand, those that the target writes, or both."""
        settings, data = self.settings, self.settings.data
        parts = []
        if data.as_is:
            parts.append(material.as_is(settings.temperatures))
        if data.regenerate or any(unit.open for unit in material.units):
            units = material.units if data.regenerate else [unit for unit in material.units if unit.open]
            parts.append(self._written(replace(material, units=units), starting))
        examples = parts[0] if len(parts) == 1 else parts[0].joined(parts[1])
        if not len(examples):
            raise TrainingError("no text of the data is long enough to draft in: at least 3 tokens; add longer text.")
        return examples

    def _written(self, material: Material, starting: Path) -> ExampleSet:
        settings, data = self.settings, self.settings.data
        objective = settings.recipe.objective
        writing = Writing(settings.temperatures, objective.top_k, objective.top_p, data.written_tokens,
                          settings.recipe.seed)  # fmt: skip
        pair = self.pair
        if settings.drafter is not None:
            pair = self.gate([]).with_drafter(starting)
        beginnings = material.beginnings(data.length, data.max_new_tokens)
        cache, name = data.cache or self.state / "cache", self.target_name
        with Display("writing", 0.0) as display:
            return write_texts(pair, beginnings, writing, cache, name,
                               lambda tokens, share: display.show(f"{tokens} tokens", share))  # fmt: skip

    def gate(self, prompts: list[Prompt]) -> EngineGate:
        objective, settings = self.settings.recipe.objective, self.settings
        temperatures = tuple(dict.fromkeys(settings.temperatures))  # one given twice is trained more, measured once
        return EngineGate(self.pair, prompts, temperatures, settings.draft_tokens, settings.gate_tokens,
                          objective.top_k, objective.top_p, self.weight_types)  # fmt: skip

    def start(self) -> tuple[Drafter, Path]:
        """The drafter to train, fp32 or bf16 as asked for, and the directory that holds it as it is now."""
        if self.settings.drafter is not None:
            start, strict = self.settings.drafter, self.settings.strict
            drafter = checkpoint.load_drafter(start, self.dtype, self.device, strict=strict)
            self.known_head = drafter.masked_embedding
            drafter.masked_embedding, drafter.config = None, self.plain_config
            return drafter, start
        drafter = Drafter(self.plain_config)
        initialise(drafter, self.settings.recipe.seed)
        directory = self.state / "start"
        if self.world.leads:
            self.export(drafter, directory)
        return drafter.to(self.device, self.dtype), directory

    def facts(self, drafter: Drafter, result: DrafterResult, examples: ExampleSet) -> CardFacts:
        """What the card says of this run."""
        settings = self.settings
        data = {"texts": len(examples), "tokens": len(examples.tokens), "written_tokens": examples.written_tokens}
        recipe = {**asdict(settings.recipe), "temperatures": settings.temperatures, "dtype": self.dtype,
                  "quantised": _listed(self.weight_types) or None}  # fmt: skip
        return CardFacts(
            origin_of(settings.target),
            "from scratch" if settings.drafter is None else f"starting from `{settings.drafter.resolve().name}`",
            sum(p.numel() for p in drafter.parameters()), result.best_step, result.tokens, result.seconds,
            {**_shown(asdict(settings.data)), **data}, _shown(recipe),
        )  # fmt: skip

    def export(self, drafter: Drafter, directory: Path) -> None:
        export_drafter(drafter, drafter.config, directory, self.settings.target, self.settings.draft_tokens)

    def finish(self, trainer: DrafterTrainer) -> Recall | None:
        """Give the trained drafter its centroid head, if it is to have one."""
        if not self.config.use_ordered_embeddings:
            return None
        recall = fit_head(trainer.drafter, self.config, trainer.head_states(FIT_STATES), self.known_head,
                          self.settings.recipe.seed)  # fmt: skip
        self.say(str(recall))
        return recall


@memory_reported("outside of training's blocks", "take --dtype bfloat16, a smaller target or a shorter --length")
def run_training(settings: RunSettings, world: World, say: Callable[[str], None]) -> Outcome | None:
    """Run `settings`; the outcome in rank 0, None in the others. `say` is called with lines for the user.

    Raises DataError, TrainingError, CheckpointError, ConfigError, PairError, TokenizerError.
    """
    lock = settings.out / STATE / "lock"
    with claimed(settings.out, lock) if world.leads else contextlib.nullcontext():
        return _run_training(settings, world, say if world.leads else lambda text: None)


def _run_training(settings: RunSettings, world: World, say: Callable[[str], None]) -> Outcome | None:
    run = Run(settings, world, say)
    material = run.material()
    drafter, starting = run.start()
    prepared = run.state / "examples.safetensors"
    if world.leads:
        run.examples(material, starting).save(prepared)
    world.from_leader(None)
    examples = ExampleSet.load(prepared)
    run.say(
        f"training on {len(examples)} texts, {len(examples.tokens)} tokens; {len(material.held_out)} held-out prompts"
    )
    gate = run.gate(material.held_out)
    start = _displayed("measuring the start", partial(gate.measure, starting)) if world.leads else ()
    if start:
        run.say(f"start: mean acceptance length {_lengths(start)}")
    candidate = run.state / "candidate"

    def measured(step: int) -> float:
        run.export(drafter, candidate)
        display = log.display  # on which the share of steps that is done stays
        reports = gate.measure(
            candidate, lambda done, of: display.show(f"measuring: prompt {done} of {of}", display.share)
        )
        run.say(f"step {step}: mean acceptance length {_lengths(reports)}")
        return mean_length(reports)

    rows = run.state / "target-rows" / f"{run.target_name}-{examples.digest()}-{str(run.dtype).removeprefix('torch.')}"
    stored = TargetStore(rows) if settings.data.store_target else None
    trainer = DrafterTrainer(run.target, drafter, examples, settings.recipe, run.state, world, stored,
                             run.target_name, told(settings))  # fmt: skip
    trainer.resume()
    with RunLog(run.state, "drafter", trainer.step, settings.tensorboard, quiet=not world.leads) as log:
        result = trainer.train(log, measured)
    if not world.leads:
        return None
    recall = run.finish(trainer)
    return _conclude(run, gate, drafter, starting, start, result, run.facts(drafter, result, examples), recall)


def _conclude(
    run: Run, gate: EngineGate, drafter: Drafter, starting: Path, start: Reports, result: DrafterResult,
    facts: CardFacts, recall: Recall | None,
) -> Outcome:  # fmt: skip
    """Measure what was trained, and export it where it is not worse than the start."""
    settings, candidate = run.settings, run.state / "candidate"
    run.export(drafter, candidate)
    now = _displayed("measuring what was trained", partial(gate.measure, candidate))
    verdict = judge(start, now)
    speeds = (_displayed("timing the start", partial(gate.speed, starting, start)),
              _displayed("timing what was trained", partial(gate.speed, candidate, now)))  # fmt: skip
    exported = verdict.not_worse or settings.force
    outcome = Outcome(exported, verdict, start, now, speeds, result, facts, recall)
    write_json(run.state / "gate.json", to_json(outcome))
    if exported:
        run.export(drafter, settings.out)
        replace_text(settings.out / CARD, card(facts, start, now, verdict, recall))
    return outcome


def _displayed(name: str, measure: Callable[[OnPrompt], T]) -> T:
    """Returns what is measured, while it is shown how many of the prompts are done."""
    with Display(name) as display:
        return measure(lambda done, of: display.show(f"prompt {done} of {of}", done / of))


def to_json(outcome: Outcome) -> dict[str, Any]:
    """The gate's figures for programs to read."""
    return {
        "exported": outcome.exported,
        "not_worse": outcome.verdict.not_worse,
        "overall": asdict(outcome.verdict.overall),
        "at_temperature": [{"temperature": t, **asdict(c)} for t, c in outcome.verdict.at_temperature],
        "start": [report.to_dict() for report in outcome.start],
        "now": [report.to_dict() for report in outcome.now],
        "speed_up": [{**asdict(s), "measured_ratio": s.measured.ratio} for s in outcome.speeds],
        "training": asdict(outcome.result),
        "centroid_recall": None if outcome.recall is None else asdict(outcome.recall),
    }


def told(settings: RunSettings) -> dict[str, Any]:
    """What a run is told beside its recipe that must be the same when it goes on, by the options' names."""
    data = settings.data
    drafter = settings.drafter
    return {
        "drafter": None if drafter is None else str(drafter.resolve()),
        "adapter": None if settings.adapter is None else str(settings.adapter.resolve()),
        **(asdict(settings.new) if drafter is None else {}),
        "data files": [str(path.resolve()) for path in data.paths], "pattern": data.pattern,
        "held-out": None if data.held_out is None else str(data.held_out.resolve()),
        "held-out-prompts": data.held_out_prompts, "length": data.length, "regenerate": data.regenerate,
        "as-is": data.as_is, "max-new-tokens": data.max_new_tokens, "written-tokens": data.written_tokens,
        "temperature": list(settings.temperatures), "draft-tokens": settings.draft_tokens,
        "gate-tokens": settings.gate_tokens, "dtype": settings.dtype, "quantize": _listed(settings.quantize),
    }  # fmt: skip


def _lengths(reports: Reports) -> str:
    return ", ".join(f"{report.pooled.mean_length:.3f} ({setting(report)})" for report in reports)


def _shown(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings for the card: without what was left out or is the machine's own, and files by their names."""
    kept = {name: value for name, value in settings.items() if value is not None and name not in OF_THE_MACHINE}
    if "paths" in kept:
        kept["paths"] = ", ".join(path.name for path in kept["paths"])
    return {name: value.name if isinstance(value, Path) else value for name, value in kept.items()}


def _target_name(settings: RunSettings) -> str:
    """What tells the target that is trained for from others: its file's weights, and how they are quantised then."""
    quantised = _listed(settings.quantize.of_target(), "-")
    return "-".join(filter(None, (fingerprint(settings.target, settings.adapter), quantised)))


def _listed(types: WeightTypes, separator: str = ", ") -> str:
    return separator.join(f"{part}={kind}" for part, kind in types.quantised.items())
