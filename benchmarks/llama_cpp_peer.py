"""llama.cpp as a side: a GGUF of the same weights, decoded by a process of its own (llama_cpp_decoder.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sides import Side

DECODER = Path(__file__).with_name("llama_cpp_decoder.py")
#: how OpenMP's idle threads wait (OMP_WAIT_POLICY); unset, they spin for a while first. The faster one is measured.
WAITS = (None, "PASSIVE")
TRIAL_TOKENS, TRIALS = 32, 3


@dataclass
class Process:
    """A decoder that is running, and what it said of itself."""

    popen: subprocess.Popen[str]
    about: dict[str, Any]

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.popen.stdin is not None and self.popen.stdout is not None
        self.popen.stdin.write(json.dumps(request) + "\n")
        self.popen.stdin.flush()
        line = self.popen.stdout.readline()
        if not line:
            raise RuntimeError(f"llama.cpp's process ended with code {self.popen.wait()}")
        return json.loads(line)

    def close(self) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.close()
        self.popen.wait()


def start(
    model: Path, drafter: Path | None, draft_tokens: int, threads: int, context: int, wait: str | None
) -> Process:
    options = {"--model": model, "--threads": threads, "--context": context, "--draft-tokens": draft_tokens}
    if drafter is not None:
        options["--drafter"] = drafter
    command = [sys.executable, str(DECODER), *(str(word) for option in options.items() for word in option)]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    if wait is not None:
        environment["OMP_WAIT_POLICY"] = wait
    popen = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    process = Process(popen, {})
    assert popen.stdout is not None
    first = popen.stdout.readline()
    if not first:
        raise RuntimeError(f"llama.cpp's process ended with code {popen.wait()}")
    process.about = {**json.loads(first), "omp_wait_policy": wait or "unset"}
    return process


def fastest(starts: list[Process], prompt: list[int]) -> Process:
    """The process that decodes fastest; the others are ended."""

    def seconds(process: Process) -> float:
        times = []
        for _ in range(TRIALS):
            started = time.perf_counter()
            process.ask({"prompt": prompt, "max_tokens": TRIAL_TOKENS})
            times.append(time.perf_counter() - started)
        return min(times)

    best = min(starts, key=seconds)
    for process in starts:
        if process is not best:
            process.close()
    return best


def llama_cpp_sides(
    model: Path, drafter: Path, kind: str, draft_tokens: list[int], max_tokens: int, threads: int, prompt: list[int]
) -> tuple[list[Side], dict[str, Any]]:
    """One side for each draft length (0: plain), and what to report of them.

    How to wait is decided by plain decoding of `prompt`.
    """
    context = len(prompt) + max_tokens + 64
    trial = fastest([start(model, None, 0, threads, context, wait) for wait in WAITS], prompt)
    about, wait = trial.about, trial.about["omp_wait_policy"]
    trial.close()
    sides = []
    for count in draft_tokens:
        process = start(model, drafter if count else None, count, threads, context, None if wait == "unset" else wait)
        name = f"llama.cpp {kind}, {f'drafted, K = {count}' if count else 'plain'}"
        sides.append(_side(name, process, max_tokens))
    return sides, about


def _side(name: str, process: Process, max_tokens: int) -> Side:
    def run(prompt: list[int]) -> list[int]:
        answer = process.ask({"prompt": prompt, "max_tokens": max_tokens})
        side.rounds += [(drafted, committed) for drafted, committed in answer["rounds"]]
        return answer["tokens"]

    side = Side(name, run)
    return side
