"""A progress display for what takes longer than two seconds, on a terminal only."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

PATIENCE_SECONDS = 2.0


@contextmanager
def progress(message: str) -> Iterator[Callable[[str], None]]:
    """Show `message` on stderr once two seconds have passed. The callable given changes it."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _: None
        return
    status = console.status(message)
    timer = threading.Timer(PATIENCE_SECONDS, status.start)
    timer.start()
    try:
        yield status.update
    finally:
        timer.cancel()
        timer.join()
        status.stop()
