"""Reproduce the bundled pair: corpus, tokenizer, target, drafter, evaluation, model card.

    python tools/make_pair.py --minutes-target 38 --minutes-drafter 16 --out src/gemma_mtp/bundled

Intermediate files go to --work. With --resume, stages whose results lie there are not run again, and a stage broken
off goes on from its last weights (with fresh optimiser state). Two to four minutes go to compiling and generating.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from gemma_mtp.checkpoint import load_target, read_json, write_json
from gemma_mtp.engine.pair import load_pair
from gemma_mtp.training import bpe, bundle, data
from gemma_mtp.training.drafter_trainer import DrafterRecipe, train_drafter
from gemma_mtp.training.evaluate import measure_acceptance, read_prompts
from gemma_mtp.training.rollout import written_by_target
from gemma_mtp.training.shapes import BUNDLED_TARGET, drafter_for
from gemma_mtp.training.target_trainer import TargetRecipe, train_target

#: big blocks are reused instead of returned to the system after every step, which page faults would pay for, and idle
#: threads sleep; both are read when the process starts, before main
ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
    "OMP_WAIT_POLICY": "PASSIVE",
}


def main(arguments: argparse.Namespace) -> None:
    work, out, resume = arguments.work, arguments.out, arguments.resume
    torch.set_num_threads(arguments.threads)
    work.mkdir(parents=True, exist_ok=True)

    if not (resume and (work / "corpus.json").exists()):
        prepare(work)
    tokenizer = Tokenizer.from_file(str(work / "tokenizer" / "tokenizer.json"))
    corpus = read_json(work / "corpus.json")
    training, held_out = np.load(work / "training.npy"), np.load(work / "held_out.npy")

    target_recipe = TargetRecipe(minutes=arguments.minutes_target, threads=arguments.threads)
    if not (resume and (work / "target.json").exists()):
        trained = train_target(
            BUNDLED_TARGET, training, held_out, corpus["held_out_bytes"], target_recipe, work, resume=resume,
            on_checkpoint=lambda model: bundle.export_target(model, BUNDLED_TARGET, tokenizer, work / "target"),
        )  # fmt: skip
        write_json(work / "target.json", {
            "target_parameters": sum(p.numel() for p in trained.target.parameters()),
            "target_steps": trained.steps, "target_tokens": trained.tokens, "target_seconds": trained.seconds,
            "held_out_nats_per_token": trained.held_out_nats_per_token,
            "held_out_bits_per_byte": trained.held_out_bits_per_byte,
        })  # fmt: skip

    target = load_target(work / "target", torch.bfloat16)
    drafter_recipe = DrafterRecipe(minutes=arguments.minutes_drafter, threads=arguments.threads)
    config = drafter_for(BUNDLED_TARGET.text)
    if not (resume and (work / "drafter.json").exists()):
        rows = data.rows(training, target_recipe.row_length)
        if not (resume and (work / "written.npy").exists()):
            np.save(work / "written.npy", written_by_target(target, rows, arguments.written_batches, 256))
        written = np.load(work / "written.npy")
        drafted = train_drafter(
            target, config, rows, written, drafter_recipe, work, resume=resume,
            on_checkpoint=lambda model: bundle.export_drafter(model, config, work / "drafter"),
        )  # fmt: skip
        write_json(work / "drafter.json", {
            "drafter_parameters": sum(p.numel() for p in drafted.drafter.parameters()),
            "drafter_steps": drafted.steps, "drafter_tokens": drafted.tokens, "drafter_seconds": drafted.seconds,
            "written_tokens": int(written.size),
        })  # fmt: skip

    pair = load_pair(work / "target", work / "drafter", dtype="float32", device="cpu")
    acceptance = measure_acceptance(pair, read_prompts(work / "heldout_prompts.jsonl"))
    print(f"mean acceptance length {acceptance.mean_length:.3f}, by position {acceptance.by_position}")
    record = bundle.TrainingRecord(
        **read_json(work / "target.json"), **read_json(work / "drafter.json"),
        corpus_tokens=int(training.size), held_out_tokens=int(held_out.size),
    )  # fmt: skip
    recipes = {"target": asdict(target_recipe), "drafter": asdict(drafter_recipe)}
    for part in ("target", "drafter"):
        copy_directory(work / part, out / part)
    for name in ("heldout.json", "heldout_prompts.jsonl", "sources.json"):
        data.write_text((work / name).read_text(encoding="utf-8"), out / name)
    bundle.write_record(record, acceptance, out)
    data.write_text(bundle.model_card(record, acceptance, read_json(work / "sources.json"), recipes),
                    out / "MODEL_CARD.md")  # fmt: skip
    print(f"wrote {out}: {json.dumps(asdict(record))}")


def prepare(work: Path) -> None:
    """Corpus and tokenizer: token arrays, held-out lists and the record of sources under `work`."""
    corpus = data.build_corpus(work / "wheels")
    tokenizer = bpe.train_tokenizer(document.text for document in corpus.training)
    bpe.save_tokenizer(tokenizer, work / "tokenizer", BUNDLED_TARGET.text.max_position_embeddings)
    np.save(work / "training.npy", data.pack(corpus.training, tokenizer, bpe.EOS))
    np.save(work / "held_out.npy", data.pack(corpus.held_out, tokenizer, bpe.EOS))
    data.save_json(corpus.record, work / "sources.json")
    data.save_json([document.name for document in corpus.held_out], work / "heldout.json")
    data.save_json_lines(data.held_out_prompts(corpus.held_out, tokenizer), work / "heldout_prompts.jsonl")
    write_json(work / "corpus.json", {"held_out_bytes": sum(len(d.text.encode()) for d in corpus.held_out)})


def copy_directory(source: Path, destination: Path) -> None:
    """Copy a checkpoint's files, each renamed into place."""
    destination.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        partial = destination / f".{path.name}.partial"
        shutil.copyfile(path, partial)
        partial.replace(destination / path.name)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes-target", type=float, default=38)
    parser.add_argument("--minutes-drafter", type=float, default=16)
    parser.add_argument("--written-batches", type=int, default=9, help="batches of 256 rows the target writes")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 2)
    parser.add_argument("--work", type=Path, default=Path("build/pair"))
    parser.add_argument("--out", type=Path, default=Path("src/gemma_mtp/bundled"))
    parser.add_argument("--resume", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    if any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALLOCATOR})
    main(parse())
