"""Where commands print: what the terminal's encoding has no character for is an escape such as \\u2026, no error."""

from __future__ import annotations

import io
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def print_anything() -> None:
    """From now on, both standard streams write escapes for characters that their encoding does not have."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def console(stderr: bool = False) -> Console:
    """For tables and colours. Text stays as it is: brackets and colons are no markup in paths, names and outputs."""
    from rich.console import Console  # a tenth of a second, which completion does without

    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)
