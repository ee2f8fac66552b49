"""What a trainer shows and keeps: a progress bar on a terminal, else a line now and then; a CSV; TensorBoard."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from gemma_mtp.errors import TrainingError, missing_extra
from gemma_mtp.files.replace import replace_text
from gemma_mtp.progress import Display


class RunLog:
    """Rows of one trainer, by step. Rows after `resumed_step` of an earlier run's CSV are dropped.

    A `quiet` one keeps and shows nothing: of several processes that train together, one logs.

    Raises TrainingError where the CSV can not be written, or TensorBoard is asked for and not installed.
    """

    def __init__(
        self, directory: Path, name: str, resumed_step: int = 0, tensorboard: bool = False, quiet: bool = False
    ) -> None:
        self.path, self.name = directory / f"{name}.csv", name
        self.display = Display(name, 0.0, quiet)
        self._writer = _summary_writer(directory / "tensorboard", resumed_step) if tensorboard and not quiet else None
        self._quiet = quiet
        self._kept = [] if quiet else _rows_until(self.path, resumed_step)
        self._file: TextIO | None = None
        self._columns: list[str] = []

    def __enter__(self) -> RunLog:
        self.display.__enter__()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.display.__exit__(kind, error, trace)
        for opened in filter(None, (self._file, self._writer)):
            with self._reported() if error is None else contextlib.suppress(OSError):  # the first error is the cause
                opened.close()

    def row(self, step: int, share_done: float, values: Mapping[str, float], text: str) -> None:
        """One step's figures, and what to show of them."""
        if self._quiet:
            return
        with self._reported():
            self._write({"step": step, **values})
            if self._writer is not None:
                for name, value in values.items():
                    self._writer.add_scalar(f"{self.name}/{name}", value, step)
        self.display.show(text, share_done)

    def flush(self) -> None:
        """Make sure that what was logged is in the file."""
        if self._file is not None:
            with self._reported():
                self._file.flush()

    def _write(self, values: dict[str, Any]) -> None:
        if self._file is None:
            self._columns = list(values)
            lines = [",".join(self._columns) + "\n", *self._kept]
            replace_text(self.path, "".join(lines))
            self._file = self.path.open("a", newline="", encoding="utf-8")
        csv.writer(self._file).writerow([f"{v:.6g}" if isinstance(v, float) else v for v in values.values()])

    @contextlib.contextmanager
    def _reported(self) -> Any:
        try:
            yield
        except OSError as error:
            raise TrainingError(
                f"the log in {self.path.parent} can not be written: {error}; make room, then go on with --resume."
            ) from None


def _rows_until(path: Path, step: int) -> list[str]:
    """The lines of an earlier CSV up to a step; a line that was cut off is none."""
    if step == 0 or not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[1:]
    return [line for line in lines if line.endswith("\n") and int(line.split(",")[0]) <= step]


def _summary_writer(directory: Path, resumed_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise TrainingError(missing_extra("--tensorboard", "tensorboard", "train")) from None
    return SummaryWriter(str(directory), purge_step=resumed_step or None)
