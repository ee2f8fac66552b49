"""Constrained output: which tokens a JSON schema or a regular expression allows after those that are there.

llguidance compiles a grammar to an automaton over the tokenizer's vocabulary and says for each state which tokens may
come next. In a round every row has its own state: row i is masked by the state after the first i drafts, in the draft
step that makes draft i and in the target's verification of it alike. So no draft breaks the grammar, the target's own
choice never does, and the mask of a row is a function of the tokens before it alone, which keeps drafted output equal
to plain output.

The end of the output: where the text is complete the end-of-sequence ids are allowed, elsewhere they are not; where
nothing may follow, nothing else is allowed. Without end-of-sequence ids the output ends where nothing may follow.

llguidance comes with the extra `gemma-mtp[grammar]` and is imported where the first grammar is made.

Shapes: R rows, V vocabulary, B = ceil(V / 8) bytes of a mask with one bit a token, lowest bit first.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer as RawTokenizer
from torch import Tensor

from gemma_mtp.decoding.schema import largest_multiple, without_annotations
from gemma_mtp.decoding.verify import agreeing
from gemma_mtp.errors import SamplingError, TokenizerError, missing_extra
from gemma_mtp.text import is_text
from gemma_mtp.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

GrammarKind = Literal["json_schema", "json_object", "regex"]
KINDS: tuple[GrammarKind, ...] = get_args(GrammarKind)

#: characters of a schema or an expression; what a longer one costs to compile is seconds
MAX_SOURCE_LENGTH = 200_000
#: automata of `multipleOf` have a state for every remainder, and llguidance does not bound the time to build them
MAX_MULTIPLE = 1000
#: white space between two tokens of JSON: what printers write, and an end to a model that would write nothing else
WHITESPACE = r" |\r?\n[ \t]{0,32}"
#: compiled grammars that are kept for requests to come
COMPILED_KEPT = 32
#: what llguidance says after the last token of a text; no tokenizer has it, so no model's own token is mistaken for it
_END_TOKEN = "<|gemma_mtp: end of the grammar's text|>"
_MAX_REASON_LENGTH = 200

Bits = NDArray[np.uint8]


@dataclass(frozen=True)
class Grammar:
    """What the output must be: JSON that a schema accepts, any JSON object, or text that an expression matches whole.

    `source`: the JSON schema as JSON text, or the regular expression (the syntax of Rust's `regex`: no look-around, no
    back-references); empty for `json_object`. Raises SamplingError where it can not be compiled, or where llguidance is
    not installed.
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
            error = _llguidance().LLMatcher.validate_grammar(_compiler_input(self), None, limits=_limits())
        except ValueError as refusal:
            error = str(refusal)
        if error:
            raise _refused(self, error)

    @property
    def name(self) -> str:
        """For messages."""
        return {"json_schema": "JSON schema", "json_object": "JSON grammar", "regex": "regular expression"}[self.kind]


