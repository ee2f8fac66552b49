"""A server of our own to measure: `gemma-mtp serve` in a process beside this one. Needs httpx."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import httpx

from gemma_mtp.errors import ServerError

START_SECONDS = 300.0
STOP_SECONDS = 60.0
POLL_SECONDS = 0.1
LAST_LINES = 5


class OwnServer:
    """A process that prints its URL, and what it printed last."""

    def __init__(self, command: Sequence[str]) -> None:
        # keys are for servers that others reach; this one listens on the loopback interface
        environment = {name: value for name, value in os.environ.items() if name != "GEMMA_MTP_API_KEYS"}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment
        )
        self._url: str | None = None
        self._lines: deque[str] = deque(maxlen=LAST_LINES)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def url(self) -> str:
        assert self._url is not None
        return self._url

    def wait_until_ready(self, seconds: float = START_SECONDS) -> None:
        """Until /health/ready says yes. Raises ServerError where the process ends, or takes longer."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                self._reader.join()
                said = " | ".join(self._lines).rstrip(".") or "nothing"
                raise ServerError(f"the server ended with code {self.process.returncode} and said: {said}.")
            if self._url is not None and _ready(self._url):
                return
            time.sleep(POLL_SECONDS)
        raise ServerError(f"the server was not ready within {seconds:g} seconds; try `gemma-mtp serve` alone.")

    def stop(self) -> None:
        """Ask it to drain and end, and end it where it does not."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _read(self) -> None:
        """Take in all it prints, so that it never waits for a full pipe."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.append(line.strip())
            found = re.search(r"https?://[^\s/\"',]*[\w\]]", line)
            if self._url is None and found is not None:
                self._url = found.group()


@contextmanager
def own_server(options: Sequence[str] = ()) -> Iterator[OwnServer]:
    """`gemma-mtp serve` with these options, on a free port, ready; stopped at the end. Raises ServerError."""
    server = OwnServer([sys.executable, "-m", "gemma_mtp", "serve", "--port", "0", *options])
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health/ready", timeout=5.0, trust_env=False).is_success
    except httpx.HTTPError:
        return False
