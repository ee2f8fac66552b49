"""How a user asks for tokens to be chosen, and when to stop."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from gemma_mtp.decoding.grammar import Grammar
from gemma_mtp.decoding.turn_rules import TurnRules
from gemma_mtp.errors import SamplingError
from gemma_mtp.text import is_text

MAX_LOGPROBS = 20
#: a lower temperature is greedy: float32 counts large logits in steps as coarse as that
LOWEST_TEMPERATURE = 1e-5
#: a higher one gives the same even distribution, and float32 has no numbers for it from 1e39 on
HIGHEST_TEMPERATURE = 1e30
ChoiceKind = Literal["argmax", "drawn", "filtered", "processed"]


class Filters(NamedTuple):
    """Which candidates may be drawn, as `SamplingParams` has them; the defaults keep all."""

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def active(self) -> bool:
        return self != NO_FILTERS


NO_FILTERS = Filters()


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when to stop. Raises `SamplingError` for a value out of its range.

    temperature          0 is greedy; otherwise logits are divided by it. Below 1e-5 it is taken as 0, and above 1e30
                         as 1e30, which is the same to float32
    top_k                keep the k most likely tokens; 0 keeps all
    top_p                keep the most likely tokens until their mass reaches top_p; 1 keeps all
    min_p                keep tokens at least min_p times as likely as the most likely one; 0 keeps all
    repetition_penalty   above 1 makes tokens of the prompt and the output less likely; 1 is off
    presence_penalty     subtracted from the logit of each token in the output
    frequency_penalty    subtracted once for each time the token is in the output
    logit_bias           token id -> number from -100 to 100 added to its logit, or -inf to forbid it
    seed                 the same seed gives the same text
    max_tokens           at most so many output tokens
    stop                 strings that end the output (one string or several)
    stop_token_ids       token ids that end the output, beside the checkpoint's own
    ignore_eos           do not end at the checkpoint's end-of-sequence ids
    logprobs             report log-probabilities of the chosen token and of this many alternatives; None reports none
    prompt_logprobs      the same of the prompt's tokens after its first; with it, max_tokens may be 0
    grammar              what the output must be: JSON by a schema, any JSON object, or what an expression matches; or,
                         part by part, how a model's turn is written
    apart                whether the output is a model's turn, of which thoughts and calls are no text: stop strings are
                         not looked for in them, and the result's text has none of them
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    seed: int = 0
    max_tokens: int = 128
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | TurnRules | None = None
    apart: bool = False

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else _listed(self.stop, "stop", "text, or a list of texts")
        stop_token_ids = _listed(self.stop_token_ids, "stop_token_ids", "a list of token ids")
        is_mapping = isinstance(self.logit_bias, Mapping)
        _require(is_mapping, "logit_bias", self.logit_bias, "a mapping from token ids to numbers")
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", stop_token_ids)
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        self._check_filters()
        self._check_penalties()
        self._check_limits()
        temperature = 0.0 if self.temperature < LOWEST_TEMPERATURE else min(self.temperature, HIGHEST_TEMPERATURE)
        object.__setattr__(self, "temperature", temperature)

    def _check_filters(self) -> None:
        temperature, top_p, min_p = self.temperature, self.top_p, self.min_p
        _require(_is_number(temperature) and temperature >= 0, "temperature", temperature, "a number of 0 or more")
        _require(_is_integer(self.top_k) and self.top_k >= 0, "top_k", self.top_k, "an integer of 0 (off) or more")
        _require(_is_number(top_p) and 0 < top_p <= 1, "top_p", top_p, "above 0 and at most 1 (off)")
        _require(_is_number(min_p) and 0 <= min_p <= 1, "min_p", min_p, "between 0 (off) and 1")

    def _check_penalties(self) -> None:
        repetition = self.repetition_penalty
        # beyond these, float32 logits may become 0 times infinity
        usable = _is_number(repetition) and 0.01 <= repetition <= 100
        _require(usable, "repetition_penalty", repetition, "from 0.01 to 100 (1 is off)")
        for name, value in (("presence_penalty", self.presence_penalty), ("frequency_penalty", self.frequency_penalty)):
            _require(_is_number(value) and -2 <= value <= 2, name, value, "between -2 and 2")
        for token_id, bias in self.logit_bias.items():
            _require(_is_integer(token_id) and token_id >= 0, "a token id in logit_bias", token_id, "0 or more")
            allowed = bias == -math.inf or (_is_number(bias) and -100 <= bias <= 100)
            _require(allowed, f"logit_bias of token {token_id}", bias, "between -100 and 100, or -inf")

    def _check_limits(self) -> None:
        for name in ("ignore_eos", "apart"):
            _require(isinstance(getattr(self, name), bool), name, getattr(self, name), "True or False")
        _require(_is_integer(self.seed) and 0 <= self.seed < 2**63, "seed", self.seed, "between 0 and 2**63 - 1")
        least = 1 if self.prompt_logprobs is None else 0
        enough = _is_integer(self.max_tokens) and self.max_tokens >= least
        _require(enough, "max_tokens", self.max_tokens, f"{least} or more")
        for text in self.stop:
            _require(_is_stop_string(text), "a stop string", text, "text of at least one character, all of them whole")
        for token_id in self.stop_token_ids:
            _require(_is_integer(token_id) and token_id >= 0, "a stop token id", token_id, "0 or more")
        for name, count in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            count_ok = count is None or (_is_integer(count) and 0 <= count <= MAX_LOGPROBS)
            _require(count_ok, name, count, f"between 0 and {MAX_LOGPROBS}, or none")
        grammar_ok = self.grammar is None or isinstance(self.grammar, Grammar | TurnRules)
        _require(grammar_ok, "grammar", self.grammar, "a Grammar, TurnRules, or none")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @functools.cached_property
    def choice(self) -> ChoiceKind:
        """By what a token is chosen: logits alone, logits and noise, these and filters, or more, or where logits are
        reported."""
        shifted = self.uses_history or bool(self.logit_bias) or self.grammar is not None
        if shifted or self.logprobs is not None:
            return "processed"
        if self.greedy:
            return "argmax"
        return "filtered" if self.filters.active else "drawn"

    @functools.cached_property
    def filters(self) -> Filters:
        """What draws are filtered by; nothing where the choice is greedy, which no filter changes."""
        return NO_FILTERS if self.greedy else Filters(self.top_k, float(self.top_p), float(self.min_p))

    @property
    def forbids(self) -> bool:
        """Whether there are tokens that may not be chosen, so that a part of the vocabulary may have no other."""
        return self.grammar is not None or -math.inf in self.logit_bias.values()

    @property
    def uses_history(self) -> bool:
        """Whether the choice depends on earlier tokens, so that a `TokenHistory` must be kept."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


def _require(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise SamplingError(f"{name} is {value!r}, but must be {expected}.")


def _is_number(value: object) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floating-point numbers
        return False


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_stop_string(value: object) -> bool:
    return isinstance(value, str) and value != "" and is_text(value)


def _listed(value: object, name: str, expected: str) -> tuple[Any, ...]:
    """What a list or another iterable holds; a lone text or a mapping is none."""
    _require(isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping), name, value, expected)
    assert isinstance(value, Iterable)
    try:
        return tuple(value)
    except TypeError:  # a tensor without dimensions
        raise SamplingError(f"{name} is {value!r}, but must be {expected}.") from None
