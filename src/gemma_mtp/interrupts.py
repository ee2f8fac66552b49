"""Ctrl-C, SIGTERM and SIGHUP: a KeyboardInterrupt that no callback and no import swallows, or the end at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

#: what ends a command from outside: Ctrl-C, being told to, the terminal's end; its exit code is then as shells have it
ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
#: that of what Ctrl-C ended
INTERRUPTED = 128 + signal.SIGINT
#: after which an interrupt that was lost comes again, out of the place that lost it
SOON_SECONDS = 0.01


def leave(number: int, frame: FrameType | None) -> None:
    """Ends the process without running anything more: a signal handler."""
    os._exit(INTERRUPTED)


@contextlib.contextmanager
def interrupted_later() -> Iterator[None]:
    """What ends a command raises KeyboardInterrupt at the end of the block: what is done inside is done whole."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = _handle(lambda number, frame: came.append(number))
    try:
        yield
    finally:
        _restore(handlers)
        if came:
            signal.raise_signal(came[0])


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
def interruptible() -> Iterator[Callable[[], int | None]]:
    """Inside, what ends a command raises KeyboardInterrupt. What is given tells which of the signals came, if one did.

    Where the exception comes in a place that can not hand it on, such as a destructor, Python would print a traceback
    and go on; here it is raised again right after. A library that turns it into an exception of its own is told by
    asking whether a signal came. Handlers are as before in the end.
    """
    came: int | None = None

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = number
        raise KeyboardInterrupt

    def unraisable(report: Any) -> None:
        if issubclass(report.exc_type, KeyboardInterrupt):
            threading.Timer(SOON_SECONDS, os.kill, (os.getpid(), came or signal.SIGINT)).start()
        else:
            hook(report)

    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield lambda: None
        return
    hook, handlers = sys.unraisablehook, _handle(interrupt)
    sys.unraisablehook = unraisable
    try:
        yield lambda: came
    finally:
        sys.unraisablehook = hook
        _restore(handlers)


def _handle(handler: Callable[[int, FrameType | None], object]) -> dict[signal.Signals, Any]:
    """Sets the handler of what ends a command, and not of what is ignored, as hang-ups are under nohup. Returns those
    before."""
    heard = (n for n in ENDING if n == signal.SIGINT or signal.getsignal(n) is not signal.SIG_IGN)
    return {number: signal.signal(number, handler) for number in heard}


def _restore(handlers: Mapping[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
