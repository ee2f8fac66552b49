"""Writes a trained pair as checkpoint directories, with its tokenizer, held-out prompts and model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from gemma_mtp.checkpoint import save_drafter, save_target, write_json
from gemma_mtp.config import DrafterConfig, TargetConfig
from gemma_mtp.measure.acceptance import AcceptanceReport
from gemma_mtp.model.drafter import Drafter
from gemma_mtp.model.target import Target
from gemma_mtp.training import bpe

GENERATION = {
    "bos_token_id": bpe.BOS,
    "eos_token_id": [bpe.EOS, bpe.TURN_CLOSE],
    "pad_token_id": bpe.PAD,
}


def export_target(target: Target, config: TargetConfig, tokenizer: Tokenizer, directory: Path) -> None:
    """Weights in bf16, config, generation config and tokenizer, as transformers reads them."""
    save_target(target, config, directory)
    write_json(directory / "generation_config.json", {**GENERATION, "do_sample": False})
    bpe.save_tokenizer(tokenizer, directory, config.text.max_position_embeddings)


def export_drafter(drafter: Drafter, config: DrafterConfig, directory: Path, draft_tokens: int = 4) -> None:
    """Weights in bf16, config and generation config, as transformers reads them."""
    save_drafter(drafter, config, directory)
    drafting = {"num_assistant_tokens": draft_tokens, "num_assistant_tokens_schedule": "constant"}
    write_json(directory / "generation_config.json", {**GENERATION, **drafting})


@dataclass(frozen=True)
class TrainingRecord:
    """What the trainers report, for the card. Times are wall seconds."""

    target_parameters: int
    target_steps: int
    target_tokens: int
    target_seconds: float
    corpus_tokens: int
    held_out_tokens: int
    held_out_bytes: int
    held_out_nats_per_token: float
    held_out_bits_per_byte: float
    drafter_parameters: int
    drafter_steps: int
    drafter_tokens: int
    drafter_seconds: float
    written_tokens: int


#: what acceptance is reported for: temperature and tokens written for each prompt. The first is the main figure.
CONDITIONS = ((0.0, 128), (0.0, 32), (0.7, 128), (1.0, 128))
#: a report for each of them
Acceptances = Mapping[tuple[float, int], AcceptanceReport]


def write_record(record: TrainingRecord, acceptances: Acceptances, directory: Path) -> None:
    """The figures of the card for programs to read: `training.json`."""
    measured = [report.to_dict() for report in acceptances.values()]
    write_json(directory / "training.json", {**asdict(record), "acceptance": measured})


def model_card(
    record: TrainingRecord,
    acceptances: Acceptances,
    sources: Sequence[Mapping[str, Any]],
    recipes: Mapping[str, Any],
) -> str:
    """MODEL_CARD.md: what the pair is, what it was trained on, how, and what was measured."""
    table = "\n".join(
        f"| {s['name']} | {s['version']} | {s['licence']} | {s['files']} | {s['bytes'] / 1e6:.1f} |" for s in sources
    )
    acceptance = acceptances[CONDITIONS[0]]
    conditions = "\n".join(
        f"| {'greedy' if temperature == 0 else f'temperature {temperature}'} | {max_tokens} | {pooled.rounds} |"
        f" {', '.join(f'{share:.2f}' for share in pooled.by_position)} | {pooled.mean_length:.2f} |"
        for (temperature, max_tokens), pooled in ((key, report.pooled) for key, report in acceptances.items())
    )
    files = "\n".join(f"| `{name}` | {own.mean_length:.2f} |" for name, own in sorted(acceptance.by_task.items()))
    settings = "\n".join(f"- {name}: `{recipe}`" for name, recipe in recipes.items())
    return f"""# The bundled pair

A small Gemma-4-architecture language model of Python source and its MTP drafter, trained from scratch by `make pair`.
It is a test bed and a demonstration of drafting: it writes text that looks like Python and is not to be trusted for
anything else. The weights are Apache-2.0. No Gemma weights or outputs were used.

| | target | drafter |
|---|---|---|
| parameters | {record.target_parameters:,} | {record.drafter_parameters:,} |
| architecture | 15 layers (4 sliding + 1 full) x 3, the last 5 KV-shared with double-wide MLP, hidden 256, per-layer \
embeddings of 32, softcap 30 | 4 layers (3 sliding + 1 full) without KV of their own, hidden 128 |
| steps | {record.target_steps:,} | {record.drafter_steps:,} |
| tokens seen | {record.target_tokens:,} | {record.drafter_tokens:,} |
| wall minutes on two CPU cores | {record.target_seconds / 60:.0f} | {record.drafter_seconds / 60:.0f} |

Tokenizer: byte-level BPE of 4096 tokens with Gemma's special ids, trained on the same text. Context: trained on rows
of 512 tokens; positions beyond are untrained.

## Data

{record.corpus_tokens:,} training tokens and {record.held_out_tokens:,} held-out tokens of permissively licensed
Python source, taken from the interpreter and from wheels; tests, vendored copies, generated tables, files over 200 KB
and exact duplicates left out. A file is held out by a hash of its name (1%); `heldout.json` lists the held-out files.

| source | version | licence | files | MB |
|---|---|---|---|---|
{table}

## Recipe

Target: next-token cross-entropy on packed documents, Muon for the layers' matrices and AdamW for the rest, bf16
arithmetic with fp32 master weights, learning rate up, flat, then linearly to zero at the end of the wall-time budget.

Drafter: the target is frozen. Row t pairs the target's hidden state after token t with the embedding of token t + 1,
sees the target's keys and values up to row t only (within the sliding window counted from position t + 1), and is
unrolled five steps at that one position, fed its own projected state. Half of each batch is corpus, half is text the
target continued itself ({record.written_tokens:,} tokens, two thirds greedy, the rest at temperature 0.7). The loss is
the cross-entropy to the target's distribution mixed equally with its argmax, where the earlier drafts were right.

{settings}

## Measured

- Target, held-out files: {record.held_out_nats_per_token:.3f} nats per token,
  {record.held_out_bits_per_byte:.3f} bits per byte.
- Drafter, {acceptance.draft_tokens} drafts a round, `exact` verification, on the {len(acceptance.prompts)} held-out \
prompts of `heldout_prompts.jsonl`. The mean acceptance
  length counts the target's own token; acceptance at a position is given the positions before.

| | tokens a prompt | rounds | acceptance at positions 1 to {acceptance.draft_tokens} | mean acceptance length |
|---|---|---|---|---|
{conditions}

Greedy text of so small a model soon repeats itself, and repetition is easy to draft: the first 32 tokens and the
sampled rows say more about drafting than the greedy row of 128 tokens. That row by file:

| held-out file | mean acceptance length |
|---|---|
{files}
"""
