"""Where commands print: what the terminal's encoding has no character for is an escape such as \\u2026, no error."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

#: lines that are printed the same everywhere fit a terminal of so many columns
COLUMNS = 80


def open_streams() -> None:
    """Standard streams that are closed, as by `>&-`, become the null device. Without it what is meant for standard
    error would be printed on standard output, and a file that is opened later would be taken for either."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, encoding="utf-8"))


def forget_no_size() -> None:
    """COLUMNS=0 says that nobody knows the terminal's width; Rich would take it for none, and print nothing at all."""
    for name in ("COLUMNS", "LINES"):
        if os.environ.get(name, "").isdigit() and not int(os.environ[name]):
            del os.environ[name]


class LogLines(logging.Handler):
    """Prints what is logged to standard error as it is then: above a progress bar, where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(self.format(record), file=sys.stderr)
        except (OSError, ValueError):  # nobody reads it
            self.handleError(record)


def discard(stream: TextIO) -> None:
    """What is still to be written to a stream that takes no more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextlib.contextmanager
def readers_may_leave() -> Iterator[None]:
    """Ends the command with 0 where the reader of its output leaves, as `head` does, which is its right. Typer and Rich
    would make an exit with 1 of it."""
    try:
        yield
    except BrokenPipeError:
        discard(sys.stdout)
        raise typer.Exit from None


def print_anything() -> None:
    """From now on, both standard streams write escapes for characters that their encoding does not have."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def console(stderr: bool = False) -> Console:
    """For tables and colours. Text stays as it is: brackets and colons are no markup in paths, names and outputs."""
    from rich.console import Console  # a tenth of a second, which completion does without

    class OurConsole(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # which Rich caught, to exit with 1

    return OurConsole(stderr=stderr, markup=False, emoji=False, highlight=False)


def say(out: Console, text: str, style: str | None = None) -> None:
    """A line as it is, which the terminal breaks where it must."""
    out.print(text, style=style, highlight=False, soft_wrap=True)


def plain_table(*columns: str, words: int = 1, no_wrap: bool = False) -> Table:
    """A table to fill, of which the first columns hold `words` and the others numbers."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < words else "right", no_wrap=no_wrap)
    return table


def print_table(out: Console, table: Table) -> None:
    """A table of which nothing is cut: where not even its longest words fit the terminal, its lines are longer."""
    from rich.cells import cell_len

    for column in table.columns:
        texts = [str(text) for text in (column.header, *column.cells)]
        whole = texts if column.no_wrap else [word for text in texts for word in text.split()]
        column.min_width = max(map(cell_len, whole), default=0)
    out.print(table, crop=False)
