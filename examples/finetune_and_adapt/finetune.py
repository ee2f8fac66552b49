"""Fine-tune a Gemma 4 target on text with LoRA (peft on transformers), and save the merged checkpoint.

    python finetune.py --target DIR --data DIR --out DIR --minutes 7

Nothing here knows of drafters: this is what people do to a model before they find that its drafter no longer fits.
"""

from __future__ import annotations

import argparse
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, Gemma4ForCausalLM

from gemma_mtp.training.optim import choose_dtype

ROW_TOKENS, BATCH_ROWS, RANK, LEARNING_RATE, WARM_UP = 256, 8, 32, 2e-3, 0.05


def rows(tokenizer: AutoTokenizer, data: Path) -> torch.Tensor:
    """All texts end to end, cut into rows: int64 [N, ROW_TOKENS]."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(data.rglob("*")) if path.is_file()]
    tokens = [i for ids in tokenizer(texts, verbose=False)["input_ids"] for i in (*ids, tokenizer.eos_token_id)]
    count = len(tokens) // ROW_TOKENS
    return torch.tensor(tokens[: count * ROW_TOKENS]).view(count, ROW_TOKENS)


def batches(rows_NT: torch.Tensor, seed: int = 0) -> Iterator[torch.Tensor]:
    """Endless shuffled batches [BATCH_ROWS, ROW_TOKENS]."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from rows_NT[torch.randperm(len(rows_NT), generator=generator)].split(BATCH_ROWS)


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, rows_NT: torch.Tensor, count: int = 32) -> float:
    """Nats a token on the first rows."""
    losses = [model(input_ids=batch, labels=batch).loss.item() for batch in rows_NT[:count].split(BATCH_ROWS)]
    return sum(losses) / len(losses)


def learning_rate(progress: float) -> float:
    """Linear warm-up, then a cosine to zero; `progress` from 0 to 1."""
    return LEARNING_RATE * min(progress / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * progress))


def main(args: argparse.Namespace) -> tuple[float, float]:
    """Returns the held-out loss before and after, nats a token."""
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    base = Gemma4ForCausalLM.from_pretrained(args.target, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear"))
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.0)
    training, held_out = rows(tokenizer, args.data), rows(tokenizer, args.held_out)
    fast = choose_dtype("auto", torch.device("cpu")) == torch.bfloat16  # as `gemma-mtp train` decides
    before, start, seen = held_out_loss(model, held_out), time.monotonic(), 0
    for step, batch in enumerate(batches(training)):
        progress = step / args.steps if args.steps else (time.monotonic() - start) / (60 * args.minutes)
        if progress >= 1:
            break
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(progress)
        with torch.autocast("cpu", torch.bfloat16, enabled=fast):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        seen += batch.numel()
        if step % 20 == 0:
            print(f"{seen:,} tokens, loss {loss.item():.3f}, {progress:.0%} done", flush=True)
    after = held_out_loss(model, held_out)
    print(f"fine-tuned on {seen:,} of {training.numel():,} tokens; held-out nats a token: {before:.3f} before,"
          f" {after:.3f} after", flush=True)  # fmt: skip
    merged: Any = model.merge_and_unload()
    merged.to(torch.bfloat16).save_pretrained(args.out)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(args.target / name, args.out / name)
    return before, after


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True, help="checkpoint to fine-tune")
    parser.add_argument("--data", type=Path, required=True, help="directory of text files")
    parser.add_argument("--held-out", type=Path, required=True, help="directory of text files that are not trained on")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=7)
    parser.add_argument("--steps", type=int, help="so many steps, in place of --minutes")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())