class GrammarCompiler:
    """Compiles grammars for one tokenizer and a target of `vocab_size` tokens. May be used from any thread."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        raw = RawTokenizer.from_str(tokenizer.raw.to_str())
        raw.add_special_tokens([_END_TOKEN])
        end_id = raw.token_to_id(_END_TOKEN)
        assert end_id is not None
        self._end_id = end_id
        try:
            self._tokenizer = _llguidance().LLTokenizer(raw.to_str(), eos_token=self._end_id)
        except ValueError as error:
            raise TokenizerError(
                f"the checkpoint's tokenizer can not be used with a grammar ({_reason(str(error))});"
                " leave the grammar out."
            ) from None
        self._compiled = functools.lru_cache(maxsize=COMPILED_KEPT)(self._compile)

    def check(self, grammar: Grammar) -> None:
        """Raise SamplingError where no text of these tokens is of the grammar, or the grammar is too complex."""
        self._compiled(grammar)

    def start(self, grammar: Grammar, end_ids: Collection[int], device: torch.device | str) -> GrammarState:
        """The state before the first token. `end_ids`: tokens that may end the output where the text is complete."""
        return GrammarState(grammar, self._compiled(grammar), self._end_id, end_ids, self.vocab_size, device)

    def _compile(self, grammar: Grammar) -> LLMatcher:
        matcher = _llguidance().LLMatcher(self._tokenizer, _compiler_input(grammar), log_level=0, limits=_limits())
        if matcher.is_error():
            raise _refused(grammar, matcher.get_error())
        first = GrammarState(grammar, matcher, self._end_id, (), self.vocab_size, "cpu")
        if first.ended_after([]):
            raise SamplingError(f"the {grammar.name} allows the empty text only; give one that allows some text.")
        return matcher


class GrammarState:
    """Where one sequence stands in its grammar.

    What it answers is a function of the committed tokens and of those it is asked about, which need not be committed
    later. The matcher is left where the last question took it, so that a round asks about each draft once. Where the
    grammar is too complex to go on, that is an error only once a token has to be chosen there: a draft that leads there
    is refused or accepted like any other.
    """

    def __init__(
        self,
        grammar: Grammar,
        start: LLMatcher,
        matcher_end_id: int,
        end_ids: Collection[int],
        vocab_size: int,
        device: torch.device | str,
    ) -> None:
        self._grammar = grammar
        self._start = start  # shared with other sequences, and left as it is
        self._matcher = start.deep_copy()
        self._matcher_end_id = matcher_end_id
        self._end_ids = frozenset(token_id for token_id in end_ids if token_id < vocab_size)
        self._vocab_size = vocab_size
        self._device = device
        self._committed: list[int] = []
        self._taken: list[int] = []  # tokens after the committed ones that the matcher has consumed
        #: what may come after each of them; None where the text has ended
        self._masks: list[Bits | SamplingError | None] = [self._mask()]

    def allowed(self, token_ids: Sequence[int], first: int = 0) -> Tensor:
        """What may follow the first i of `token_ids` after the committed tokens, for i = `first` .. len(token_ids).

        bool [R, V] on the device. After a token that the grammar does not allow and after the end every token is
        allowed: such rows never count. Raises SamplingError where the committed tokens leave the grammar too complex.
        """
        self._follow(token_ids)
        if isinstance(self._masks[0], SamplingError):
            raise self._masks[0]
        everything = np.full(_mask_bytes(self._vocab_size), 0xFF, dtype=np.uint8)
        masks = [mask if isinstance(mask, np.ndarray) else everything for mask in self._masks]
        masks += [everything] * (len(token_ids) + 1 - len(masks))
        packed_RB = torch.from_numpy(np.stack(masks[first:])).to(self._device)
        shifts = torch.arange(8, dtype=torch.uint8, device=self._device)
        return ((packed_RB.unsqueeze(-1) >> shifts) & 1).bool().flatten(-2)[:, : self._vocab_size]

    def ended_after(self, token_ids: Sequence[int]) -> bool:
        """Whether the output has ended after these tokens, is not of the grammar any more, or can not go on."""
        self._follow(token_ids)
        return len(self._taken) < len(token_ids) or not isinstance(self._masks[-1], np.ndarray)

    def complete_after(self, token_ids: Sequence[int]) -> bool:
        """Whether the text is whole after these tokens, though more may follow."""
        self._follow(token_ids)
        return len(self._taken) == len(token_ids) and (self._masks[-1] is None or self._matcher.is_accepting())

    def commit(self, token_ids: Sequence[int]) -> int | None:
        """Move on by a round's tokens.

        Returns how many of them belong to the output where nothing may follow and no end-of-sequence id can say so.
        Raises SamplingError where one was chosen after the grammar had become too complex.
        """
        self._follow(token_ids)
        taken, mask = len(self._taken), self._masks[-1]
        ended = taken < len(token_ids)  # by an end-of-sequence id, or by what follows the end
        if ended and isinstance(mask, SamplingError):
            raise mask
        assert not ended or mask is None or token_ids[taken] in self._end_ids, "a token was chosen against its mask"
        self._committed += self._taken
        self._taken, self._masks = [], [None if ended else mask]
        return taken if mask is None else None

    def _follow(self, token_ids: Sequence[int]) -> None:
        """Bring the matcher to the state after as many of these tokens as the grammar takes."""
        kept = agreeing(token_ids, self._taken[: len(token_ids)])
        if kept < len(self._taken):
            self._roll_back(kept)
        for token_id in token_ids[kept:]:
            if not self._takes(token_id):
                return
            self._matcher.consume_token(token_id)
            self._taken.append(token_id)
            try:
                self._masks.append(self._mask())
            except SamplingError as error:
                self._masks.append(error)

    def _roll_back(self, kept: int) -> None:
        """To after the first `kept` of the tokens taken."""
        if self._matcher.is_error():  # which a matcher never leaves
            self._matcher = self._start.deep_copy()
            self._matcher.consume_tokens(self._committed + self._taken[:kept])
        else:
            self._matcher.rollback(len(self._taken) - kept)
        del self._taken[kept:], self._masks[kept + 1 :]

    def _takes(self, token_id: int) -> bool:
        mask = self._masks[-1]
        if not isinstance(mask, np.ndarray) or token_id in self._end_ids:
            return False
        return bool(mask[token_id >> 3] >> (token_id & 7) & 1)

    def _mask(self) -> Bits | None:
        """Tokens that may come now: uint8 [B], or None where none may and the text is complete."""
        bits = np.zeros(_mask_bytes(self._vocab_size), dtype=np.uint8)
        found = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)[: len(bits)]
        if self._matcher.is_error():
            raise _refused(self._grammar, self._matcher.get_error())
        complete = self._matcher.is_accepting()
        bits[: len(found)] = found
        bits[-1] &= 0xFF >> (-self._vocab_size % 8)  # ids that the target does not have
        if self._matcher_end_id < self._vocab_size:
            _set(bits, self._matcher_end_id, False)
        for token_id in self._end_ids:
            _set(bits, token_id, complete)
        if bits.any():
            return bits
        if not complete:
            raise SamplingError(f"the {self._grammar.name} needs text here that the target has no token for.")
        return None


def _mask_bytes(vocab_size: int) -> int:
    return (vocab_size + 7) // 8


def _set(bits: Bits, token_id: int, value: bool) -> None:
    bit = np.uint8(1 << (token_id & 7))
    bits[token_id >> 3] = bits[token_id >> 3] | bit if value else bits[token_id >> 3] & ~bit


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise SamplingError(missing_extra("a grammar", "llguidance", "grammar")) from None
    return llguidance


@functools.cache
def _limits() -> Any:
    """llguidance's own bounds of time and memory, with messages that do not quote the grammar."""
    return _llguidance().LLParserLimits(verbose_errors=False)


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
    if grammar.kind == "json_schema":
        _check_schema(source)


