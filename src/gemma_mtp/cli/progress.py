"""A progress display for what takes longer than two seconds. Nothing is imported before something takes time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(message: str) -> Iterator[Callable[..., None]]:
    """Show `message` on stderr while the work takes longer than two seconds.

    The callable given changes it, and takes the share that is done where that is known.
    """
    from gemma_mtp.progress import Display

    with Display(message) as display:
        yield lambda text, share=None: display.show("", share, name=text)
