"""Special tokens that set parts of a model's turn apart: Gemma 4's thoughts and calls of tools.

    <|channel>thought\\n … <channel|>                    a thought
    <|tool_call>call:NAME{key:<|"|>text<|"|>,n:4}<tool_call|>   a call
    <|tool_response> …                                  where a tool's answer begins, which the model leaves to others

They are told by their ids, so that nobody can write them as text: the same characters in other tokens are text. The ids
are looked up in the checkpoint's tokenizer by these texts. In Gemma 4's they are 48 and 49 (a call), 50 and 51 (its
answer), 52 (the quote), 100 and 101 (a thought): so says the vocabulary in vllm-mlx's `tests/test_output_router.py`.
The syntax is that of `models/templates/gemma4.jinja` in llama.cpp, which is a copy of the checkpoints' own template.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

Region = Literal["text", "thought", "call"]

THOUGHT, CALL = ("<|channel>", "<channel|>"), ("<|tool_call>", "<tool_call|>")
QUOTE, RESPONSE = '<|"|>', "<|tool_response>"


@dataclass(frozen=True)
class TurnMarks:
    """Ids of the marks that a vocabulary has: of a thought and of a call the first and the last, of a text the quote,
    and of a tool's answer the first."""

    thought: tuple[int, int] | None = None
    call: tuple[int, int] | None = None
    quote: int | None = None
    response: int | None = None

    @staticmethod
    def of(special: Mapping[str, int]) -> TurnMarks:
        """Returns the marks among a vocabulary's special tokens, by their texts."""
        thought, call = (_both(special, names) for names in (THOUGHT, CALL))
        quote = special.get(QUOTE)
        return TurnMarks(thought, None if quote is None else call, quote, special.get(RESPONSE))

    @property
    def ids(self) -> frozenset[int]:
        """Those that begin or end a part."""
        return frozenset((*(self.thought or ()), *(self.call or ())))


def _both(special: Mapping[str, int], names: tuple[str, str]) -> tuple[int, int] | None:
    first, last = (special.get(name) for name in names)
    return None if first is None or last is None else (first, last)


class Regions:
    """Which part of a turn a token belongs to, one token after the other. A call ends a thought that is open."""

    def __init__(self, marks: TurnMarks, begin: Region = "text") -> None:
        self.current: Region = begin
        self._thought, self._call = marks.thought or (-1, -1), marks.call or (-1, -1)

    def enter(self, token_id: int) -> Region | None:
        """Move on by a token. Returns the part that it belongs to, or None for a mark that begins or ends one."""
        before = self.current
        if before == "call":
            if token_id != self._call[1]:
                return before
            self.current = "text"
        elif token_id == self._call[0]:
            self.current = "call"
        elif token_id == self._thought[before == "thought"]:
            self.current = "text" if before == "thought" else "thought"
        else:
            return before
        return None


def region_after(token_ids: Iterable[int], marks: TurnMarks) -> Region:
    """Returns where a prompt leaves off: a template may begin the model's thought."""
    regions = Regions(marks)
    for token_id in token_ids:
        regions.enter(token_id)
    return regions.current
