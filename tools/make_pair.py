"""Reproduce the bundled pair: corpus, tokenizer, target, drafter, evaluation, model card.

    python tools/make_pair.py --minutes-target 80 --minutes-drafter 55 --minutes-adapted 40 --out src/gemma_mtp/bundled

Intermediate files go to --work. With --resume, stages whose results lie there are not run again, and a stage broken
off goes on from its last checkpoint. The corpus takes a minute, the text that the target writes itself a few.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from gemma_mtp import cli  # noqa: F401  (sets what PyTorch reads when it is imported)
from gemma_mtp.checkpoint import read_json, write_json
from gemma_mtp.datasets import read_examples
from gemma_mtp.engine.pair import load_pair
from gemma_mtp.measure.acceptance import GREEDY, measure_acceptance, prompts_of
from gemma_mtp.ops.native import set_threads
from gemma_mtp.training import bpe, bundle, data
from gemma_mtp.training.drafter_trainer import DrafterRecipe
from gemma_mtp.training.environment import keep_freed_memory
from gemma_mtp.training.export import CARD
from gemma_mtp.training.parallel import World
from gemma_mtp.training.run import STATE, run_training
from gemma_mtp.training.settings import DataSettings, RunSettings
from gemma_mtp.training.shapes import BUNDLED_TARGET
from gemma_mtp.training.target_trainer import TargetRecipe, train_target

#: what the drafter is to be good at: greedy, and drawn at these temperatures
TEMPERATURES = (0.0, 0.7, 1.0)
#: the same when it is adapted, the temperature that is hardest to draft at twice
ADAPTED_TEMPERATURES = (0.0, 0.7, 1.0, 1.0)
#: the stages of the drafter, in turn
DRAFTERS = ("drafter", "adapted")
#: text of the corpus that the drafter sees as it stands, and that the target goes on from
DRAFTER_CORPUS_BYTES = 4 << 20


def main(arguments: argparse.Namespace) -> None:
    """Run the stages whose results `work` lacks, then evaluate and write the bundle."""
    work, resume = arguments.work, arguments.resume
    set_threads(arguments.threads)
    keep_freed_memory()
    work.mkdir(parents=True, exist_ok=True)
    target_recipe = TargetRecipe(minutes=arguments.minutes_target, threads=arguments.threads)
    drafter_recipe = DrafterRecipe(minutes=arguments.minutes_drafter, lr=3e-3, matrix_lr=6e-3, compile=True)
    adapted_recipe = DrafterRecipe(minutes=arguments.minutes_adapted, lr=1e-3, matrix_lr=2e-3, seed=2, compile=True)
    if not (resume and (work / "corpus.json").exists()):
        prepare_corpus(work)
    if not (resume and (work / "target.json").exists()):
        make_target(target_recipe, work, resume)
    run = partial(make_drafter, row_length=target_recipe.row_length, work=work, resume=resume)
    if not (resume and (work / "drafter.json").exists()):
        run("drafter", drafter_recipe, TEMPERATURES, arguments.written_tokens)
    if not (resume and (work / "adapted.json").exists()):
        run("adapted", adapted_recipe, ADAPTED_TEMPERATURES, arguments.adapted_tokens, start=work / "drafter")
    write_bundle({"target": target_recipe, "drafter": drafter_recipe, "adapted": adapted_recipe}, work, arguments.out)


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
    sample = data.sample(corpus.training, DRAFTER_CORPUS_BYTES)
    data.save_json_lines(({"text": d.text, "source": d.name} for d in sample), work / "drafter_corpus.jsonl")
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


def make_drafter(
    name: str, recipe: DrafterRecipe, temperatures: tuple[float, ...], written_tokens: int, *, row_length: int,
    work: Path, resume: bool, start: Path | None = None,
) -> None:  # fmt: skip
    """What `gemma-mtp train` does with --drafter `start` or --new, on corpus text as it stands and gone on from by the
    target."""
    out = work / name
    if not resume:
        shutil.rmtree(out, ignore_errors=True)
    settings = RunSettings(
        target=work / "target", drafter=start, out=out, recipe=recipe, temperatures=temperatures, resume=resume,
        force=start is None,  # a new drafter's start is random weights; an adapted one must not be worse than its start
        data=DataSettings(
            (work / "drafter_corpus.jsonl",), held_out=work / "heldout_prompts.jsonl", length=row_length,
            regenerate=True, as_is=True, written_tokens=written_tokens, cache=work / "cache",
        ),
    )  # fmt: skip
    outcome = run_training(settings, World(), print)
    assert outcome is not None
    print("\n".join(outcome.verdict.lines()))
    if not outcome.exported:
        raise SystemExit(f"{out} is worse than what it started from and was not exported")
    write_json(work / f"{name}.json", {
        "parameters": outcome.facts.parameters, "steps": outcome.result.steps, "tokens": outcome.result.tokens,
        "seconds": outcome.result.seconds, "written_tokens": outcome.facts.data["written_tokens"],
    })  # fmt: skip


def write_bundle(recipes: Mapping[str, TargetRecipe | DrafterRecipe], work: Path, out: Path) -> None:
    """Measure acceptance in the engine, then copy the pair and write its card."""
    pair = load_pair(work / "target", work / DRAFTERS[-1], dtype="float32", device="cpu")
    prompts = prompts_of(pair, read_examples(work / "heldout_prompts.jsonl"))
    acceptances = {
        (temperature, max_tokens): measure_acceptance(
            pair,
            prompts * (bundle.SEEDS if temperature else 1),  # each prompt in its turn has a seed of its own
            params=replace(GREEDY, temperature=temperature, max_tokens=max_tokens),
        )
        for temperature, max_tokens in bundle.CONDITIONS
    }
    corpus, target, *drafters = (read_json(work / f"{name}.json") for name in ("corpus", "target", *DRAFTERS))
    stages = tuple(bundle.DrafterStage(**stage) for stage in drafters)
    record = bundle.TrainingRecord(**corpus, **target, drafter_stages=stages)
    for part, source in {"target": "target", "drafter": DRAFTERS[-1]}.items():
        copy_directory(work / source, out / part, leave_out=(STATE, CARD))  # the pair has a card of its own
    for name in ("heldout.json", "heldout_prompts.jsonl", "sources.json"):
        data.write_text((work / name).read_text(encoding="utf-8"), out / name)
    bundle.write_record(record, acceptances, out)
    shown = {name: asdict(recipe) for name, recipe in recipes.items()}
    card = bundle.model_card(record, acceptances, read_json(work / "sources.json"), shown)
    data.write_text(card, out / "MODEL_CARD.md")
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
    parser.add_argument("--minutes-target", type=float, default=80, help="wall time of the target's training")
    parser.add_argument("--minutes-drafter", type=float, default=55, help="wall time of the drafter's training")
    parser.add_argument("--written-tokens", type=int, default=800_000, help="tokens that the target writes")
    parser.add_argument("--minutes-adapted", type=float, default=40, help="wall time of adapting the drafter")
    parser.add_argument("--adapted-tokens", type=int, default=2_400_000, help="tokens that the target writes for that")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 2)
    parser.add_argument("--work", type=Path, default=Path("build/pair"), help="intermediate files and logs")
    parser.add_argument("--out", type=Path, default=Path("src/gemma_mtp/bundled"))
    parser.add_argument("--resume", action="store_true", help="skip the stages whose results are in --work")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())