def _check_schema(source: str) -> None:
    try:
        schema = json.loads(source)
    except ValueError as error:
        raise SamplingError(f"the JSON schema is not JSON ({error}); correct it.") from None
    except RecursionError:
        raise SamplingError("the JSON schema is nested too deeply; flatten it.") from None
    if not isinstance(schema, dict):
        raise SamplingError(
            f"the JSON schema is {_shorten(source.strip())}, but must be an object; for any JSON value, give {{}}."
        )
    try:
        whole = is_text(json.dumps(schema, ensure_ascii=False))
        multiple = largest_multiple(schema)
    except RecursionError:
        raise SamplingError("the JSON schema is nested too deeply; flatten it.") from None
    if not whole:
        raise SamplingError("the JSON schema has half a surrogate pair, which is not text; remove it.")
    if multiple > MAX_MULTIPLE:
        raise SamplingError(
            f"the JSON schema's multipleOf, all together and without factors of ten, is above {MAX_MULTIPLE};"
            " use smaller or rounder numbers."
        )


def _compiler_input(grammar: Grammar) -> str:
    matcher = _llguidance().LLMatcher
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
    matcher = _llguidance().LLMatcher
    return not matcher.validate_grammar(matcher.grammar_from_json_schema(schema, {}), None, limits=_limits())


def _refused(grammar: Grammar, error: str) -> SamplingError:
    if "NoExtension" in error:
        return SamplingError(f"the {grammar.name} allows no text at all, or none after what is there; correct it.")
    return SamplingError(f"the {grammar.name} can not be used ({_reason(error)}); change it.")


def _reason(error: str) -> str:
    """The heart of an error of llguidance: one line, without the place in a source that the user did not write."""
    of_regex = re.search(r"^error: (.+)$", error, re.MULTILINE)
    line = of_regex[1] if of_regex else error.strip().partition("\n")[0]
    line = re.sub(r"^at \d+\(\d+\): invalid regex .* \(in regex\): ", "", line).rstrip(".")
    return _shorten(line)


def _shorten(text: str) -> str:
    return text if len(text) <= _MAX_REASON_LENGTH else text[:_MAX_REASON_LENGTH] + "…"
