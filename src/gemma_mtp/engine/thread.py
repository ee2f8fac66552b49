"""An engine that steps in a thread of its own, for whoever has other things to do: a server, an event loop."""

from __future__ import annotations

import gc
import threading
import time

import torch

from gemma_mtp.engine.engine import Engine
from gemma_mtp.engine.loaded import LoadedPair
from gemma_mtp.engine.request import Generation, Request
from gemma_mtp.engine.settings import EngineSettings, EngineStats
from gemma_mtp.errors import EngineError


class EngineThread:
    """Plays an engine's steps while there is work. Thread-safe; start it with `start` or as a context manager."""

    def __init__(self, pair: LoadedPair, settings: EngineSettings | None = None) -> None:
        """Raises EngineError where the memory for keys and values does not hold one request."""
        self.engine = Engine(pair, settings)
        self._condition = threading.Condition()
        self._step_began: float | None = None  # seconds of `time.monotonic`
        self._stopping = False
        self._froze = False  # what was in memory at the start
        self._thread: threading.Thread | None = None

    def __enter__(self) -> EngineThread:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    @property
    def pair(self) -> LoadedPair:
        return self.engine.pair

    @property
    def settings(self) -> EngineSettings:
        return self.engine.settings

    @property
    def max_tokens(self) -> int:
        """Prompt and output of one request together, at most."""
        return self.engine.max_tokens

    def start(self) -> None:
        """Begin to play steps.

        What is in memory by now, models and modules, is kept out of the garbage collector's sight until `stop`: to look
        through it takes a tenth of a second and more, for which every running sequence would wait, again and again.
        """
        assert self._thread is None
        self._froze = gc.get_freeze_count() == 0
        if self._froze:
            gc.freeze()
        self._thread = threading.Thread(target=self._loop, name="gemma-mtp-engine", daemon=True)
        self._thread.start()

    def warm_up(self) -> None:
        """Measure what rounds cost, which the first requests would wait for."""
        self.engine.warm_up()

    def submit(self, request: Request) -> Generation:
        """Queue a request; returns what its output can be read from. Raises what `Engine.submit` does, and EngineError
        where the engine is stopping."""
        job = self.engine.prepare(request)
        with self._condition:
            if self._stopping:
                raise EngineError("the engine is stopping and takes no more requests; send it to another one.")
            generation = self.engine.add(job)
            self._condition.notify_all()
        return generation

    def stop(self, drain_seconds: float = 0.0) -> None:
        """Take no more requests, let those that are here go on for so long, cancel the rest and end the thread."""
        with self._condition:
            self._stopping = True
            self._condition.notify_all()
            self._condition.wait_for(lambda: self.engine.idle, drain_seconds)
            self.engine.cancel_all()
            self._condition.notify_all()
        if self._thread is not None:
            self._thread.join()
            if self._froze:
                gc.unfreeze()
                self._froze = False  # may be stopped again, when others have frozen theirs

    @property
    def alive(self) -> bool:
        """Whether the thread runs that plays steps."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def step_seconds(self) -> float:
        """How long the step under way has taken so far; 0 between steps."""
        began = self._step_began
        return 0.0 if began is None else time.monotonic() - began

    def stats(self) -> EngineStats:
        """Returns a snapshot of the counters."""
        return self.engine.stats()

    @torch.inference_mode()
    def _loop(self) -> None:
        while True:
            if self.engine.idle:
                with self._condition:
                    self._condition.notify_all()  # who waits for the end
                    self._condition.wait_for(lambda: not self.engine.idle or self._stopping)
                    if self._stopping and self.engine.idle:
                        return
            self._step_began = time.monotonic()
            self.engine.play()
            self._step_began = None
