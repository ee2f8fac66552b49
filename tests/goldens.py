"""Outputs held bit for bit from one version to the next: what is generated, and how it is written down.

`python tests/goldens.py` writes `goldens.json` anew, which only a change that means to change outputs may do.
Both the native operators and PyTorch are kept to AVX2, so that the bits are the same on every x86-64 machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: what the environment must hold before torch is imported
ENVIRONMENT = {"GEMMA_MTP_ISA": "avx2", "ATEN_CPU_CAPABILITY": "avx2", "GEMMA_MTP_CACHE": "0", "OMP_NUM_THREADS": "1"}
FILE = Path(__file__).with_name("goldens.json")
COUNT = 300
#: weights of the bundled pair, and tiny pairs with the parts that it lacks
BUNDLED = {"float32": None, "bfloat16": None, "int8": "int8", "int4": "int4",
           "mixed": "target=int8,embeddings=int4,drafter-head=int8"}  # fmt: skip
TINY = ("ple", "untied", "odd", "moe")
SCHEMA = '{"type": "object", "properties": {"name": {"type": "string"}, "n": {"type": "integer"}}, "required": ["n"]}'


def load_pairs(names: set[str]) -> dict[str, Any]:
    from models import WIDE, random_target, save_pair, wide_drafter

    from gemma_mtp import load_pair

    pairs: dict[str, Any] = {}
    for name in sorted(names):
        if name in BUNDLED:
            dtype = name if BUNDLED[name] is None else "bfloat16"
            pairs[name] = load_pair(dtype=dtype, quantize=BUNDLED[name])
            continue
        family, kind = name.split(", ")
        with tempfile.TemporaryDirectory() as root:
            save_pair(Path(root), random_target(5, WIDE[family]), wide_drafter(WIDE[family], kind != "float32"))
            quantize = None if kind == "float32" else kind
            pairs[name] = load_pair(f"{root}/target", f"{root}/drafter", dtype="float32", quantize=quantize)
    return pairs


def draw(index: int) -> dict[str, Any]:
    """One case: which weights, which prompt, parameters, drafts, and what runs beside it."""
    rng = random.Random(7919 * index + 1)
    tiny = rng.random() < 0.3
    name = f"{rng.choice(TINY)}, {rng.choice(['float32', 'int8', 'int4'])}" if tiny else rng.choice(sorted(BUNDLED))
    temperature = rng.choice([0.0, 0.7, rng.uniform(0.1, 1.5)])
    params: dict[str, Any] = {
        "max_tokens": rng.randint(2, 40), "temperature": temperature, "seed": rng.getrandbits(60), "ignore_eos": True,
        "top_k": rng.choice([0, 0, 20]), "top_p": rng.choice([1.0, 1.0, 0.9]), "min_p": rng.choice([0.0, 0.0, 0.05]),
        "logprobs": rng.choice([None, 0, 3]),
    }  # fmt: skip
    if rng.random() < 0.2:
        params |= {"repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.1}
    if rng.random() < 0.1:
        params |= {"logit_bias": {5: 2.5, 7: -100.0}}
    grammar = None
    if not tiny and rng.random() < 0.12:
        params["ignore_eos"] = False
        grammar = rng.choice([("json_schema", SCHEMA), ("regex", "[a-z]{3,9}( = [0-9]+)?"), ("json_object", "")])
    verification = rng.choice(["exact"] * 6 + ["rejection", "block"])
    drafts = (
        rng.choice([0, 1, 2, 3, 4, 6, 8, 16]) if verification != "exact" else rng.choice([0, 1, 2, 4, 5, 8, "auto"])
    )
    return {
        "name": name, "tiny": tiny, "params": params, "grammar": grammar, "verification": verification,
        "drafts": drafts, "start": rng.random(), "length": rng.randint(1, 200), "prompt": rng.randrange(1000),
        "together": rng.random() < 0.5,
    }  # fmt: skip


def prompt_of(case: dict[str, Any], pair: Any) -> list[int]:
    from gemma_mtp.datasets import read_examples
    from gemma_mtp.engine.pair import bundled_directory

    if case["tiny"]:
        rng = random.Random(case["prompt"])
        return [rng.randrange(61) for _ in range(case["length"])]
    examples = list(read_examples(bundled_directory() / "heldout_prompts.jsonl"))
    ids: list[int] = pair.encode(examples[case["prompt"] % len(examples)].content)
    start = int(case["start"] * (len(ids) - 1))
    return ids[start : start + case["length"]]


def digest(result: Any) -> str:
    """Of tokens, log-probabilities to the last bit, and why it ended."""
    logprobs = result.logprobs and [
        (entry.token_id, entry.logprob.hex(), [(i, value.hex()) for i, value in entry.top]) for entry in result.logprobs
    ]
    content = json.dumps([result.token_ids, logprobs, result.finish_reason])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def generate(count: int, first: int = 0) -> Iterator[tuple[int, str]]:
    """Case numbers and digests. Those that run together share an engine too small for all of them: some wait, some are
    preempted, and prompts that begin alike share blocks."""
    from gemma_mtp import Grammar, SamplingParams
    from gemma_mtp.engine.request import Request
    from gemma_mtp.engine.settings import EngineSettings
    from gemma_mtp.engine.thread import EngineThread

    cases = {i: draw(i) for i in range(first, first + count)}
    pairs = load_pairs({case["name"] for case in cases.values()})
    shared: dict[str, list[tuple[int, Any]]] = {}
    for i, case in cases.items():
        pair = pairs[case["name"]]
        grammar = case["grammar"] and Grammar(*case["grammar"])
        params = SamplingParams(**case["params"], grammar=grammar)
        prompt = prompt_of(case, pair)
        if case["together"]:
            request = Request(prompt, params, case["drafts"], case["verification"])
            shared.setdefault(case["name"], []).append((i, request))
            continue
        kinds = {"draft_tokens": case["drafts"], "verification": case["verification"]}
        yield i, digest(pair.generate(prompt, params, **kinds))
    for name, requests in shared.items():
        memory = 0.8 if "," in name else 3
        settings = EngineSettings(max_running=5, max_tokens=260, kv_memory_mb=memory, max_stall_seconds=0.002)
        with EngineThread(pairs[name], settings) as engine:
            waiting = [(i, engine.submit(request)) for i, request in [*requests, *requests]]  # again: prefix reuse
            for i, generation in waiting:
                yield i, digest(generation.wait())


if __name__ == "__main__":
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ENVIRONMENT})
    arguments = [int(argument) for argument in sys.argv[1:]]  # [first, count]: print, write nothing
    found: dict[int, str] = {}
    for index, text in generate(arguments[1] if arguments else COUNT, arguments[0] if arguments else 0):
        assert found.setdefault(index, text) == text, f"case {index} was not the same twice"
    ordered = {str(index): found[index] for index in sorted(found)}
    if arguments:
        print(json.dumps(ordered))
    else:
        FILE.write_text(json.dumps(ordered, indent=0) + "\n")
