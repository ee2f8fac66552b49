"""What a weight type costs in quality: held-out loss of a target, acceptance of its drafter, bytes of weights.

    python benchmarks/quality.py                                       # the bundled pair, every type
    python benchmarks/quality.py --types float32 int4 target=int4      # some; a dtype, or as for generate --quantize
    python benchmarks/quality.py --wheels build/pair/wheels            # the whole held-out set of the model card

The loss is that of the very target that decodes, row by row through its KV cache, so that with the native operators
their rounding of activations counts too. The text is the running interpreter's held-out files, which no split trains
on (`corpus.is_held_out`), in rows of 512 tokens as in training; with --wheels the pinned packages' held-out
files too, downloaded by pip where the directory lacks them. Acceptance is that of 4 drafts a round, `exact`, on the
bundled held-out prompts.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[1] / "tools"))

import torch
import torch.nn.functional as F
from bundled_pair import corpus
from machine import instruction_set
from rich.console import Console
from rich.table import Table
from torch import Tensor

from gemma_mtp import SamplingParams, load_pair
from gemma_mtp.backend.base import Backend, Rows
from gemma_mtp.backend.native import set_threads
from gemma_mtp.checkpoint import read_generation_config, stored_tensors
from gemma_mtp.engine.pair import DTYPES, Pair, bundled_directory
from gemma_mtp.engine.round import forward
from gemma_mtp.kv.blocks import block_counts
from gemma_mtp.tokenizer import Tokenizer

TYPES = (
    "float32", "bfloat16", "int8", "int4", "int4,embeddings=int4",
    "embeddings=int8", "embeddings=int4", "target=int4",
    "drafter=int8,drafter-head=int8", "drafter=int4", "drafter-head=int4",
)  # fmt: skip
DRAFT_TOKENS = 4
TEMPERATURES = (0.0, 1.0)


@dataclass(frozen=True)
class Text:
    """Rows of token ids, int64 [N, T], and how many tokens a byte of their text has."""

    rows_NT: Tensor
    tokens_per_byte: float


@dataclass(frozen=True)
class Quality:
    """Loss in nats a token and bits a byte; acceptance length by temperature, the target's own token counted."""

    types: str
    target_bytes: int
    drafter_bytes: int
    nats_per_token: float
    bits_per_byte: float
    acceptance_length: dict[float, float]


def held_out_text(tokenizer: Tokenizer, eos: int, wheels: Path | None, row_length: int, most: int | None) -> Text:
    documents: Iterable[corpus.Document] = corpus.standard_library_documents()
    if wheels is not None:
        found = corpus.download_wheels(corpus.PACKAGES, wheels)
        packages = (document for source, wheel in found.items() for document in corpus.wheel_documents(source, wheel))
        documents = corpus.deduplicate([*documents, *packages])
    _, held_out = corpus.split(documents)
    tokens = corpus.pack(held_out, tokenizer.raw, eos)
    rows = torch.from_numpy(corpus.rows(tokens, row_length).astype("int64"))[:most]
    return Text(rows, tokens.size / sum(len(document.text.encode()) for document in held_out))


@torch.inference_mode()
def loss(backend: Backend, rows_NT: Tensor) -> float:
    """Mean nats a token of each row's tokens but the first, decoded in chunks through the KV cache."""
    losses = [_row_loss(backend, row) for row in rows_NT]
    return sum(losses) / len(losses)


def _row_loss(backend: Backend, row_T: Tensor) -> float:
    T, chunk = len(row_T), backend.chunk_rows
    cache = backend.make_pool(block_counts(backend.target.config.sliding_window, T, chunk), slots=1).cache(T)
    total = 0.0
    for start in range(0, T - 1, chunk):
        stop = min(start + chunk, T - 1)
        hidden_TD = forward(backend, [Rows(cache, row_T[start:stop].tolist(), stop - start)])
        cache.table.commit(stop - start)
        following = row_T[start + 1 : stop + 1].to(backend.device)
        total += float(F.cross_entropy(backend.logits(hidden_TD).float(), following, reduction="sum"))
    return total / (T - 1)


