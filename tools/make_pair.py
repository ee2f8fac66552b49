"""Reproduce the bundled pair: corpus, tokenizer, target, drafter, evaluation, model card.

    python tools/make_pair.py --device cuda                                        # as the bundled pair was made
    python tools/make_pair.py                                                      # without a GPU: hours, a weaker one

Target and drafter are trained on --device; the text that the target writes itself, and the gate, are the engine's work
on the CPU. Intermediate files go to --work. With --resume, stages whose results lie there are not run again, and one
broken off goes on from its last checkpoint: so each may run on another machine.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bundled_pair import bpe, bundle, corpus
from bundled_pair.bundle import BUNDLED_TARGET
from bundled_pair.target_trainer import TargetRecipe, train_target
from tokenizers import Tokenizer

from gemma_mtp import cli  # noqa: F401  (sets what PyTorch reads when it is imported)
from gemma_mtp.backend.native import set_threads
from gemma_mtp.backend.processor import processor
from gemma_mtp.datasets import read_examples
from gemma_mtp.engine.pair import load_pair
from gemma_mtp.files.replace import replace_text
from gemma_mtp.freed_memory import keep_freed_memory
from gemma_mtp.json_files import read_json, write_json
from gemma_mtp.measure.acceptance import GREEDY, measure_acceptance, prompts_of
from gemma_mtp.training.drafter_trainer import DrafterRecipe
from gemma_mtp.training.export import CARD
from gemma_mtp.training.parallel import World
from gemma_mtp.training.run import STATE, run_training
from gemma_mtp.training.settings import DataSettings, RunSettings

#: what the drafter is to be good at: greedy, and drawn at these temperatures; the hardest to draft at counts twice
TEMPERATURES = (0.0, 0.7, 1.0, 1.0)
DRAFTER_ROW_LENGTH = 512
#: wall minutes of the target's training and of the drafter's, by recipe
MINUTES = {"gpu": (4.3, 9.2), "cpu": (240.0, 120.0)}
#: text of the corpus that the drafter sees as it stands, and that the target goes on from
DRAFTER_CORPUS_BYTES = 4 << 20


def main(arguments: argparse.Namespace) -> None:
    """Run the stages whose results `work` lacks, then evaluate and write the bundle."""
    work, resume = arguments.work, arguments.resume
    set_threads(arguments.threads)
    keep_freed_memory()
    work.mkdir(parents=True, exist_ok=True)
    target, drafter = target_recipe(arguments), drafter_recipe(arguments)
    if not (resume and (work / "corpus.json").exists()):
        prepare_corpus(work)
    if not (resume and (work / "target.json").exists()):
        make_target(target, work, resume, arguments.device)
    if not (resume and (work / "drafter.json").exists()):
        make_drafter(drafter_settings(drafter, arguments), work)
    write_bundle({"target": target, "drafter": drafter}, arguments.trained_on, work, arguments.out)


def target_recipe(arguments: argparse.Namespace) -> TargetRecipe:
    """For a GPU, rows of the whole context, and as many as keep it busy."""
    rows: dict[str, Any] = {"batch_size": 32, "row_length": 2048, "compile": False} if arguments.recipe == "gpu" else {}
    return TargetRecipe(minutes=arguments.minutes_target, threads=arguments.threads, **rows)


def drafter_recipe(arguments: argparse.Namespace) -> DrafterRecipe:
    for_gpu = arguments.recipe == "gpu"
    return DrafterRecipe(minutes=arguments.minutes_drafter, lr=3e-3, matrix_lr=6e-3, batch_size=48 if for_gpu else 8,
                         memory_mb=40_000 if for_gpu else 2048, compile=not for_gpu)  # fmt: skip


def prepare_corpus(work: Path) -> None:
    """Corpus and tokenizer: token arrays, held-out lists and the record of sources."""
    made = corpus.build_corpus(work / "wheels")
    tokenizer = bpe.train_tokenizer(document.text for document in made.training)
    bpe.save_tokenizer(tokenizer, work / "tokenizer", BUNDLED_TARGET.text.max_position_embeddings)
    training = corpus.pack(made.training, tokenizer, bpe.EOS)
    held_out = corpus.pack(made.held_out, tokenizer, bpe.EOS)
    np.save(work / "training.npy", training)
    np.save(work / "held_out.npy", held_out)
    corpus.save_json(made.record, work / "sources.json")
    corpus.save_json([document.name for document in made.held_out], work / "heldout.json")
    corpus.save_json_lines(corpus.held_out_prompts(made.held_out, tokenizer), work / "heldout_prompts.jsonl")
    sample = corpus.sample(made.training, DRAFTER_CORPUS_BYTES)
    corpus.save_json_lines(({"text": d.text, "source": d.name} for d in sample), work / "drafter_corpus.jsonl")
    write_json(work / "corpus.json", {
        "corpus_tokens": int(training.size), "held_out_tokens": int(held_out.size),
        "held_out_bytes": sum(len(document.text.encode()) for document in made.held_out),
    })  # fmt: skip


def make_target(recipe: TargetRecipe, work: Path, resume: bool, device: str) -> None:
    tokenizer = Tokenizer.from_file(str(work / "tokenizer" / "tokenizer.json"))
    training, held_out = np.load(work / "training.npy"), np.load(work / "held_out.npy")
    trained = train_target(
        BUNDLED_TARGET, training, held_out, read_json(work / "corpus.json")["held_out_bytes"], recipe, work,
        on_checkpoint=lambda model: bundle.export_target(model, BUNDLED_TARGET, tokenizer, work / "target"),
        resume=resume, device=device,
    )  # fmt: skip
    write_json(work / "target.json", {
        "target_parameters": sum(parameter.numel() for parameter in trained.target.parameters()),
        "target_steps": trained.steps, "target_tokens": trained.tokens, "target_seconds": trained.seconds,
        "held_out_nats_per_token": trained.held_out_nats_per_token,
        "held_out_bits_per_byte": trained.held_out_bits_per_byte,
    })  # fmt: skip


def drafter_settings(recipe: DrafterRecipe, arguments: argparse.Namespace) -> RunSettings:
    """As `gemma-mtp train --new` would, on corpus text as it stands and gone on from by the target."""
    work = arguments.work
    return RunSettings(
        target=work / "target", out=work / "drafter", new=bundle.DRAFTER_SHAPE, recipe=recipe,
        temperatures=TEMPERATURES, device=arguments.device, engine_device="cpu", resume=arguments.resume,
        dtype="float32" if arguments.recipe == "gpu" else "auto",  # a GPU is quick enough at what the engine computes
        force=True,  # a new drafter's start is random weights
        data=DataSettings(
            (work / "drafter_corpus.jsonl",), held_out=work / "heldout_prompts.jsonl", length=DRAFTER_ROW_LENGTH,
            regenerate=True, as_is=True, written_tokens=arguments.written_tokens, cache=work / "cache",
        ),
    )  # fmt: skip


def make_drafter(settings: RunSettings, work: Path) -> None:
    if not settings.resume:
        shutil.rmtree(settings.out, ignore_errors=True)
    outcome = run_training(settings, World(), print)
    assert outcome is not None
    print("\n".join(outcome.verdict.lines()))
    write_json(work / "drafter.json", {
        "drafter_parameters": outcome.facts.parameters, "drafter_steps": outcome.result.steps,
        "drafter_tokens": outcome.result.tokens, "drafter_seconds": outcome.result.seconds,
        "written_tokens": outcome.facts.data["written_tokens"],
    })  # fmt: skip


def write_bundle(recipes: Mapping[str, TargetRecipe | DrafterRecipe], trained_on: str, work: Path, out: Path) -> None:
    """Measure acceptance in the engine, then copy the pair and write its card."""
    pair = load_pair(work / "target", work / "drafter", dtype="float32", device="cpu")
    prompts = prompts_of(pair, read_examples(work / "heldout_prompts.jsonl"))
    acceptances = {
        (temperature, max_tokens): measure_acceptance(
            pair,
            prompts * (bundle.SEEDS if temperature else 1),  # each prompt in its turn has a seed of its own
            params=replace(GREEDY, temperature=temperature, max_tokens=max_tokens),
        )
        for temperature, max_tokens in bundle.CONDITIONS
    }
    corpus, target, drafter = (read_json(work / f"{name}.json") for name in ("corpus", "target", "drafter"))
    record = bundle.TrainingRecord(trained_on, **corpus, **target, **drafter)
    for part in ("target", "drafter"):
        copy_directory(work / part, out / part, leave_out=(STATE, CARD))  # the pair has a card of its own
    for name in ("heldout.json", "heldout_prompts.jsonl", "sources.json"):
        replace_text(out / name, (work / name).read_text(encoding="utf-8"))
    bundle.write_record(record, acceptances, out)
    shown = {name: asdict(recipe) for name, recipe in recipes.items()}
    card = bundle.model_card(record, acceptances, read_json(work / "sources.json"), shown)
    replace_text(out / "MODEL_CARD.md", card)
    lengths = ", ".join(f"{t:g}/{n}: {measured.pooled.mean_length:.2f}" for (t, n), measured in acceptances.items())
    print(f"wrote {out}: held-out loss {record.held_out_nats_per_token:.3f} nats a token, mean acceptance length by"
          f" temperature/tokens {lengths}")  # fmt: skip


def copy_directory(source: Path, destination: Path, leave_out: Sequence[str]) -> None:
    """Copy a checkpoint's files, each renamed into place."""
    destination.mkdir(parents=True, exist_ok=True)
    for path in (path for path in source.iterdir() if path.name not in leave_out):
        partial = destination / f".{path.name}.partial"
        shutil.copyfile(path, partial)
        partial.replace(destination / path.name)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="what the models are trained on")
    parser.add_argument("--recipe", choices=("cpu", "gpu"), help="batches for a CPU or a GPU; default: by --device")
    parser.add_argument("--trained-on", help="the machine that the card names; default: what this one calls itself")
    parser.add_argument("--minutes-target", type=float, help="wall time of the target's training; default: by --recipe")
    parser.add_argument("--minutes-drafter", type=float, help="wall time of the drafter's; default: by --recipe")
    parser.add_argument("--written-tokens", type=int, default=2_300_000, help="tokens that the target writes")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 2)
    parser.add_argument("--work", type=Path, default=Path("build/pair"), help="intermediate files and logs")
    parser.add_argument("--out", type=Path, default=Path("src/gemma_mtp/bundled"))
    parser.add_argument("--resume", action="store_true", help="skip the stages whose results are in --work")
    arguments = parser.parse_args()
    arguments.recipe = arguments.recipe or ("gpu" if arguments.device == "cuda" else "cpu")
    target, drafter = MINUTES[arguments.recipe]
    arguments.minutes_target = arguments.minutes_target or target
    arguments.minutes_drafter = arguments.minutes_drafter or drafter
    arguments.trained_on = arguments.trained_on or processor(torch.device(arguments.device))
    return arguments


if __name__ == "__main__":
    main(parse())
