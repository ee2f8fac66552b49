"""Constrained output: which tokens a JSON schema or a regular expression allows after those that are there.

llguidance compiles a grammar to an automaton over the tokenizer's vocabulary and says for each state which tokens may
come next. In a round every row has its own state: row i is masked by the state after the first i drafts, in the draft
step that makes draft i and in the target's verification of it alike. So no draft breaks the grammar, the target's own
choice never does, and the mask of a row is a function of the tokens before it alone, which keeps drafted output equal
to plain output.

The end of the output: where the text is complete the end-of-sequence ids are allowed, elsewhere they are not; where
nothing may follow, nothing else is allowed. Without end-of-sequence ids the output ends where nothing may follow.

llguidance comes with the extras `gemma-mtp[grammar]` and `gemma-mtp[serve]`, and is imported where the first
grammar is made.

Shapes: R rows, V vocabulary, B = ceil(V / 8) bytes of a mask with one bit a token, lowest bit first.
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

from gemma_mtp.chat.calls import NAME
from gemma_mtp.chat.marks import TurnMarks
from gemma_mtp.decoding.call_grammar import call_lark
from gemma_mtp.decoding.expression_cost import check_expression
from gemma_mtp.decoding.schema import check_drafts, largest_multiple, without_annotations
from gemma_mtp.decoding.schema_cost import check_cost
from gemma_mtp.decoding.schema_depth import check_depth
from gemma_mtp.errors import SamplingError, missing_extra
from gemma_mtp.text import is_text

GrammarKind = Literal["json_schema", "json_object", "regex", "calls"]
KINDS: tuple[GrammarKind, ...] = get_args(GrammarKind)

#: characters of a schema or an expression; what a longer one costs to compile is seconds
MAX_SOURCE_LENGTH = 200_000
#: automata of `multipleOf` have a state for every remainder, and llguidance does not bound the time to build them
MAX_MULTIPLE = 1000
#: white space between two tokens of JSON: what printers write, and an end to a model that would write nothing else
WHITESPACE = r" |\r?\n[ \t]{0,32}"
_MAX_REASON_LENGTH = 200
#: Gemma 4's (`chat.marks` says from where), for a grammar of calls that is looked at before there is a tokenizer
_MARKS = TurnMarks(call=(48, 49), quote=52)


@dataclass(frozen=True)
class Grammar:
    """What the output must be: JSON that a schema accepts, any JSON object, text that an expression matches whole, or a
    call of a tool.

    `source`: the JSON schema as JSON text, or the regular expression (the syntax of Rust's `regex`: no look-around, no
    back-references); empty for `json_object`; for `calls`, a JSON list of objects with a `name` and `parameters`, which
    are a JSON schema, or null for any arguments. Raises SamplingError where it can not be compiled, or where llguidance
    is not installed.
    """

    kind: GrammarKind
    source: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise SamplingError(f"the grammar's kind is {self.kind!r}, but must be one of {', '.join(KINDS)}.")
        if not isinstance(self.source, str):
            raise SamplingError(f"the grammar's source is a {type(self.source).__name__}, but must be text.")
        _check_source(self)
        try:
            error = llguidance().LLMatcher.validate_grammar(compiler_input(self), None, limits=limits())
        except ValueError as refusal:
            error = str(refusal)
        if error:
            raise refused(self, error)

    @property
    def name(self) -> str:
        """For messages."""
        return {"json_schema": "JSON schema", "json_object": "JSON grammar", "regex": "regular expression",
                "calls": "grammar of the tools"}[self.kind]  # fmt: skip


def llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise SamplingError(missing_extra("a grammar", "llguidance", "grammar")) from None
    return llguidance


@functools.cache
def limits() -> Any:
    """llguidance's own bounds of time and memory, with messages that do not quote the grammar."""
    return llguidance().LLParserLimits(verbose_errors=False)


def _check_source(grammar: Grammar) -> None:
    """What llguidance does not refuse, or not in good time."""
    source, name = grammar.source, grammar.name
    if (grammar.kind == "json_object") != (source == ""):
        expected = "must have no source" if grammar.kind == "json_object" else "is empty; give one"
        raise SamplingError(f"the {name} {expected}.")
    if len(source) > MAX_SOURCE_LENGTH:
        raise SamplingError(f"the {name} has {len(source)} characters, but may have {MAX_SOURCE_LENGTH}; shorten it.")
    if not is_text(source):
        raise SamplingError(f"the {name} has half a surrogate pair, which is not text; remove it.")
    if grammar.kind == "regex":
        check_expression(source, name)
    if grammar.kind == "json_schema":
        _check_schema(source, name)
    if grammar.kind == "calls":
        _check_tools(source)