def acceptance_length(pair: Pair, prompts: Sequence[str], max_tokens: int, temperature: float) -> float:
    """Tokens a round over all prompts, rounds that the token limit cut short left out."""
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, ignore_eos=True)
    results = [pair.generate(prompt, params, draft_tokens=DRAFT_TOKENS) for prompt in prompts]
    accepted = [r.accepted for result in results for r in result.decode_rounds if r.drafted == DRAFT_TOKENS]
    return 1 + sum(accepted) / len(accepted)


def measure(types: str, text: Text, prompts: Sequence[str], args: argparse.Namespace) -> Quality:
    dtype, quantize = (types, None) if types in DTYPES else ("auto", types)
    pair = load_pair(args.target, args.drafter, dtype=dtype, quantize=quantize, device="cpu")
    assert pair.drafter is not None
    nats = loss(pair.backend, text.rows_NT)
    weights = (model.checkpoint_tensors() for model in (pair.target, pair.drafter))
    sizes = [sum(tensor.nbytes for tensor in stored_tensors(each).values()) for each in weights]
    lengths = {t: acceptance_length(pair, prompts, args.max_tokens, t) for t in TEMPERATURES}
    return Quality(types, sizes[0], sizes[1], nats, nats / math.log(2) * text.tokens_per_byte, lengths)


def show(measured: Sequence[Quality], text: Text, args: argparse.Namespace) -> None:
    table = Table(box=None, pad_edge=False)
    columns = ("", "target MB", "drafter MB", "nats/token", "bits/byte", "to the first")
    for column in (*columns, *("greedy" if t == 0 else f"temperature {t}" for t in TEMPERATURES)):
        table.add_column(column, justify="left" if column == "" else "right")
    for each in measured:
        table.add_row(
            each.types, f"{each.target_bytes / 1e6:.2f}", f"{each.drafter_bytes / 1e6:.2f}",
            f"{each.nats_per_token:.4f}", f"{each.bits_per_byte:.4f}",
            f"{each.nats_per_token / measured[0].nats_per_token - 1:+.2%}",
            *(f"{each.acceptance_length[t]:.2f}" for t in TEMPERATURES),
        )  # fmt: skip
    console = Console(width=150)
    console.print(table)
    console.print(
        f"native operators: {instruction_set()}; loss on {text.rows_NT.numel()} held-out tokens; tokens a round at"
        f" {DRAFT_TOKENS} drafts, {args.prompts} prompts of {args.max_tokens} new tokens",
        highlight=False,
        soft_wrap=True,
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    bundled = bundled_directory()
    parser.add_argument("--target", type=Path, default=bundled / "target")
    parser.add_argument("--drafter", type=Path, default=bundled / "drafter")
    parser.add_argument("--types", nargs="+", default=list(TYPES), help="dtypes, or as for generate --quantize")
    parser.add_argument("--wheels", type=Path, help="measure on the packages' held-out files too; kept here")
    parser.add_argument("--row-length", type=int, default=512, help="tokens of a row of held-out text")
    parser.add_argument("--rows", type=int, help="at most so many rows")
    parser.add_argument("--prompts", type=int, default=24, help="how many of the held-out prompts")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> list[Quality]:
    set_threads(args.threads)
    tokenizer = Tokenizer.from_dir(args.target)
    eos = read_generation_config(args.target).eos_token_ids[0]
    text = held_out_text(tokenizer, eos, args.wheels, args.row_length, args.rows)
    lines = (bundled_directory() / "heldout_prompts.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["text"] for line in lines[: args.prompts]]
    measured = [measure(types, text, prompts, args) for types in args.types]
    show(measured, text, args)
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(each) for each in measured], indent=2) + "\n", encoding="utf-8")
    return measured


if __name__ == "__main__":
    main(parse())
