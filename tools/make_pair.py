"""Reproduce the bundled pair: corpus, tokenizer, target, drafter, evaluation, model card.

    python tools/make_pair.py --minutes-target 80 --minutes-drafter 24 --out src/gemma_mtp/bundled

Intermediate files go to --work. With --resume, stages whose results lie there are not run again, and a stage broken
off goes on from its last weights (with fresh optimiser state). The corpus takes a minute, the target's own text a few.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from gemma_mtp.checkpoint import load_target, read_json, write_json
from gemma_mtp.datasets import read_examples
from gemma_mtp.engine.pair import load_pair
from gemma_mtp.measure.acceptance import GREEDY, measure_acceptance, prompts_of
from gemma_mtp.training import bpe, bundle, data
from gemma_mtp.training.drafter_trainer import DrafterRecipe, train_drafter
from gemma_mtp.training.rollout import written_by_target
from gemma_mtp.training.shapes import BUNDLED_TARGET, drafter_for
from gemma_mtp.training.target_trainer import TargetRecipe, train_target

#: blocks are kept between steps instead of being returned to the system and faulted in again, and idle threads sleep;
#: the C library and OpenMP read these when the process starts
ENVIRONMENT = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
    "OMP_WAIT_POLICY": "PASSIVE",
}
DRAFTER = drafter_for(BUNDLED_TARGET.text)
WRITTEN_BATCH_ROWS = 256


def main(arguments: argparse.Namespace) -> None:
    """Run the stages whose results `work` lacks, then evaluate and write the bundle."""
    work, resume = arguments.work, arguments.resume
    torch.set_num_threads(arguments.threads)
    work.mkdir(parents=True, exist_ok=True)
    target_recipe = TargetRecipe(minutes=arguments.minutes_target, threads=arguments.threads)
    drafter_recipe = DrafterRecipe(minutes=arguments.minutes_drafter, threads=arguments.threads)
    if not (resume and (work / "corpus.json").exists()):
        prepare_corpus(work)
    if not (resume and (work / "target.json").exists()):
        make_target(target_recipe, work, resume)
    if not (resume and (work / "written.npy").exists()):
        write_text(target_recipe.row_length, arguments.written_batches, work)
    if not (resume and (work / "drafter.json").exists()):
        make_drafter(drafter_recipe, target_recipe.row_length, work, resume)
    write_bundle(target_recipe, drafter_recipe, work, arguments.out)


def prepare_corpus(work: Path) -> None:
    """Corpus and tokenizer: token arrays, held-out lists and the record of sources."""
    corpus = data.build_corpus(work / "wheels")
    tokenizer = bpe.train_tokenizer(document.text for document in corpus.training)
    bpe.save_tokenizer(tokenizer, work / "tokenizer", BUNDLED_TARGET.text.max_position_embeddings)
    training = data.pack(corpus.training, tokenizer, bpe.EOS)
    held_out = data.pack(corpus.held_out, tokenizer, bpe.EOS)
    np.save(work / "training.npy", training)
    np.save(work / "held_out.npy", held_out)
    data.save_json(corpus.record, work / "sources.json")
    data.save_json([document.name for document in corpus.held_out], work / "heldout.json")
    data.save_json_lines(data.held_out_prompts(corpus.held_out, tokenizer), work / "heldout_prompts.jsonl")
    write_json(work / "corpus.json", {
        "corpus_tokens": int(training.size), "held_out_tokens": int(held_out.size),
        "held_out_bytes": sum(len(document.text.encode()) for document in corpus.held_out),
    })  # fmt: skip


def make_target(recipe: TargetRecipe, work: Path, resume: bool) -> None:
    tokenizer = Tokenizer.from_file(str(work / "tokenizer" / "tokenizer.json"))
    training, held_out = np.load(work / "training.npy"), np.load(work / "held_out.npy")
    trained = train_target(
        BUNDLED_TARGET, training, held_out, read_json(work / "corpus.json")["held_out_bytes"], recipe, work,
        on_checkpoint=lambda model: bundle.export_target(model, BUNDLED_TARGET, tokenizer, work / "target"),
        resume=resume,
    )  # fmt: skip
    write_json(work / "target.json", {
        "target_parameters": sum(parameter.numel() for parameter in trained.target.parameters()),
        "target_steps": trained.steps, "target_tokens": trained.tokens, "target_seconds": trained.seconds,
        "held_out_nats_per_token": trained.held_out_nats_per_token,
        "held_out_bits_per_byte": trained.held_out_bits_per_byte,
    })  # fmt: skip


def write_text(row_length: int, batches: int, work: Path) -> None:
    """Text the target writes itself."""
    target = load_target(work / "target", torch.bfloat16)
    corpus = data.rows(np.load(work / "training.npy"), row_length)
    np.save(work / "written.npy", written_by_target(target, corpus, batches, WRITTEN_BATCH_ROWS))


def make_drafter(recipe: DrafterRecipe, row_length: int, work: Path, resume: bool) -> None:
    target = load_target(work / "target", torch.bfloat16)
    corpus, written = data.rows(np.load(work / "training.npy"), row_length), np.load(work / "written.npy")
    trained = train_drafter(
        target, DRAFTER, corpus, written, recipe, work,
        on_checkpoint=lambda model: bundle.export_drafter(model, DRAFTER, work / "drafter"),
        resume=resume,
    )  # fmt: skip
    write_json(work / "drafter.json", {
        "drafter_parameters": sum(parameter.numel() for parameter in trained.drafter.parameters()),
        "drafter_steps": trained.steps, "drafter_tokens": trained.tokens, "drafter_seconds": trained.seconds,
        "written_tokens": int(written.size),
    })  # fmt: skip


def write_bundle(target_recipe: TargetRecipe, drafter_recipe: DrafterRecipe, work: Path, out: Path) -> None:
    """Measure acceptance in the engine, then copy the pair and write its card."""
    pair = load_pair(work / "target", work / "drafter", dtype="float32", device="cpu")
    prompts = prompts_of(pair, read_examples(work / "heldout_prompts.jsonl"))
    acceptances = {
        (temperature, max_tokens): measure_acceptance(
            pair, prompts, params=replace(GREEDY, temperature=temperature, max_tokens=max_tokens)
        )
        for temperature, max_tokens in bundle.CONDITIONS
    }
    parts = {name: read_json(work / f"{name}.json") for name in ("corpus", "target", "drafter")}
    record = bundle.TrainingRecord(**parts["corpus"], **parts["target"], **parts["drafter"])
    recipes = {"target": asdict(target_recipe), "drafter": asdict(drafter_recipe)}
    for part in ("target", "drafter"):
        copy_directory(work / part, out / part)
    for name in ("heldout.json", "heldout_prompts.jsonl", "sources.json"):
        data.write_text((work / name).read_text(encoding="utf-8"), out / name)
    bundle.write_record(record, acceptances, out)
    card = bundle.model_card(record, acceptances, read_json(work / "sources.json"), recipes)
    data.write_text(card, out / "MODEL_CARD.md")
    lengths = ", ".join(f"{t:g}/{n}: {measured.pooled.mean_length:.2f}" for (t, n), measured in acceptances.items())
    print(f"wrote {out}: held-out loss {record.held_out_nats_per_token:.3f} nats a token, mean acceptance length by"
          f" temperature/tokens {lengths}")  # fmt: skip


def copy_directory(source: Path, destination: Path) -> None:
    """Copy a checkpoint's files, each renamed into place."""
    destination.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        partial = destination / f".{path.name}.partial"
        shutil.copyfile(path, partial)
        partial.replace(destination / path.name)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes-target", type=float, default=80, help="wall time of the target's training")
    parser.add_argument("--minutes-drafter", type=float, default=24, help="wall time of the drafter's training")
    parser.add_argument("--written-batches", type=int, default=9, help="batches of 256 rows that the target writes")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 2)
    parser.add_argument("--work", type=Path, default=Path("build/pair"), help="intermediate files and logs")
    parser.add_argument("--out", type=Path, default=Path("src/gemma_mtp/bundled"))
    parser.add_argument("--resume", action="store_true", help="skip the stages whose results are in --work")
    return parser.parse_args()


if __name__ == "__main__":
    options = parse()
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ENVIRONMENT})
    main(options)
