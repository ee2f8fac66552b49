"""Grammars, and rules of turns, compiled to automata over one tokenizer's vocabulary."""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer as RawTokenizer

from gemma_mtp.decoding.grammar import Grammar, compiler_input, limits, llguidance, reason, refused
from gemma_mtp.decoding.grammar_state import Cursor, GrammarState
from gemma_mtp.decoding.matcher_cursor import MatcherCursor
from gemma_mtp.decoding.turn_cursor import TurnCursor
from gemma_mtp.decoding.turn_rules import TurnRules
from gemma_mtp.errors import SamplingError, TokenizerError
from gemma_mtp.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

#: compiled grammars that are kept for requests to come
COMPILED_KEPT = 32
#: what llguidance says after the last token of a text; no tokenizer has it, so no model's own token is mistaken for it
_END_TOKEN = "<|gemma_mtp: end of the grammar's text|>"


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
            self._tokenizer = llguidance().LLTokenizer(raw.to_str(), eos_token=self._end_id)
        except ValueError as error:
            raise TokenizerError(
                f"the checkpoint's tokenizer can not be used with a grammar ({reason(str(error))});"
                " leave the grammar out."
            ) from None
        self._tokens = tokenizer
        self._compiled = functools.lru_cache(maxsize=COMPILED_KEPT)(self._compile)

    def check(self, grammar: Grammar | TurnRules) -> None:
        """Raise SamplingError where no text of these tokens is of the grammar, or the grammar is too complex; and where
        the tokenizer has no marks for what the rules of a turn are about."""
        if not isinstance(grammar, TurnRules):
            self._compiled(grammar)
            return
        if self._tokens.marks.thought is None and grammar.max_thought_tokens is not None:
            raise SamplingError("the checkpoint's tokenizer has no marks for thoughts, which could be limited.")
        for part in grammar.grammars:
            self._compiled(part)

    def start(self, grammar: Grammar | TurnRules, end_ids: Collection[int], device: torch.device | str) -> GrammarState:
        """The state before the first token. `end_ids`: tokens that may end the output where the text is complete."""
        ends = frozenset(token_id for token_id in end_ids if 0 <= token_id < self.vocab_size)
        return GrammarState(functools.partial(self._cursor, grammar, ends), ends, self.vocab_size, device)

    def _cursor(self, grammar: Grammar | TurnRules, end_ids: Collection[int]) -> Cursor:
        if not isinstance(grammar, TurnRules):
            return self._matcher_cursor(grammar, self._compiled(grammar), end_ids)
        answer, calls = (
            None if part is None else functools.partial(self._matcher_cursor, part, self._compiled(part))
            for part in (grammar.answer, grammar.calls)
        )
        return TurnCursor(
            grammar, self._tokens.marks, None if answer is None else answer(end_ids),
            None if calls is None else functools.partial(calls, ()), self._has_brace, end_ids, self.vocab_size,
        )  # fmt: skip

    def _matcher_cursor(self, grammar: Grammar, start: LLMatcher, end_ids: Collection[int]) -> MatcherCursor:
        refusal = functools.partial(refused, grammar)
        return MatcherCursor(start, grammar.name, refusal, self._end_id, end_ids, self.vocab_size)

    def _has_brace(self, token_id: int) -> bool:
        return "{" in self._tokens.decode([token_id], skip_special_tokens=False)

    def _compile(self, grammar: Grammar) -> LLMatcher:
        marks = self._tokens.marks
        if grammar.kind == "calls" and marks.call is None:
            raise SamplingError("the checkpoint's tokenizer has no marks for calls of tools; leave the tools out.")
        source = compiler_input(grammar, marks)
        matcher = llguidance().LLMatcher(self._tokenizer, source, log_level=0, limits=limits())
        if matcher.is_error():
            raise refused(grammar, matcher.get_error())
        if self._matcher_cursor(grammar, matcher, ()).mask() is None:
            raise SamplingError(f"the {grammar.name} allows the empty text only; give one that allows some text.")
        return matcher
