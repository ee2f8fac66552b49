"""Greedy tokens of mlx-lm on the CPU: `run_mlx.py DIRECTORIES PROMPTS COUNT`, both as JSON."""

import itertools
import json
import sys
from pathlib import Path

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model

mx.set_default_device(mx.cpu)
directories, prompts, count = json.loads(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
made = {}
for directory in directories:
    model, _ = load_model(Path(directory))
    steps = (generate_step(mx.array(prompt), model, max_tokens=count) for prompt in prompts)
    made[directory] = [[int(token) for token, _ in itertools.islice(step, count)] for step in steps]
print(json.dumps(made))
