"""The text of one output from its tokens as they come, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from gemma_mtp.chat.marks import Region, Regions, TurnMarks
from gemma_mtp.tokenizer.tokenizer import Tokenizer


class StopMatcher:
    """Finds the first stop string in text that comes in pieces; holds back what may be the beginning of one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop = tuple(stop)
        self.found: str | None = None
        self._held = ""

    @property
    def stopped(self) -> bool:
        return self.found is not None

    def push(self, text: str) -> str:
        """Text that is certain to come before any stop string; nothing more once one was found."""
        if not self.stop:
            return text
        if self.stopped:
            return ""
        self._held += text
        # the match that is complete first, so that the result does not depend on how the text is cut into pieces
        found = [(at + len(stop), at, stop) for stop in self.stop if (at := self._held.find(stop)) >= 0]
        if found:
            _, at, self.found = min(found)
            return self._give(at)
        return self._give(len(self._held) - self._possible_beginning())

    def flush(self) -> str:
        """What is held back, when no more text comes."""
        return "" if self.stopped else self._give(len(self._held))

    def _possible_beginning(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max((len(stop) - 1 for stop in self.stop), default=0)
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self.stop):
                return length
        return 0

    def _give(self, length: int) -> str:
        given, self._held = self._held[:length], self._held[length:]
        return given


class OutputText:
    """The text of one output, from its tokens as they come: what is certain of it, up to a stop string.

    With `marks`, thoughts and calls are no part of it, and no stop string is looked for in them. `begin` is the part of
    the turn that the prompt leaves off in.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), marks: TurnMarks | None = None, begin: Region = "text"
    ) -> None:
        self._decoder = tokenizer.stream()
        self._matcher = StopMatcher(stop)
        self._regions = Regions(marks, begin) if marks is not None else None
        self._marks = frozenset[int]() if marks is None else marks.ids

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found, which ends the output."""
        return self._matcher.stopped

    @property
    def stop(self) -> str | None:
        """The stop string that ended the output."""
        return self._matcher.found

    def push(self, token_ids: Sequence[int], last: bool = False) -> str:
        """Text that became certain with these tokens. With the last ones also what was held back: half characters and
        possible beginnings of stop strings."""
        regions = self._regions
        if regions is not None and not (regions.current == "text" and self._marks.isdisjoint(token_ids)):
            token_ids = [token_id for token_id in token_ids if regions.enter(token_id) == "text"]
        text = self._matcher.push(self._decoder.push(token_ids))
        return text + self._matcher.push(self._decoder.flush()) + self._matcher.flush() if last else text
