"""Greedy tokens of transformers, plain and assisted: `run_transformers.py TARGET DRAFTER|- PROMPTS COUNT`."""

import json
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM

target_path, drafter_path, prompts, count = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
load: Any = AutoModelForCausalLM
target = load.from_pretrained(target_path, dtype=torch.float32)
drafter = None if drafter_path == "-" else load.from_pretrained(drafter_path, dtype=torch.float32)


def decoded(prompt: list[int], assistant: Any) -> list[int]:
    ids = torch.tensor([prompt])
    made = target.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, assistant_model=assistant)
    new: list[int] = made[0, len(prompt) :].tolist()
    return new


plain = [decoded(prompt, None) for prompt in prompts]
assisted = None if drafter is None else [decoded(prompt, drafter) for prompt in prompts]
print(json.dumps({"plain": plain, "drafted": assisted}))
