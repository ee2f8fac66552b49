"""Work on a matrix's pieces, side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch

#: threads at most: each needs memory for its piece, some megabytes
MOST_THREADS = 8

Piece = TypeVar("Piece")
Made = TypeVar("Made")


def in_threads(work: Callable[[Piece], Made], pieces: Iterable[Piece], device: torch.device) -> list[Made]:
    """Returns what `work` makes of each piece, in order: on a CPU in as many threads as PyTorch may use.

    PyTorch shares each operator among its threads, and waits for them; a piece's operators are too short for that. So
    each piece has one thread. What `work` makes must not depend on how many threads an operator has.
    """
    pieces, allowed = list(pieces), torch.get_num_threads()
    threads = min(allowed, len(pieces), MOST_THREADS)
    if device.type != "cpu" or threads < 2:
        return [work(piece) for piece in pieces]
    try:
        with ThreadPoolExecutor(threads, initializer=partial(torch.set_num_threads, 1)) as pool:
            return list(pool.map(work, pieces))
    finally:
        torch.set_num_threads(allowed)  # the last one set holds for threads that begin later
