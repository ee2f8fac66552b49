"""The text of one output from its tokens as they come, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from gemma_mtp.tokenizer.tokenizer import Tokenizer


class StopMatcher:
    """Finds the first stop string in text that comes in pieces; holds back what may be the beginning of one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop = tuple(stop)
        self.stopped = False
        self._held = ""

    def push(self, text: str) -> str:
        """Text that is certain to come before any stop string; nothing more once one was found."""
        if not self.stop:
            return text
        if self.stopped:
            return ""
        self._held += text
        # the match that is complete first, so that the result does not depend on how the text is cut into pieces
        found = [(at + len(stop), at) for stop in self.stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._give(min(found)[1])
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
    """The text of one output, from its tokens as they come: what is certain of it, up to a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._decoder = tokenizer.stream()
        self._matcher = StopMatcher(stop)

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found, which ends the output."""
        return self._matcher.stopped

    def push(self, token_ids: Sequence[int], last: bool = False) -> str:
        """Text that became certain with these tokens. With the last ones also what was held back: half characters and
        possible beginnings of stop strings."""
        text = self._matcher.push(self._decoder.push(token_ids))
        return text + self._matcher.push(self._decoder.flush()) + self._matcher.flush() if last else text
