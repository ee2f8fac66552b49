"""Other programs as sides: each a process that decodes the same weights, stopped while it is not its turn."""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sides import Side

HERE = Path(__file__).parent
#: how OpenMP's idle threads wait (OMP_WAIT_POLICY): spinning, or asleep. Each program gets the faster one.
WAITS = ("ACTIVE", "PASSIVE")
TRIAL_TOKENS, TRIALS = 24, 3


@dataclass
class Peer:
    """A program that decodes in a process of its own, so that no side's threads are in another's way."""

    name: str
    wait: str
    popen: subprocess.Popen[str]
    about: dict[str, Any] = field(default_factory=dict)

    def read(self) -> dict[str, Any]:
        assert self.popen.stdout is not None
        line = self.popen.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self.name} ended with code {self.popen.wait()}")
        return json.loads(line)

    def pause(self) -> None:
        """Stop the process, whose idle threads may spin."""
        self.popen.send_signal(signal.SIGSTOP)

    def generate(self, prompt: list[int], max_tokens: int, draft_tokens: int) -> dict[str, Any]:
        assert self.popen.stdin is not None
        request = {"prompt": prompt, "max_tokens": max_tokens, "draft_tokens": draft_tokens}
        self.popen.send_signal(signal.SIGCONT)
        self.popen.stdin.write(json.dumps(request) + "\n")
        self.popen.stdin.flush()
        answer = self.read()
        self.pause()
        return answer

    def close(self) -> None:
        self.popen.kill()
        self.popen.wait()

    def side(self, draft_tokens: int, max_tokens: int) -> Side:
        def run(prompt: list[int]) -> list[int]:
            answer = self.generate(prompt, max_tokens, draft_tokens)
            side.rounds += [(drafted, committed) for drafted, committed in answer["rounds"]]
            return answer["tokens"]

        side = Side(f"{self.name}, {f'drafted, K = {draft_tokens}' if draft_tokens else 'plain'}", run)
        return side


def start(name: str, decoder: str, options: Mapping[str, object], prompt: list[int]) -> Peer:
    """A program's process with the way of waiting that decodes `prompt` fastest; the others are ended.

    `decoder` is a file beside this one, which takes `options` and answers requests.
    """
    words = [str(word) for option in options.items() for word in option]
    command = [sys.executable, str(HERE / decoder), *words]
    peers = [_launched(name, wait, command) for wait in WAITS]
    for peer in peers:
        peer.about = {**peer.read(), "omp_wait_policy": peer.wait}
        peer.pause()
    best = min(peers, key=lambda peer: _trial_seconds(peer, prompt))
    for peer in peers:
        if peer is not best:
            peer.close()
    return best


def _launched(name: str, wait: str, command: list[str]) -> Peer:
    environment = {**os.environ, "OMP_WAIT_POLICY": wait}
    popen = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    atexit.register(popen.kill)  # a stopped process would stay
    return Peer(name, wait, popen)


def _trial_seconds(peer: Peer, prompt: list[int]) -> float:
    seconds = []
    for _ in range(TRIALS):
        started = time.perf_counter()
        peer.generate(prompt, TRIAL_TOKENS, 0)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def transformers_peer(target: Path, drafter: Path, dtype: str, threads: int, prompt: list[int]) -> Peer:
    """Hugging Face's own generate, plain and assisted."""
    options = {"--target": target, "--drafter": drafter, "--dtype": dtype, "--threads": threads}
    return start(f"transformers {dtype}", "transformers_decoder.py", options, prompt)


def llama_cpp_peer(
    files: tuple[Path, Path | None], kind: str, threads: int, prompts: Sequence[list[int]], max_tokens: int
) -> Peer:
    """llama.cpp, plain and with its own Gemma 4 drafter, if there is one, on GGUF files of type `kind`."""
    context = max(map(len, prompts)) + max_tokens + 64
    options = {"--model": files[0], "--threads": threads, "--context": context}
    if files[1] is not None:
        options["--drafter"] = files[1]
    return start(f"llama.cpp {kind}", "llama_cpp_decoder.py", options, prompts[0])
