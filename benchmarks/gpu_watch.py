"""Runs a part of `gpu_check.py` in a process of its own: an error of the card ends with it, and one that hangs is
ended."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Sequence


def watch(command: Sequence[str], seconds: float, on_line: Callable[[str], None]) -> str | None:
    """Run a command for so many seconds at most, and pass on each line of its output as it comes.

    Returns why it did not end by itself and well, or None. What is killed is killed with all that it started, such as
    compilers.
    """
    late = threading.Event()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:

        def end() -> None:
            late.set()
            os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(seconds, end)
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                on_line(line)
            code = process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            timer.cancel()
    if late.is_set():
        return f"it had not ended after {seconds:.0f} seconds and was killed"
    if code < 0:
        return f"it was ended by {signal.Signals(-code).name}"
    return f"it ended with exit code {code}" if code else None
