"""A turn as it is read: thoughts, text and calls by their marks, the same however tokens are cut."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from table_models import QUOTE, SCRIPTS, TEMPLATE, table_tokenizer

from gemma_mtp.chat.calls import CallReader, MalformedCallError
from gemma_mtp.chat.marks import TurnMarks, region_after
from gemma_mtp.chat.turn import Arguments, CallBegin, CallEnd, Event, Text, Thought, TurnReader
from gemma_mtp.tokenizer import Tokenizer
from gemma_mtp.tokenizer.output_text import OutputText

TOOLS = ("get_weather", "get_time")
TOKENIZER = table_tokenizer()


def ids(text: str | Sequence[str]) -> list[int]:
    if not isinstance(text, str):
        return [TOKENIZER.encode(piece, special=False)[0] for piece in text]
    return TOKENIZER.encode(text, special=False)


def joined(events: Sequence[Event]) -> list[Event]:
    """Events of one kind that follow each other as one."""
    made: list[Event] = []
    for event in events:
        before = made[-1] if made else None
        if isinstance(event, Text) and isinstance(before, Text):
            made[-1] = Text(before.text + event.text)
        elif isinstance(event, Thought) and isinstance(before, Thought):
            made[-1] = Thought(before.text + event.text)
        elif isinstance(event, Arguments) and isinstance(before, Arguments):
            made[-1] = Arguments(before.json + event.json)
        else:
            made.append(event)
    return made


def read(text: str | Sequence[str], **options: Any) -> list[Event]:
    reader = TurnReader(TOKENIZER, **{"tools": TOOLS, **options})
    return joined(reader.push(ids(text), last=True))


#: a turn, and what is in it
TURNS: dict[str, tuple[str, list[Event]]] = {
    "text": ("Hello.<turn|>", [Text("Hello.")]),
    "thought": ("<|channel>thought\nHm\nso<channel|>Yes<turn|>", [Thought("Hm\nso"), Text("Yes")]),
    "thought with a last line": ("<|channel>thought\nHm\n\n<channel|>Yes", [Thought("Hm\n"), Text("Yes")]),
    "empty thought": ("<|channel>thought\n<channel|>Yes", [Text("Yes")]),
    "unnamed thought": ("<|channel>Hm<channel|>Yes", [Thought("Hm"), Text("Yes")]),
    "half a name": ("<|channel>thou", [Thought("thou")]),
    "thought that does not end": ("<|channel>thought\nHm\n", [Thought("Hm")]),
    "call": (f"<|tool_call>call:get_weather{{city:{QUOTE}Rome{QUOTE},n:2}}<tool_call|><|tool_response>",
             [CallBegin("get_weather"), Arguments('{"city":"Rome","n":2}'), CallEnd()]),
    "calls and text": ("So: <|tool_call>call:get_time{}<tool_call|><|tool_call>call:get_time{ }<tool_call|>.",
                       [Text("So: "), CallBegin("get_time"), Arguments("{}"), CallEnd(), CallBegin("get_time"),
                        Arguments("{}"), CallEnd(), Text(".")]),
    "call in a thought": ("<|channel>thought\nHm<|tool_call>call:get_time{}<tool_call|>",
                          [Thought("Hm"), CallBegin("get_time"), Arguments("{}"), CallEnd()]),
    "nested": (f"<|tool_call>call:get_time{{a:[1,{{b:null}},[]],{QUOTE}odd key{QUOTE}: -1.5e3 ,c:{{}},"
               f"d:{QUOTE}{QUOTE}}}<tool_call|>",
               [CallBegin("get_time"), Arguments('{"a":[1,{"b":null},[]],"odd key":-1.5e3,"c":{},"d":""}'), CallEnd()]),
    "text is text": (f'<|tool_call>call:get_time{{s:{QUOTE}é"\\{{}},:\n{QUOTE}}}<tool_call|>',
                     [CallBegin("get_time"), Arguments('{"s":"é\\"\\\\{},:\\n"}'), CallEnd()]),
    "cut after the name": ("<|tool_call>call:get_time{a:[1,2", [CallBegin("get_time"), Arguments('{"a":[1,')]),
    "cut in the name": ("<|tool_call>call:get_ti", [Text("<|tool_call>call:get_ti")]),
    "unknown tool": ("<|tool_call>call:rm{a:1}<tool_call|>ok", [Text("<|tool_call>call:rm{a:1}<tool_call|>ok")]),
    "no call": ("<|tool_call>{a:1}<tool_call|>", [Text("<|tool_call>{a:1}<tool_call|>")]),
    "nothing": ("<|tool_call><tool_call|>!", [Text("<|tool_call><tool_call|>!")]),
    "stray marks": ("a<channel|>b<tool_call|>c", [Text("a"), Text("b"), Text("c")]),
    "a mark in a call": ("<|tool_call>call:<|channel>x<tool_call|>",
                         [Text("<|tool_call>call:<|channel>x<tool_call|>")]),
}  # fmt: skip


@pytest.mark.parametrize("name", TURNS)
def test_parts_are_told_apart(name: str) -> None:
    text, expected = TURNS[name]
    assert read(text) == joined(expected)


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_read_as_their_marks_say(name: str) -> None:
    events = read(SCRIPTS[name])
    arguments = [json.loads(event.json) for event in events if isinstance(event, Arguments)]
    assert arguments == {
        "WEATHER": [{"city": "Paris, France", "days": 3}], "BOTH": [{}, {"city": 'Rome {\\n"}'}],
        "PLAN": [{"zone": "UTC", "at": 1}],
    }.get(name, [])  # fmt: skip


PIECES = st.sampled_from(
    [*TOKENIZER.marks.ids, TOKENIZER.marks.quote, *ids('call:get_time{"}[],: \nathou€1-'), *ids("thought\n"), 106]
)


@given(st.lists(PIECES, max_size=60), st.lists(st.integers(0, 60)), st.sampled_from(["text", "thought", "call"]))
def test_cuts_change_nothing_and_nothing_is_an_error(tokens: list[int], cuts: list[int], begin: Any) -> None:
    whole = TurnReader(TOKENIZER, ["at"], begin, TOOLS).push(tokens, last=True)
    reader, events, at = TurnReader(TOKENIZER, ["at"], begin, TOOLS), list[Event](), 0
    for cut in sorted(cuts):
        events += reader.push(tokens[at:cut])
        at = max(at, cut)
    events += reader.push(tokens[at:], last=True)
    assert joined(events) == joined(whole)
    text = OutputText(TOKENIZER, ["at"], TOKENIZER.marks, begin).push(tokens, last=True)
    assert "".join(event.text for event in whole if isinstance(event, Text)).startswith(text[:1])
    arguments, complete = "", False
    for event in whole:
        if isinstance(event, CallBegin):
            arguments = ""
        elif isinstance(event, Arguments):
            arguments += event.json
        elif isinstance(event, CallEnd):
            complete = True
            assert isinstance(json.loads(arguments), dict)
    assert complete == any(isinstance(event, CallEnd) for event in whole)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


def written(value: Any) -> Iterator[str]:
    """A value in the syntax of calls, in pieces; None is a quote."""
    if isinstance(value, str):
        yield from (QUOTE, value, QUOTE)
    elif isinstance(value, dict):
        yield "{"
        for i, (key, inner) in enumerate(value.items()):
            yield from ("," if i else "", QUOTE, key, QUOTE, ":", *written(inner))
        yield "}"
    elif isinstance(value, list):
        yield "["
        for i, inner in enumerate(value):
            yield from ("," if i else "", *written(inner))
        yield "]"
    else:
        yield json.dumps(value)


@given(st.dictionaries(st.text(st.characters(codec="utf-8")), VALUES, max_size=4))
def test_arguments_come_back_as_they_were(arguments: dict[str, Any]) -> None:
    reader, found = CallReader(TOOLS), ""
    for piece in ("call:get_time", *written(arguments)):
        found += reader.quote() if piece == QUOTE else reader.push(piece)
    assert reader.complete and json.loads(found) == arguments


@pytest.mark.parametrize(
    "text", ["call:get_time{a}", "call:get_time{a:}", "call:get_time{a:1,}", "call:get_time{:1}", "call:get_time{a:1]",
             "call:get_time{}}", "call:get_time{a:01}", "call:get_time{a:True}", "call:get_time{a b:1}",
             "call:get_time{a:1 2}", "call:get_time{a:[,]}", "call:get_time(", "all:", "call:get_time[]"],
)  # fmt: skip
def test_what_is_no_call(text: str) -> None:
    with pytest.raises(MalformedCallError):
        CallReader(TOOLS).push(text)


def test_what_a_user_writes_is_no_mark() -> None:
    """The same characters in other tokens: letters, one by one."""
    spelled = [i for letter in "<|tool_call>call:get_time{}<tool_call|>" for i in ids(letter)]
    assert read([]) == []
    reader = TurnReader(TOKENIZER, tools=TOOLS)
    assert joined(reader.push(spelled, last=True)) == [Text("<|tool_call>call:get_time{}<tool_call|>")]


def test_stop_strings_are_looked_for_in_text_alone() -> None:
    tokens = ids(SCRIPTS["THINK"])
    text = OutputText(TOKENIZER, ["STOP"], TOKENIZER.marks)
    assert text.push(tokens, last=True) == "The answer " and text.stopped
    assert OutputText(TOKENIZER, ["STOP"]).push(tokens, last=True) == "thought\nTwo and two "


def test_a_prompt_may_leave_off_in_a_thought() -> None:
    marks = TOKENIZER.marks
    assert region_after(ids("<|turn>model\n<|channel>thought\n"), marks) == "thought"
    assert region_after(ids("<|turn>model\n<|channel>thought\n<channel|>"), marks) == "text"
    assert read("so it is\n<channel|>Yes", begin="thought") == [Thought("so it is"), Text("Yes")]


def test_without_marks_all_is_text() -> None:
    raw = TOKENIZER.raw.from_str(TOKENIZER.raw.to_str().replace("<|channel>", "<|c>").replace("<|tool_call>", "<|t>"))
    plain = Tokenizer(raw, {}, TEMPLATE)
    assert plain.marks == TurnMarks(quote=52, response=50) and plain.marks.ids == frozenset()
    reader = TurnReader(plain, tools=TOOLS)
    assert joined(reader.push(plain.encode("a<channel|>b", special=False), last=True)) == [Text("ab")]
