"""How a model's turn is to be written, part by part: a thought, then an answer, or calls of tools."""

from __future__ import annotations

from dataclasses import dataclass

from gemma_mtp.chat.marks import Region
from gemma_mtp.decoding.grammar import Grammar
from gemma_mtp.errors import SamplingError


@dataclass(frozen=True)
class TurnRules:
    """What may be in a turn. Parts are told apart by the tokenizer's marks; what has no rule is left to the model.

    begin                 the part that the prompt leaves off in
    thinking              whether a thought may come before an answer that has a grammar, and before a call that must be
    max_thought_tokens    thoughts have so many tokens, all together; None: what the model makes of them
    answer                what the text must be, if the turn is no call
    calls                 the tools that may be called, a grammar of the kind `calls`. The model names one freely,
                          unless a call must be; what is no tool's name is left to it, and arguments are
                          held to the grammar
    must_call             whether the turn is one call or more, and no text
    many_calls            whether more than one may be called; the turn ends after the first otherwise

    Raises SamplingError where they contradict each other.
    """

    begin: Region = "text"
    thinking: bool = False
    max_thought_tokens: int | None = None
    answer: Grammar | None = None
    calls: Grammar | None = None
    must_call: bool = False
    many_calls: bool = True

    def __post_init__(self) -> None:
        if (self.answer and self.answer.kind == "calls") or (self.calls and self.calls.kind != "calls"):
            raise SamplingError("the grammar of calls must be of the kind calls, and that of the answer of another.")
        if self.must_call and (self.calls is None or self.answer is not None):
            raise SamplingError("a turn that must be a call needs a grammar of calls, and no other.")
        if self.max_thought_tokens is not None and self.max_thought_tokens < 0:
            raise SamplingError(f"max_thought_tokens is {self.max_thought_tokens}, but must be 0 or more.")

    @property
    def grammars(self) -> tuple[Grammar, ...]:
        return tuple(grammar for grammar in (self.answer, self.calls) if grammar is not None)

    @property
    def held(self) -> bool:
        """Whether the turn has to come to something, so that it can not end before."""
        return self.must_call or self.answer is not None
