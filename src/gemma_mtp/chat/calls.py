"""The syntax of Gemma 4's calls, read as it is written: `call:NAME{key:<|"|>text<|"|>,list:[1]}` to a name and JSON.

A text stands between two quotes, which are tokens of their own, as it is; keys stand bare, or between quotes. The
reader sees the tokens' texts, and quotes as what they are, never as text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection

#: names of tools; what separates them from their arguments can not be in them
NAME = re.compile(r"[a-zA-Z0-9_.-]{1,128}")
_BEGIN = "call:"
_WORD = re.compile(r"true|false|null|-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
#: what a key of its own can have in it, if it is not between quotes
BARE = r"[^ \t\r\n{}\[\],:\"<>|]+"
BARE_KEY = re.compile(BARE)
_SPACE = " \t\r\n"


class MalformedCallError(Exception):
    """What was read is no call of a tool that there is."""


class CallReader:
    """One call. `push` and `quote` return the JSON of the arguments that became certain; `name` is there from the
    brace on. Raises MalformedCallError."""

    def __init__(self, tools: Collection[str]) -> None:
        self.name: str | None = None
        self._tools = tools
        self._head = ""
        self._open: list[str] = []  # of the braces and brackets around
        self._expects = "value"  # or key, key or end, colon, value or end, comma, text, quoted key, end
        self._word = ""  # a bare key, number or name under way

    @property
    def complete(self) -> bool:
        """Whether the arguments have ended."""
        return self.name is not None and not self._open

    def push(self, text: str) -> str:
        if self.name is None:
            text = self._read_head(text)
        if self._expects in ("text", "quoted key") and text:
            return self._in_quotes(text)
        return "".join(map(self._character, text))

    def quote(self) -> str:
        """A quote comes: a text or a key begins, or ends."""
        if self.name is None:
            raise MalformedCallError
        match self._expects:
            case "text":
                return self._after_value('"')
            case "quoted key":
                key, self._word, self._expects = self._word, "", "colon"
                return json.dumps(key, ensure_ascii=False)
            case "value" | "value or end" if not self._word:
                self._expects = "text"
                return '"'
            case "key" | "key or end" if not self._word:
                self._expects = "quoted key"
                return ""
        raise MalformedCallError

    def _read_head(self, text: str) -> str:
        """Returns what follows the name."""
        self._head += text
        head, brace, rest = self._head.partition("{")
        name = head.removeprefix(_BEGIN)
        if brace:
            if not head.startswith(_BEGIN) or name not in self._tools:
                raise MalformedCallError
            self.name = name
            return brace + rest
        if not (_BEGIN.startswith(head) or (head.startswith(_BEGIN) and any(t.startswith(name) for t in self._tools))):
            raise MalformedCallError
        return ""

    def _in_quotes(self, text: str) -> str:
        if self._expects == "text":
            return json.dumps(text, ensure_ascii=False)[1:-1]
        self._word += text
        return ""

    def _character(self, character: str) -> str:
        if self._word:
            return self._go_on(character)
        if character in _SPACE:
            return ""
        match self._expects, character:
            case "value" | "value or end", "{":
                self._open.append("}")
                self._expects = "key or end"
                return "{"
            case "value" | "value or end", "[":
                self._open.append("]")
                self._expects = "value or end"
                return "["
            case "colon", ":":
                self._expects = "value"
                return ":"
            case "comma", ",":
                self._expects = "key" if self._open[-1] == "}" else "value"
                return ","
            case "comma" | "key or end" | "value or end", "}" | "]" if character == self._open[-1]:
                self._open.pop()
                return self._after_value(character)
            case "value" | "value or end" | "key" | "key or end", _ if BARE_KEY.fullmatch(character):
                self._word = character
                return ""
        raise MalformedCallError

    def _go_on(self, character: str) -> str:
        """A bare word goes on, or ends by what comes after it."""
        if BARE_KEY.fullmatch(character):
            self._word += character
            return ""
        word, self._word = self._word, ""
        if self._expects.startswith("key"):
            self._expects = "colon"
            return json.dumps(word, ensure_ascii=False) + self._character(character)
        if not _WORD.fullmatch(word):
            raise MalformedCallError
        return self._after_value(word) + self._character(character)

    def _after_value(self, written: str) -> str:
        self._expects = "comma" if self._open else "end"
        return written
