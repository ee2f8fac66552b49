"""transformers decoding greedily, plain or assisted, as a process that answers requests (requests_loop.py).

python benchmarks/transformers_decoder.py --target T --drafter D --dtype bfloat16 --threads 2
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import transformers
from requests_loop import answer_requests
from transformers import AutoModelForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--drafter", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    dtype = getattr(torch, args.dtype)
    model = AutoModelForCausalLM.from_pretrained(args.target, dtype=dtype).eval()
    assistant = AutoModelForCausalLM.from_pretrained(args.drafter, dtype=dtype).eval()
    for each in (model, assistant):
        each.generation_config.eos_token_id = None  # so that all sides write as many tokens
    assistant.generation_config.num_assistant_tokens_schedule = "constant"

    def generate(prompt: list[int], max_tokens: int, draft_tokens: int) -> dict[str, Any]:
        assistant.generation_config.num_assistant_tokens = draft_tokens
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_tokens,
            assistant_model=assistant if draft_tokens else None,
        )  # fmt: skip
        return {"tokens": out[0, len(prompt) :].tolist(), "rounds": []}

    answer_requests({"version": transformers.__version__}, generate)


if __name__ == "__main__":
    main()
