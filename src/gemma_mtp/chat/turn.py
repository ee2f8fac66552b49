"""A model's turn as it is written: from tokens to thoughts, text and calls of tools. Pure and incremental: the events
of all tokens are the same however the tokens are cut."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from gemma_mtp.chat.calls import CallReader, MalformedCallError
from gemma_mtp.chat.marks import Region, Regions
from gemma_mtp.tokenizer.output_text import OutputText
from gemma_mtp.tokenizer.token_text import TextDecoder
from gemma_mtp.tokenizer.tokenizer import Tokenizer

#: the name of the channel that a thought begins with
LABEL = "thought\n"


@dataclass(frozen=True)
class Text:
    """More of the text for the user."""

    text: str


@dataclass(frozen=True)
class Thought:
    """More of a thought."""

    text: str


@dataclass(frozen=True)
class CallBegin:
    """A call of a tool begins; its arguments come."""

    name: str


@dataclass(frozen=True)
class Arguments:
    """More of the JSON text of a call's arguments."""

    json: str


@dataclass(frozen=True)
class CallEnd:
    """The arguments of a call are complete."""


Event = Text | Thought | CallBegin | Arguments | CallEnd
_NOTHING = (Text(""), Thought(""), Arguments(""))


class TurnReader:
    """Reads one turn. `begin` is the part that the prompt leaves off in, `tools` the names that may be called.

    A call of no such tool, or in no such form, is text, its marks included. Where a call breaks off after its name, so
    do its arguments.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), begin: Region = "text", tools: Collection[str] = ()
    ) -> None:
        self._tokenizer, self._tools = tokenizer, tools
        self._marks = tokenizer.marks
        self._ids = self._marks.ids
        self._regions = Regions(self._marks, begin)
        self._text = OutputText(tokenizer, stop)
        self._thought = _Thought(tokenizer.stream()) if begin == "thought" else None
        self._call = _Call(CallReader(tools), tokenizer) if begin == "call" else None

    @property
    def stop(self) -> str | None:
        """The stop string that ended the text."""
        return self._text.stop

    def push(self, token_ids: Sequence[int], last: bool = False) -> list[Event]:
        """Returns what these tokens add; `last`: there are no more."""
        if self._regions.current == "text" and self._ids.isdisjoint(token_ids):
            text = self._text.push(token_ids, last)
            return [Text(text)] if text else []
        events = [event for token_id in token_ids for event in self._token(token_id)]
        events += self._end() if last else ()
        return [event for event in events if event not in _NOTHING]

    def _token(self, token_id: int) -> Iterator[Event]:
        part = self._regions.enter(token_id)
        if part == "text":
            yield Text(self._text.push([token_id]))
        elif part == "thought":
            assert self._thought is not None
            yield Thought(self._thought.push(token_id))
        elif part == "call":
            assert self._call is not None
            yield from self._call.push(token_id, self._marks.quote)
        else:
            yield from self._mark(token_id)

    def _mark(self, token_id: int) -> Iterator[Event]:
        """A part ends, or begins."""
        if self._thought is not None:
            yield Thought(self._thought.end())
            self._thought = None
        if self._call is not None:
            yield from self._call.end(token_id)
            self._call = None
        if self._regions.current == "thought":
            self._thought = _Thought(self._tokenizer.stream())
        elif self._regions.current == "call":
            self._call = _Call(CallReader(self._tools), self._tokenizer, [token_id])

    def _end(self) -> Iterator[Event]:
        yield Text(self._text.push([], last=True))
        if self._thought is not None:
            yield Thought(self._thought.end())
        if self._call is not None:
            yield from self._call.end(None)


class _Thought:
    """The text of a thought, without the channel's name and the line's end that close it in."""

    def __init__(self, decoder: TextDecoder) -> None:
        self._decoder = decoder
        self._held = ""
        self._begun = False

    def push(self, token_id: int) -> str:
        return self._given(self._decoder.push([token_id]))

    def end(self) -> str:
        rest = self._given(self._decoder.flush())
        held, self._held = self._held, ""
        return rest if self._begun else rest + held  # a line's end is held once it has begun, and its name before

    def _given(self, text: str) -> str:
        text = self._held + text
        if not self._begun:
            if len(text) < len(LABEL) and LABEL.startswith(text):
                self._held = text
                return ""
            self._begun, text = True, text.removeprefix(LABEL)
        self._held = "\n" if text.endswith("\n") else ""
        return text.removesuffix("\n")


@dataclass
class _Call:
    """A call under way."""

    reader: CallReader
    tokenizer: Tokenizer
    token_ids: list[int] = field(default_factory=list)
    broken: bool = False
    begun: bool = False

    def __post_init__(self) -> None:
        self._raw = self.tokenizer.stream(skip_special_tokens=False)
        self._decoder = self.tokenizer.stream(skip_special_tokens=False)

    def push(self, token_id: int, quote: int | None) -> Iterator[Event]:
        self.token_ids.append(token_id)
        if self.broken:
            yield Text(self._raw.push([token_id]))
            return
        try:
            if token_id == quote:
                found = self.reader.push(self._decoder.flush()) + self.reader.quote()
            else:
                found = self.reader.push(self._decoder.push([token_id]))
        except MalformedCallError:
            yield from self._break([token_id] if self.begun else self.token_ids)
            return
        if self.reader.name is not None and not self.begun:
            self.begun = True
            yield CallBegin(self.reader.name)
        yield Arguments(found)

    def end(self, mark: int | None) -> Iterator[Event]:
        """The call's last mark, or the end of the output."""
        if self.broken:
            yield Text(self._raw.push([] if mark is None else [mark]) + self._raw.flush())
        elif mark is not None and self.reader.complete:
            yield CallEnd()
        elif not self.begun:
            yield from self._break([*self.token_ids, *([] if mark is None else [mark])])

    def _break(self, token_ids: Sequence[int]) -> Iterator[Event]:
        """What was taken for a call is text."""
        self.broken = True
        yield Text(self._raw.push(token_ids))
