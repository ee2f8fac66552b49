"""What is loaded, and which requests it can decode."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gemma_mtp.backend.base import Backend
from gemma_mtp.chat.marks import Region, region_after
from gemma_mtp.config.generation import GenerationDefaults
from gemma_mtp.decoding.draft_length import DraftTokens
from gemma_mtp.decoding.grammar_compiler import GrammarCompiler
from gemma_mtp.decoding.grammar_state import GrammarState
from gemma_mtp.decoding.noise import MAX_DRAFT_TOKENS
from gemma_mtp.decoding.params import ChoiceKind, SamplingParams
from gemma_mtp.decoding.round_costs import RoundCosts
from gemma_mtp.decoding.verify import VERIFICATIONS, Verification
from gemma_mtp.engine.costs import round_costs
from gemma_mtp.engine.draft_policy import Policies
from gemma_mtp.engine.result import GenerationResult
from gemma_mtp.errors import PromptError, SamplingError, TokenizerError
from gemma_mtp.model.drafter import Drafter
from gemma_mtp.model.target import Target
from gemma_mtp.text import check_text
from gemma_mtp.tokenizer import Tokenizer


@dataclass
class LoadedPair:
    """A target and its drafter, if any, on their backend, and the tokenizer if the checkpoint has one."""

    backend: Backend
    tokenizer: Tokenizer | None
    generation: GenerationDefaults
    _costs: dict[tuple[ChoiceKind, int], RoundCosts] = field(default_factory=dict, repr=False)
    policies: Policies = field(default_factory=dict, repr=False)  # the newest draft lengths of each kind

    @property
    def target(self) -> Target:
        return self.backend.target

    @property
    def drafter(self) -> Drafter | None:
        return self.backend.drafter

    def default_params(self, **given: Any) -> SamplingParams:
        """Returns how the checkpoint's generation_config.json asks for a model's turn to be sampled, but for what is
        given.

        The arguments are those of SamplingParams; None is not given, and `logit_bias` is joined with the tokens that
        the file suppresses. Raises SamplingError.
        """
        return sampling_params(self.generation.conversation(), **given)

    def new_result(
        self, prompt_ids: list[int], params: SamplingParams, draft_tokens: DraftTokens, verification: Verification
    ) -> GenerationResult:
        """To be filled by decoding."""
        begin: Region | None = None
        if params.apart and self.tokenizer is not None:
            begin = region_after(prompt_ids, self.tokenizer.marks)
        return GenerationResult(
            prompt_ids, draft_tokens, verification, tokenizer=self.tokenizer, stop=params.stop, begin=begin
        )

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a prompt, checked. Raises PromptError (empty, out of range, too long) or TokenizerError."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise TokenizerError(
                    "the target's directory has no tokenizer.json, so a text prompt can not be encoded;"
                    " pass token ids, or add the tokenizer's files."
                )
            token_ids = self.tokenizer.encode(check_text(prompt, "the prompt", PromptError))
        else:
            token_ids = _listed(prompt)
        self._check_prompt(token_ids)
        return token_ids

    def check(self, params: SamplingParams, draft_tokens: DraftTokens, verification: str) -> None:
        """Raise SamplingError or TokenizerError where a request can not be decoded so by this pair."""
        if not isinstance(params, SamplingParams):
            raise SamplingError(f"the parameters are of type {type(params).__name__}, but must be SamplingParams.")
        _check_decoding(draft_tokens, verification)
        self._check_params(params)

    def grammar_state(self, params: SamplingParams) -> GrammarState | None:
        """The state that a sequence with a grammar starts from. Raises SamplingError, TokenizerError."""
        if params.grammar is None:
            return None
        ends = () if params.ignore_eos else self.eos_token_ids
        return self._grammars.start(params.grammar, ends, self.backend.device)

    def round_costs(self, choice: ChoiceKind = "argmax", sequences: int = 1) -> RoundCosts:
        """What rounds of every length cost on this machine: as kept from an earlier run, or measured in 0.2 seconds.

        Rounds that draw cost another thing than those that take the arg max (`SamplingParams.choice`), and those of
        several `sequences` together another than those of one.
        """
        key = choice, sequences
        if key not in self._costs:
            assert self.drafter is not None
            self._costs[key] = round_costs(self.backend, choice, sequences)
        return self._costs[key]

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return self.generation.eos_token_ids

    @functools.cached_property
    def _grammars(self) -> GrammarCompiler:
        if self.tokenizer is None:
            raise TokenizerError(
                "a grammar needs a tokenizer, and the target's directory has none; add the tokenizer's files."
            )
        return GrammarCompiler(self.tokenizer, self.target.config.vocab_size)

    def _check_prompt(self, token_ids: list[int]) -> None:
        config = self.target.config
        if not token_ids:
            raise PromptError("the prompt is empty; give at least one token.")
        for token_id in token_ids:
            if not isinstance(token_id, int) or isinstance(token_id, bool) or not 0 <= token_id < config.vocab_size:
                raise PromptError(
                    f"the prompt has token id {token_id!r}, but the target's ids run from 0 to {config.vocab_size - 1}."
                )
        if len(token_ids) >= config.max_position_embeddings:
            raise PromptError(
                f"the prompt has {len(token_ids)} tokens, but the target takes at most"
                f" {config.max_position_embeddings - 1} (max_position_embeddings less one for the output); shorten it."
            )

    def _check_params(self, params: SamplingParams) -> None:
        if params.stop and self.tokenizer is None:
            raise TokenizerError(
                "stop strings need a tokenizer, and the target's directory has none; use stop token ids."
            )
        if params.apart and self.tokenizer is None:
            raise TokenizerError(
                "thoughts and calls are told apart by a tokenizer's marks, and the target's directory has no tokenizer;"
                " add its files, or leave them together."
            )
        vocab_size = self.target.config.vocab_size
        for name, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
            for token_id in ids:
                if token_id >= vocab_size:
                    raise SamplingError(
                        f"{name} has token id {token_id}, but the target's ids end at {vocab_size - 1}."
                    )
        if params.grammar is not None:
            self._grammars.check(params.grammar)


def _listed(prompt: Sequence[int]) -> list[int]:
    """Returns a prompt's token ids, not checked yet. Raises PromptError for what is no list."""
    try:
        if not isinstance(prompt, bytes | bytearray | Mapping):  # which have numbers in them, too
            return list(prompt)
    except TypeError:
        pass
    raise PromptError(f"the prompt is of type {type(prompt).__name__}, but must be text or a list of token ids.")


def _check_decoding(draft_tokens: DraftTokens, verification: str) -> None:
    number = isinstance(draft_tokens, int) and not isinstance(draft_tokens, bool)
    if draft_tokens != "auto" and not (number and 0 <= draft_tokens <= MAX_DRAFT_TOKENS):
        raise SamplingError(
            f"draft_tokens is {draft_tokens!r}, but must be auto, or from 0 (plain) to {MAX_DRAFT_TOKENS}."
        )
    if verification not in VERIFICATIONS:
        raise SamplingError(f"verification is {verification!r}, but must be one of {', '.join(VERIFICATIONS)}.")


def sampling_params(defaults: Mapping[str, Any], **given: Any) -> SamplingParams:
    """Returns SamplingParams of defaults and of what is given; None is not given, and `logit_bias` is joined."""
    given = {name: value for name, value in given.items() if value is not None}
    biases = given.get("logit_bias", {})
    if isinstance(biases, Mapping):  # what is none is refused below
        biases = {**defaults.get("logit_bias", {}), **biases}
    return SamplingParams(**{**defaults, **given, "logit_bias": biases})
