"""What a run of `gpu_check.py` knows: where, how kernels are launched and timed, until when, and what was found."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from gpu_scale import Scale
from torch import Tensor

from gemma_mtp.backend.cuda.launch import Launch
from gemma_mtp.backend.cuda.replay import CudaReplays, Replays


@dataclass
class Line:
    """A line of the table. `differing` of `compared` numbers have other bits; `share` is of the copy bandwidth.
    `failed`: an error kept something from being shown."""

    part: int
    what: str
    compared: int = 0
    differing: int = 0
    milliseconds: float | None = None
    gb_per_second: float | None = None
    share: float | None = None
    note: str = ""
    failed: bool = False


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")


class EagerReplays:
    """Plays recorded work by doing it again, where there is no card."""

    def capture(self, body: Callable[[], None]) -> Callable[[], None]:
        return body

    def staging(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    def mark(self) -> Callable[[], None]:
        return lambda: None

    def give_back(self) -> None:
        pass


@dataclass
class Run:
    """`launched` kernels so far, `waits` of the host for rounds, and how many rounds were `recorded`; of those that
    could not be, why. `report` is given each line as it is found."""

    device: torch.device
    launch_by: Launch
    scale: Scale
    copy_bandwidth: float = 0.0
    until: float = float("inf")
    report: Callable[[Line], None] = lambda line: None
    lines: list[Line] = field(default_factory=list)
    launched: int = 0
    waits: int = 0
    recorded: int = 0
    unrecorded: list[str] = field(default_factory=list)

    @property
    def on_card(self) -> bool:
        return self.device.type == "cuda"

    def launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        """Launches kernels, and counts them."""
        self.launched += 1
        self.launch_by(kernel, grid, *args, **options)

    def replays(self) -> Replays:
        """Returns a runtime for whole rounds, whose waits are counted."""
        return _Counted(self, CudaReplays(self.device) if self.on_card else EagerReplays())

    def add(self, line: Line) -> None:
        """Add a line, which is reported at once."""
        self.lines.append(line)
        self.report(line)

    def attempt(self, part: int, what: str, call: Callable[[], object]) -> None:
        """Make a call. What goes wrong in it is a line, and what comes after it runs all the same. Raises where the
        device does nothing any more."""
        try:
            call()
        except torch.OutOfMemoryError as error:
            self.add(Line(part, f"{what}: the rest did not fit: {first_line(error)}"))
        except Exception as error:
            traceback.print_exc()
            self.add(
                Line(part, f"{what}: the rest did not run: {type(error).__name__}: {first_line(error)}", failed=True)
            )
        else:
            return
        self.seconds()
        self.free()

    def spent(self) -> bool:
        return time.monotonic() > self.until

    def seconds(self) -> float:
        """Returns the wall clock once the device has done all it was asked for."""
        if self.on_card:
            torch.cuda.synchronize()
        return time.perf_counter()

    def repeats(self, times: int) -> int:
        """Returns so many on a card, else one."""
        return times if self.on_card else 1

    def milliseconds(self, call: Callable[[int], object], times: int) -> float:
        """Of one call in a replayed graph of `times` of them, which are given their numbers; the median of five.
        Without a card, of one call."""
        if not self.on_card:
            begun = time.perf_counter()
            call(0)
            return 1e3 * (time.perf_counter() - begun)
        for i in range(2):
            call(i)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(times):
                call(i)
        found = []
        for _ in range(6):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end) / times)
        return sorted(found[1:])[2]

    def memory(self) -> float:
        """Returns the card's bytes."""
        return float(torch.cuda.mem_get_info(self.device)[1]) if self.on_card else 1e9

    def beside(self) -> float:
        """Returns the card's bytes in use that PyTorch does not count: of the driver, of kernels, of recorded rounds,
        and of other processes."""
        if not self.on_card:
            return 0.0
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info(self.device)
        return float(total - free - torch.cuda.memory_reserved(self.device))

    def free(self) -> None:
        """Give back what nobody uses."""
        gc.collect()
        if self.on_card:
            torch.cuda.empty_cache()

    def timed(self, part: int, what: str, milliseconds: float, nbytes: float, note: str = "") -> None:
        """Add a line of what was timed, beside the bytes that it had to read."""
        speed = nbytes / milliseconds / 1e6
        share = speed / self.copy_bandwidth if self.copy_bandwidth else None
        self.add(Line(part, what, 0, 0, milliseconds, speed, share, note))


class _Counted:
    """Another runtime, with the host's waits counted."""

    def __init__(self, run: Run, replays: Replays) -> None:
        self._run, self._replays = run, replays

    def capture(self, body: Callable[[], None]) -> Callable[[], None]:
        try:
            replay = self._replays.capture(body)
        except RuntimeError as error:  # the round goes on without
            self._run.unrecorded.append(f"{type(error).__name__}: {first_line(error)}")
            raise
        self._run.recorded += 1
        return replay

    def staging(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return self._replays.staging(shape, dtype)

    def give_back(self) -> None:
        self._replays.give_back()

    def mark(self) -> Callable[[], None]:
        wait = self._replays.mark()

        def counted() -> None:
            self._run.waits += 1
            wait()

        return counted
