"""Other runtimes, which `make interop` installs into folders of their own: run as processes, never imported here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

BUILD = Path(__file__).parents[1] / "build" / "interop"
SCRIPTS = Path(__file__).parent / "interop"
#: what a busy machine may take; only a test that fails waits so long
SECONDS = 900.0


def folder(runtime: str) -> Path:
    """Where a runtime is installed."""
    found = BUILD / runtime
    assert found.is_dir(), "run `make interop`"
    return found


def played(runtime: str, script: str, *arguments: Any, **variables: str) -> Any:
    """The JSON that a script of `interop` prints in its last line, with the runtime before all other packages."""
    words = [word if isinstance(word, str) else json.dumps(word, default=str) for word in arguments]
    ran = subprocess.run(
        [sys.executable, str(SCRIPTS / script), *words], env=_environment(runtime, **variables),
        capture_output=True, text=True, timeout=SECONDS, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-4000:]
    return json.loads(ran.stdout.splitlines()[-1])


def _environment(runtime: str, **variables: str) -> dict[str, str]:
    """That of a process which imports a runtime before all other packages."""
    path = os.pathsep.join([str(folder(runtime)), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, **variables}


@contextmanager
def llama_server(arguments: Sequence[str]) -> Iterator[httpx.Client]:
    """llama.cpp's server with llama-server's arguments, and a client for it."""
    command = [sys.executable, str(SCRIPTS / "serve_llama_cpp.py"), *arguments]
    with tempfile.TemporaryFile("w+") as log:
        running = subprocess.Popen(
            command, env=_environment("llama.cpp"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
        assert running.stdin is not None and running.stdout is not None
        try:
            url = running.stdout.readline().strip()
            log.seek(0)
            assert url, log.read()[-4000:]
            with httpx.Client(base_url=url, timeout=SECONDS) as client:
                yield client
        finally:
            running.stdin.close()
            running.wait()
            running.stdout.close()


def llama_tokens(client: httpx.Client, prompt: Sequence[int], count: int) -> tuple[list[int], int]:
    """Greedy tokens of llama.cpp's server, and how many drafts it made for them."""
    asked = {"prompt": list(prompt), "n_predict": count, "temperature": 0, "return_tokens": True, "ignore_eos": True,
             "cache_prompt": False}  # fmt: skip
    answer = client.post("/completion", json=asked)
    assert answer.status_code == 200, answer.text
    said = answer.json()
    return said["tokens"], said["timings"].get("draft_n", 0)
