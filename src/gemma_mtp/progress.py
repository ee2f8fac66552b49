"""Shows how far a long piece of work is, on standard error: a bar on a terminal, else a line now and then.

A pipe, a dumb terminal and a notebook can not redraw a line, so they get new ones. On a terminal the bar, the
percentage and the time left always have their place, and the text beside them is cut to what room is left.

A stage inside another one is shown in its place: of several displays, the innermost alone is seen.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import ClassVar

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.progress import TimeRemainingColumn as TimeLeft
from rich.table import Column

from gemma_mtp.units import shown_bytes_of

#: what is done before shows nothing
PATIENCE_SECONDS = 2.0
#: where nothing can be redrawn: between two lines; between those that say nothing new; what share of the work is new
LINE_SECONDS, SAME_SECONDS, NEW_SHARE = 10.0, 60.0, 0.05
BAR_COLUMNS = 16


@contextlib.contextmanager
def loading(quiet: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """Shows how much of a pair's weights is loaded. What is given is told which model's bytes are done, how many, and
    of how many (`load_pair`'s `on_bytes`)."""
    with Display("loading", quiet=quiet) as display:
        yield lambda part, done, of: display.show_bytes(done, of, f"loading the {part}")


def say(text: str) -> None:
    """Writes a line to standard error, which stays, above whatever bar there is."""
    with Display._lock:
        shown = Display._entered[-1]._console if Display._entered else _console()
        shown.print(text, soft_wrap=True)


def _console(quiet: bool = False) -> Console:
    return Console(stderr=True, highlight=False, markup=False, emoji=False, quiet=quiet)


class _Share(ProgressColumn):
    """Bar, percentage or time left, where it is known how far the work is; nothing elsewhere."""

    def __init__(self, shown: ProgressColumn) -> None:
        super().__init__(Column(no_wrap=True))
        self._shown = shown

    def render(self, task: Task) -> object:  # type: ignore[override]
        return "" if task.total is None else self._shown.render(task)


class Display:
    """One piece of work: its name, the share done where that is known, and what is said of it.

    Shows nothing before `patience` seconds have passed, nothing where it is `quiet`, and nothing while another display
    is entered inside of it.
    """

    #: those that are entered and not quiet, the outermost first; there is one standard error
    _entered: ClassVar[list[Display]] = []
    _lock: ClassVar[threading.RLock] = threading.RLock()

    def __init__(self, name: str, patience: float | None = None, quiet: bool = False) -> None:
        self.name, self.text = name, ""
        self.share: float | None = None
        self._quiet, self._patience = quiet, PATIENCE_SECONDS if patience is None else patience
        self._console = _console(quiet)
        self._redraws = self._console.is_terminal and not self._console.is_dumb_terminal and not quiet
        self._ended, self._waited = threading.Event(), False
        self._made_bar = self._new_bar() if self._redraws else None
        self._last_line, self._said = time.monotonic(), ("", 0.0)
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Display:
        if self._quiet:
            return self
        with self._lock:
            for outer in self._entered:
                if outer._hide():
                    self._patience = 0.0  # what was seen goes on to be seen
            self._entered.append(self)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join()
        with self._lock:
            self._hide()
            if self in self._entered:
                self._entered.remove(self)
            if self._entered and self._entered[-1]._waited and error is None:
                self._entered[-1]._bar_if_seen()

    def show(self, text: str, share: float | None = None, name: str | None = None) -> None:
        """What is under way now, and how far: from 0 to 1, or None where nobody knows."""
        self.text, self.name = text, self.name if name is None else name
        self.share = None if share is None else min(1.0, max(0.0, share))
        if self._made_bar is not None:
            bar, task = self._made_bar
            bar.tasks[0].total = None if share is None else 1.0
            bar.update(task, description=self.name, completed=self.share or 0.0, text=text)
        else:
            self._line_if_due()

    def show_bytes(self, done: int, of: int, name: str | None = None) -> None:
        """The same for bytes, of which there are `of` in all."""
        self.show(shown_bytes_of(done, of), done / of if of else None, name)

    def say(self, text: str) -> None:
        """A line of its own, as `say` has it."""
        if not self._quiet:
            say(text)

    def _watch(self) -> None:
        """Starts the bar after a while, or writes lines while the work says nothing."""
        if self._ended.wait(self._patience):
            return
        self._waited = True
        if self._made_bar is not None:
            self._bar_if_seen()
            return
        while not self._ended.wait(LINE_SECONDS):
            self._line_if_due()

    @property
    def _seen(self) -> bool:
        """Whether no display is entered inside of this one."""
        return not self._quiet and self._entered[-1:] in ([], [self])

    def _bar_if_seen(self) -> None:
        with self._lock:
            if self._made_bar is not None and self._seen:
                self._made_bar[0].start()

    def _hide(self) -> bool:
        """Takes the bar away. Returns whether it was there."""
        started = self._made_bar is not None and self._made_bar[0].live.is_started
        if started and self._made_bar is not None:
            self._made_bar[0].stop()
        return started

    def _line_if_due(self) -> None:
        with self._lock:
            if not self._seen or not self._due():
                return
            self._last_line, self._said = time.monotonic(), (self.name, self.share or 0.0)
            share = "" if self.share is None else f"{self.share:.0%}"
            self._console.print(" ".join(filter(None, (self.name, share, self.text))), soft_wrap=True)

    def _due(self) -> bool:
        """Whether a line is worth its place: the last one is some time ago, and there is something new, or long ago."""
        passed, (name, share) = time.monotonic() - self._last_line, self._said
        gained = (self.share or 0.0) - share
        new = name != self.name or gained >= NEW_SHARE or (gained > 0 and self.share == 1.0)
        return passed >= (LINE_SECONDS if new else SAME_SECONDS)

    def _new_bar(self) -> tuple[Progress, TaskID]:
        bar = Progress(
            SpinnerColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            _Share(BarColumn(BAR_COLUMNS)), _Share(TextColumn("{task.percentage:>3.0f}%")),
            _Share(TimeLeft(compact=True)),
            TextColumn("{task.fields[text]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
            console=self._console, expand=True, transient=True,
            redirect_stdout=sys.stdout.isatty(),  # else what goes to a file meanwhile would go to the terminal
        )  # fmt: skip
        return bar, bar.add_task(self.name, total=None, text="")
