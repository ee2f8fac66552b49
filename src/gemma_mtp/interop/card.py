"""The model card of an exported model, with the fields that the Hugging Face hub reads."""

from __future__ import annotations

from collections.abc import Sequence

from gemma_mtp.checkpoint.origin import Origin

CARD = "README.md"
#: the hub's name of the library that reads a format
LIBRARIES = {"gguf": "llama.cpp", "mlx": "mlx", "compressed-tensors": "transformers", "safetensors": "transformers"}
#: what reads a format
READERS = {
    "gguf": "llama.cpp and what is built on it",
    "mlx": "mlx-lm and mlx-vlm",
    "compressed-tensors": "vLLM, SGLang and transformers, each with the compressed-tensors package",
    "safetensors": "transformers, vLLM, SGLang and mlx-lm",
}
TAGS = {"gguf": ["gguf"], "mlx": ["mlx"], "compressed-tensors": ["compressed-tensors"], "safetensors": []}


def card(origin: Origin, to: str, kind: str, is_target: bool, losses: Sequence[str]) -> str:
    """Returns the card's text. `losses`: a sentence on each thing that the files do not hold as it was."""
    licence = "\n".join(f"{name}: {value}" for name, value in origin.license.items())
    tags = "".join(f"\n- {tag}" for tag in ["gemma4", *TAGS[to], *([] if is_target else ["speculative-decoding"])])
    relation = "finetune" if kind in ("BF16", "F16", "F32") else "quantized"
    what = "text model" if is_target else "drafter, which proposes tokens for its target to verify"
    lost = "\n".join(f"- {sentence[0].upper()}{sentence[1:]}" for sentence in losses) or "Nothing: values are the same."
    return f"""---
{licence}
base_model: {origin.base_model}
base_model_relation: {relation}
library_name: {LIBRARIES[to]}
tags:{tags}
---

# {origin.base_model.rpartition("/")[2]}, {to} {kind}

The {what} of {origin.base_model}, written by `gemma-mtp export --to {to} --type {kind}` for {READERS[to]}.

## What is not as it was

{lost}

## How to run it

`gemma-mtp` reads it as it is. For the command of another program, with versions that work, ask
`gemma-mtp recipe PROGRAM`.
"""
