"""How much work a regular expression is, told from its text before anything compiles it.

llguidance bounds how many states an automaton may have, not what one of them costs. That grows with the parts of the
expression, and with the text that must come: all of it is looked at for every token.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from gemma_mtp.errors import SamplingError

#: groups, classes and repetitions of one expression; what more of them cost grows with their square
MAX_PARTS = 1000
#: a class of Unicode is as much work as so many
UNICODE_PARTS = 3
#: characters that must come one after the other; an expression repeats them by a few characters of its own
MAX_REQUIRED = 20_000
#: what is too much anyway, so that numbers stay short
_PLENTY = 10**12
_UNICODE = r"(?P<unicode>\\(?:[pP](?:\{[^}]*\}|.)|[wWdDsS]))"
_ESCAPED = r"\\(?:[xuU](?:\{[^}]*\}|[0-9a-fA-F]{2,8})|.)"
#: one piece of an expression; of a class, which may have others inside
_PIECE = re.compile(
    rf"{_UNICODE}|(?P<escaped>{_ESCAPED})|(?P<text>[^\\\[(){{|*+?.^$]+)|\((?P<group>\?(?:P?<[^>]*>|[a-zA-Z-]*:?))?"
    r"|\{(?P<least>[0-9]+)(?:,[0-9]*)?\}|(?P<other>.)",
    re.DOTALL,
)
_PIECE_OF_CLASS = re.compile(rf"{_UNICODE}|{_ESCAPED}|(?P<other>.)", re.DOTALL)


@dataclass
class _Group:
    """What must come: in the longest alternative so far; in this one, before its last atom; in that atom."""

    longest: int = 0
    before: int = 0
    atom: int = 0

    def add(self, atom: int) -> None:
        self.before, self.atom = self.before + self.atom, atom

    def repeat(self, least: str) -> None:
        self.atom = min(self.atom * max(1, int(least[:9])), _PLENTY)

    def end_alternative(self) -> None:
        self.longest, self.before, self.atom = self.required, 0, 0

    @property
    def required(self) -> int:
        return max(self.longest, self.before + self.atom)


class _Expression:
    """An expression as it is read, piece by piece; of what is none, anything."""

    def __init__(self) -> None:
        self.parts, self.verbose = 0, False
        self._groups, self._classes = [_Group()], 0

    def read(self, expression: str) -> None:
        at = 0
        while at < len(expression):
            piece = (_PIECE_OF_CLASS if self._classes else _PIECE).match(expression, at)
            assert piece is not None, "every character is a piece"
            (self._take_of_class if self._classes else self._take)(piece)
            at = piece.end()
        while len(self._groups) > 1:
            self._end_group()

    @property
    def required(self) -> int:
        return self._groups[0].required

    def _take(self, piece: re.Match[str]) -> None:
        group, first = self._groups[-1], piece[0][0]
        if piece["text"] is not None:
            group.add(len(piece["text"]) - 1)
            group.add(1)
            return
        self.parts += UNICODE_PARTS if piece["unicode"] is not None else first in "([.*+?{"
        if first == "(":
            self.verbose |= "x" in (piece["group"] or "").partition("<")[0].partition("-")[0]
            self._groups.append(_Group())
        elif first == ")":
            self._end_group()
        elif first == "|":
            group.end_alternative()
        elif piece["least"] is not None:
            group.repeat(piece["least"])
        elif first == "[":
            self._classes += 1
        elif first not in "*+?^$":
            group.add(1)

    def _take_of_class(self, piece: re.Match[str]) -> None:
        self.parts += UNICODE_PARTS if piece["unicode"] is not None else piece["other"] == "["
        self._classes += {"[": 1, "]": -1}.get(piece["other"] or "", 0)
        if not self._classes:
            self._groups[-1].add(1)

    def _end_group(self) -> None:
        if len(self._groups) > 1:
            required = self._groups.pop().required
            self._groups[-1].add(required)


def check_expression(expression: str, name: str) -> int:
    """Returns how many parts an expression has. Raises SamplingError where it would be too much work."""
    read = _Expression()
    read.read(expression)
    if read.verbose:
        raise SamplingError(f"the {name} has the flag x, which is not offered; write it without spaces and remarks.")
    if read.parts > MAX_PARTS:
        raise SamplingError(
            f"the {name} has {read.parts} groups, classes (those of Unicode count as {UNICODE_PARTS}) and repetitions,"
            f" but may have {MAX_PARTS}; shorten it."
        )
    if read.required > MAX_REQUIRED:
        raise SamplingError(
            f"the {name} asks for {read.required} characters one after the other, but may for {MAX_REQUIRED};"
            " repeat less."
        )
    return read.parts
