"""Ctrl-C: a KeyboardInterrupt that no callback and no import of a library swallows, or the end at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

#: exit code of what Ctrl-C ended, as shells have it
INTERRUPTED = 130
#: after which an interrupt that was lost comes again, out of the place that lost it
SOON_SECONDS = 0.01


def leave(number: int, frame: FrameType | None) -> None:
    """Ends the process without running anything more: a signal handler."""
    os._exit(INTERRUPTED)


@contextlib.contextmanager
def interrupted_later() -> Iterator[None]:
    """Ctrl-C inside raises KeyboardInterrupt at the end only, so that what is done inside is done whole."""
    pressed = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        pressed = True

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if pressed:
            signal.raise_signal(signal.SIGINT)


@contextlib.contextmanager
def interrupts_noted() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C raises nothing; what is given tells whether it was pressed. A second one raises
    KeyboardInterrupt."""
    pressed = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield lambda: False
        return
    handler = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, handler)


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Inside, Ctrl-C raises KeyboardInterrupt. What is given tells whether it was pressed.

    Where the exception comes in a place that can not hand it on, such as a destructor, Python would print a traceback
    and go on; here it is raised again right after. A library that turns it into an exception of its own is told by
    asking whether Ctrl-C was pressed. Handlers are as before in the end.
    """
    pressed = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        pressed = True
        raise KeyboardInterrupt

    def unraisable(report: Any) -> None:
        if issubclass(report.exc_type, KeyboardInterrupt):
            threading.Timer(SOON_SECONDS, os.kill, (os.getpid(), signal.SIGINT)).start()
        else:
            hook(report)

    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield lambda: False
        return
    hook, handler = sys.unraisablehook, signal.signal(signal.SIGINT, interrupt)
    sys.unraisablehook = unraisable
    try:
        yield lambda: pressed
    finally:
        sys.unraisablehook = hook
        signal.signal(signal.SIGINT, handler)
