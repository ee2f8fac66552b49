"""Hugging Face's own generate, plain and assisted, on the same checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sides import Side


def transformers_sides(
    target: Path, drafter: Path, dtype: torch.dtype, draft_tokens: int, max_tokens: int
) -> list[Side]:
    """Two sides, without end-of-sequence so that all sides write as many tokens."""
    import transformers
    from transformers import AutoModelForCausalLM

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(target, dtype=dtype).eval()
    assistant = AutoModelForCausalLM.from_pretrained(drafter, dtype=dtype).eval()
    for each in (model, assistant):
        each.generation_config.eos_token_id = None
    assistant.generation_config.num_assistant_tokens = draft_tokens
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    label = f"transformers {transformers.__version__} {str(dtype)[6:]}"

    def side(name: str, **options: Any) -> Side:
        def run(prompt: list[int]) -> list[int]:
            ids = torch.tensor([prompt])
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_tokens, **options
            )
            return out[0, len(prompt) :].tolist()

        return Side(f"{label}, {name}", run)

    return [side("plain"), side(f"assisted, K = {draft_tokens}", assistant_model=assistant)]
