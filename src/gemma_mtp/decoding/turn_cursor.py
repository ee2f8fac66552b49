"""Where a turn stands among its rules (`TurnRules`): what may come next after every token, as `GrammarState` asks."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Literal, NamedTuple

from gemma_mtp.chat.marks import TurnMarks
from gemma_mtp.decoding.masks import Bits, everything, only, without
from gemma_mtp.decoding.matcher_cursor import MatcherCursor
from gemma_mtp.decoding.turn_rules import TurnRules

Place = Literal["begin", "thought", "after thought", "answer", "free", "name", "call", "no call", "called", "ended"]


class _Step(NamedTuple):
    """After a token: the place in the turn, tokens of thoughts so far, and the cursors there and of the token."""

    place: Place
    thought: int = 0
    cursor: MatcherCursor | None = None
    took: MatcherCursor | None = None


class TurnCursor:
    """A turn under way. `new_call` makes a cursor before a call's first token, where there are tools; `has_brace` says
    whether a token's text has the brace that ends a tool's name."""

    def __init__(
        self, rules: TurnRules, marks: TurnMarks, answer: MatcherCursor | None,
        new_call: Callable[[], MatcherCursor] | None, has_brace: Callable[[int], bool], end_ids: Collection[int],
        vocab_size: int,
    ) -> None:  # fmt: skip
        self._rules, self._answer, self._new_call, self._has_brace = rules, answer, new_call, has_brace
        self._think, self._unthink = marks.thought or (-1, -1)
        self._call, self._uncall = marks.call or (-1, -1)
        if rules.calls is None:
            self._call = -1
        self._response = -1 if marks.response is None else marks.response
        self._end_ids, self._vocab_size = end_ids, vocab_size
        self._everything = everything(vocab_size)
        begin: Place = "thought" if rules.begin == "thought" else "begin" if rules.held else "free"
        self._steps = [_Step(begin)]

    def mask(self) -> Bits | None:
        """Tokens that may come now; None where the turn has ended. Raises SamplingError as a `MatcherCursor` does."""
        step, rules = self._steps[-1], self._rules
        match step.place:
            case "thought":
                return self._of_thought(step.thought)
            case "begin" | "after thought":
                return self._of_begin(rules.thinking and step.place == "begin")
            case "answer" | "call":
                assert step.cursor is not None
                return step.cursor.mask()
            case "name" if rules.held:
                assert step.cursor is not None
                return step.cursor.mask()
            case "called":
                return self._of_called()
            case "ended":
                return None
        return self._everything

    def take(self, token_id: int) -> None:
        """Go on by a token, which its mask allows."""
        self._steps.append(self._next(self._steps[-1], token_id))

    def back(self, count: int) -> bool:
        """Forget the last tokens. Returns whether that could be done; else the cursor is of no use any more."""
        able = True
        for step in reversed(self._steps[len(self._steps) - count :]):
            if step.took is not None:
                able = step.took.back(1) and able
        del self._steps[len(self._steps) - count :]
        return able

    @property
    def complete(self) -> bool:
        step = self._steps[-1]
        if step.place == "answer":
            return step.cursor is not None and step.cursor.complete
        return step.place in ("free", "called", "ended")

    def keep(self) -> None:
        """What has been taken stays."""
        del self._steps[:-1]

    def _next(self, step: _Step, token_id: int) -> _Step:
        match step.place:
            case "thought":
                return self._in_thought(step, token_id)
            case "answer":
                return self._by(step.cursor, "answer", token_id)
            case "name":
                return self._in_name(step, token_id)
            case "call":
                return self._by(step.cursor, "called" if token_id == self._uncall else "call", token_id)
            case "no call":
                return self._step("free" if token_id == self._uncall else "no call")
        if token_id == self._call:
            return self._begin_call()
        if token_id == self._think:
            return self._step("thought")
        if step.place in ("begin", "after thought"):
            return self._by(self._answer, "answer", token_id)
        return self._step("ended" if step.place == "called" and self._rules.held else "free")

    def _step(
        self, place: Place, cursor: MatcherCursor | None = None, took: MatcherCursor | None = None, more: int = 0
    ) -> _Step:
        return _Step(place, self._steps[-1].thought + more, cursor, took)

    def _in_thought(self, step: _Step, token_id: int) -> _Step:
        if token_id == self._unthink:
            return self._step("after thought" if self._rules.held else "free")
        if token_id == self._call:
            return self._begin_call()
        return self._step("thought", more=1)

    def _begin_call(self) -> _Step:
        assert self._new_call is not None, "without tools no token begins a call"
        return self._step("name", self._new_call())

    def _in_name(self, step: _Step, token_id: int) -> _Step:
        """A call whose name the model chose. One that there is no tool for is left to the model."""
        assert step.cursor is not None
        if not self._rules.held and not step.cursor.accepts(token_id):
            return self._step("free" if token_id == self._uncall else "no call")
        return self._by(step.cursor, "call" if self._has_brace(token_id) else "name", token_id)

    def _by(self, cursor: MatcherCursor | None, place: Place, token_id: int) -> _Step:
        assert cursor is not None, "there is a grammar where one is followed"
        cursor.take(token_id)
        return self._step(place, cursor, cursor)

    def _of_thought(self, count: int) -> Bits:
        most = self._rules.max_thought_tokens
        if most is not None and count >= most:
            return only([self._unthink], self._vocab_size)
        return without(self._everything, self._end_ids) if self._rules.held else self._everything

    def _of_begin(self, thinking: bool) -> Bits | None:
        marks = only([*([self._think] if thinking else ()), self._call], self._vocab_size)
        if self._answer is None:
            return marks
        answer = self._answer.mask()
        return marks if answer is None else answer | marks

    def _of_called(self) -> Bits | None:
        if not self._rules.many_calls:
            return None
        if not self._rules.held:
            return self._everything
        return only([self._call, self._response, *self._end_ids], self._vocab_size)
