"""Writes a trained pair as checkpoint directories, with its tokenizer, held-out prompts and model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from bundled_pair import bpe
from gemma_mtp.checkpoint import save_target
from gemma_mtp.config import FULL, SLIDING, TargetConfig, TextConfig
from gemma_mtp.json_files import write_json
from gemma_mtp.measure.acceptance import AcceptanceReport
from gemma_mtp.model.target import Target
from gemma_mtp.training.shapes import DrafterShape

#: E2B's shape, small: KV sharing, double-wide MLP, per-layer embeddings, softcap. Its weights are more than a
#: processor's cache holds, so that decoding is bound by reading them, as any real target's is.
BUNDLED_TARGET = TargetConfig(
    TextConfig(
        vocab_size=bpe.VOCAB_SIZE, hidden_size=320, intermediate_size=896, num_hidden_layers=15,
        num_attention_heads=4, num_key_value_heads=1, head_dim=64, global_head_dim=128, num_global_key_value_heads=1,
        layer_types=((SLIDING,) * 4 + (FULL,)) * 3, sliding_window=128, num_kv_shared_layers=5,
        use_double_wide_mlp=True, hidden_size_per_layer_input=32, vocab_size_per_layer_input=bpe.VOCAB_SIZE,
        final_logit_softcapping=30.0, max_position_embeddings=2048, eos_token_ids=(bpe.EOS, bpe.TURN_CLOSE),
    )
)  # fmt: skip
#: nothing on sampling: the command line is greedy, the server draws, unless asked otherwise
GENERATION = {
    "bos_token_id": bpe.BOS,
    "eos_token_id": [bpe.EOS, bpe.TURN_CLOSE],
    "pad_token_id": bpe.PAD,
}


def export_target(target: Target, config: TargetConfig, tokenizer: Tokenizer, directory: Path) -> None:
    """Weights in bf16, config, generation config and tokenizer, as transformers reads them."""
    save_target(target, config, directory)
    write_json(directory / "generation_config.json", GENERATION)
    bpe.save_tokenizer(tokenizer, directory, config.text.max_position_embeddings)


@dataclass(frozen=True)
class TrainingRecord:
    """What the trainers report, for the card. Times are wall seconds."""

    trained_on: str
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


#: the bundled drafter's
DRAFTER_SHAPE = DrafterShape(hidden=128)
#: what acceptance is reported for: temperature and tokens written for each prompt. The first is the main figure.
CONDITIONS = ((0.0, 128), (0.0, 32), (0.7, 128), (1.0, 128))
#: seeds that sampled acceptance is measured with, so that its figure is certain to about 0.02
SEEDS = 8
#: a report for each of them
Acceptances = Mapping[tuple[float, int], AcceptanceReport]


def write_record(record: TrainingRecord, acceptances: Acceptances, directory: Path) -> None:
    """The figures of the card for programs to read: `training.json`."""
    measured = [report.to_dict() for report in acceptances.values()]
    for report in measured:
        del report["prompts"]  # one a file: the same as by file
    write_json(directory / "training.json", {**asdict(record), "acceptance": measured})


def model_card(
    record: TrainingRecord,
    acceptances: Acceptances,
    sources: Sequence[Mapping[str, Any]],
    recipes: Mapping[str, Mapping[str, Any]],
) -> str:
    """MODEL_CARD.md: what the pair is, what it was trained on, how, and what was measured."""
    text, row_length = BUNDLED_TARGET.text, recipes["target"]["row_length"]
    table = "\n".join(
        f"| {s['name']} | {s['version']} | {s['licence']} | {s['files']} | {s['bytes'] / 1e6:.1f} |" for s in sources
    )
    acceptance = acceptances[CONDITIONS[0]]
    conditions = "\n".join(
        f"| {'greedy' if temperature == 0 else f'temperature {temperature}, {SEEDS} seeds'} | {max_tokens} |"
        f" {pooled.rounds} |"
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
| architecture | 15 layers (4 sliding + 1 full) x 3, the last 5 KV-shared with double-wide MLP, hidden \
{text.hidden_size}, MLP {text.intermediate_size}, per-layer embeddings of {text.hidden_size_per_layer_input}, \
softcap 30 | 4 layers (3 sliding + 1 full) without KV of their own, hidden {DRAFTER_SHAPE.hidden} |
| steps | {record.target_steps:,} | {record.drafter_steps:,} |
| tokens seen | {record.target_tokens:,} | {record.drafter_tokens:,} |
| wall minutes, {record.trained_on} | {record.target_seconds / 60:.1f} | {record.drafter_seconds / 60:.1f} |

Tokenizer: byte-level BPE of {text.vocab_size} tokens with Gemma's special ids, trained on the same text. Context: the
target was trained on rows of {row_length} tokens; positions beyond are untrained.

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

Drafter: by `gemma-mtp train --new`. The target is frozen. Row t pairs the target's hidden state after token t with the
embedding of token t + 1, sees the target's keys and values up to row t only (within the sliding window counted from
position t + 1), and is unrolled five steps at that one position, fed its own projected state. It saw corpus text as it
stands and text that the target wrote itself ({record.written_tokens:,} tokens), each at the temperature it is to be
drafted at: a quarter greedy, a quarter at 0.7, half at 1.0. Later drafts counted as often as decoding would reach them.

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