def _check_tools(source: str) -> None:
    try:
        tools = json.loads(source)
    except (ValueError, RecursionError):
        tools = None
    fields = {"name", "parameters"}
    if not isinstance(tools, list) or not tools or not all(isinstance(t, dict) and set(t) == fields for t in tools):
        raise SamplingError("the tools must be a JSON list of objects with a name and parameters, at least one.")
    names = [tool["name"] for tool in tools]
    for name in names:
        if not isinstance(name, str) or not NAME.fullmatch(name):
            shown = _shorten(json.dumps(name))
            raise SamplingError(f"a tool's name is {shown}, but must be 1 to 128 letters, digits, dots, _ or -.")
        if names.count(name) > 1:
            raise SamplingError(f"there are several tools of the name {name}; give each a name of its own.")
    for tool in tools:
        if tool["parameters"] is not None:
            _check_schema(json.dumps(tool["parameters"]), f"schema of the tool {tool['name']}")


def _check_schema(source: str, name: str) -> None:
    try:
        schema = json.loads(source)
    except ValueError as error:
        raise SamplingError(f"the {name} is not JSON ({error}); correct it.") from None
    except RecursionError:
        raise SamplingError(f"the {name} is nested too deeply; flatten it.") from None
    if not isinstance(schema, dict):
        raise SamplingError(
            f"the {name} is {_shorten(source.strip())}, but must be an object; for any JSON value, give {{}}."
        )
    try:
        whole = is_text(json.dumps(schema, ensure_ascii=False))
        multiple = largest_multiple(schema)
        check_drafts(schema, name)
    except RecursionError:
        raise SamplingError(f"the {name} is nested too deeply; flatten it.") from None
    check_depth(schema, name)
    check_cost(schema, name)
    if not whole:
        raise SamplingError(f"the {name} has half a surrogate pair, which is not text; remove it.")
    if multiple > MAX_MULTIPLE:
        raise SamplingError(
            f"the {name}'s multipleOf, all together and without factors of ten, is above {MAX_MULTIPLE};"
            " use smaller or rounder numbers."
        )


@functools.lru_cache(maxsize=8)  # it is asked for once when the grammar is made, and once when it is compiled
def compiler_input(grammar: Grammar, marks: TurnMarks = _MARKS) -> str:
    """Returns a grammar as llguidance takes it. `marks` are those of calls."""
    matcher = llguidance().LLMatcher
    if grammar.kind == "calls":
        assert marks.quote is not None and marks.call is not None, "a grammar of calls needs their marks"
        tools = json.loads(grammar.source)
        for tool in tools:
            if tool["parameters"] is not None:  # formats are left: those that are not held are not refused either
                without_annotations(tool["parameters"], lambda name: True)
        return str(matcher.grammar_from_lark(call_lark(tools, marks.quote, marks.call[1])))
    if grammar.kind == "regex":
        return str(matcher.grammar_from_regex(grammar.source))
    schema = {"type": "object"}
    if grammar.kind == "json_schema":
        schema = without_annotations(json.loads(grammar.source), _is_known_format)
    settings = schema.get("x-guidance")  # llguidance's own, in which the pattern would go before the flag
    chosen = isinstance(settings, dict) and "whitespace_flexible" in settings
    # as text of our own writing: llguidance pastes a schema that is text into a larger one unread
    defaults = {} if chosen else {"whitespace_pattern": WHITESPACE}
    return str(matcher.grammar_from_json_schema(json.dumps(schema), defaults))


@functools.lru_cache(maxsize=256)
def _is_known_format(name: str) -> bool:
    """Whether llguidance knows how texts of a `format` look: it refuses the others."""
    schema = json.dumps({"type": "string", "format": name})
    matcher = llguidance().LLMatcher
    return not matcher.validate_grammar(matcher.grammar_from_json_schema(schema, {}), None, limits=limits())


def refused(grammar: Grammar, error: str) -> SamplingError:
    if "NoExtension" in error:
        return SamplingError(f"the {grammar.name} allows no text at all, or none after what is there; correct it.")
    return SamplingError(f"the {grammar.name} can not be used ({reason(error)}); change it.")


def reason(error: str) -> str:
    """The heart of an error of llguidance: one line, without the place in a source that the user did not write."""
    of_regex = re.search(r"^error: (.+)$", error, re.MULTILINE)
    line = of_regex[1] if of_regex else error.strip().partition("\n")[0]
    line = re.sub(r"^at \d+\(\d+\): invalid regex .* \(in regex\): ", "", line).rstrip(".")
    return _shorten(line)


def _shorten(text: str) -> str:
    return text if len(text) <= _MAX_REASON_LENGTH else text[:_MAX_REASON_LENGTH] + "…"
