"""A target and its drafter, loaded and ready to decode."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from gemma_mtp import checkpoint
from gemma_mtp.config import DrafterConfig, TargetConfig
from gemma_mtp.decoding.draft_length import DraftLength, DraftTokens, Plan
from gemma_mtp.decoding.grammar import GrammarCompiler, GrammarState
from gemma_mtp.decoding.noise import MAX_DRAFT_TOKENS
from gemma_mtp.decoding.round import CHUNK_ROWS, Turn, open_sequence, prefill, propose, verify_round
from gemma_mtp.decoding.round_costs import LONGEST, RoundCosts
from gemma_mtp.decoding.sampling import ChoiceKind, SamplingParams
from gemma_mtp.decoding.verify import VERIFICATIONS, Verification
from gemma_mtp.engine.costs import round_costs
from gemma_mtp.engine.output import OutputBuilder
from gemma_mtp.engine.result import GenerationResult
from gemma_mtp.errors import CheckpointError, PromptError, QuantisationError, SamplingError, TokenizerError
from gemma_mtp.generation_config import GenerationDefaults
from gemma_mtp.model.drafter import Drafter
from gemma_mtp.model.target import Target
from gemma_mtp.ops.native import module
from gemma_mtp.pairing import check_pair
from gemma_mtp.text import check_text
from gemma_mtp.tokenizer import Tokenizer
from gemma_mtp.weight_types import WeightTypes, parse_weight_types

#: prompt rows of one target call; `decoding.round` has a bound of its own
PREFILL_CHUNK_ROWS = CHUNK_ROWS
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Pair:
    """A loaded target, its drafter if any, and its tokenizer if the checkpoint has one."""

    target: Target
    drafter: Drafter | None
    tokenizer: Tokenizer | None
    generation: GenerationDefaults
    _costs: dict[tuple[ChoiceKind, int], RoundCosts] = field(default_factory=dict, repr=False)

    def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        draft_tokens: DraftTokens = "auto",
        verification: Verification = "exact",
    ) -> GenerationResult:
        """Complete a prompt (text, or token ids) and return tokens, text, and what each round did.

        `draft_tokens` is K, drafts a round; 0 is plain decoding, "auto" what pays most.
        Raises PromptError, SamplingError, TokenizerError.
        """
        stream = self.stream(prompt, params, draft_tokens=draft_tokens, verification=verification)
        for _ in stream:
            pass
        return stream.result

    def stream(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        draft_tokens: DraftTokens = "auto",
        verification: Verification = "exact",
    ) -> TextStream:
        """The same, as an iterator of text pieces, given out as tokens are committed and never half a character.

        Its `result` grows while it is read and is complete when it ends.
        """
        params = SamplingParams() if params is None else params
        prompt_ids = self.encode(prompt)
        self.check(params, draft_tokens, verification)
        used: DraftTokens = draft_tokens if self.drafter is not None else 0
        return TextStream(self, self.new_result(prompt_ids, params, used, verification), params, verification)

    def default_params(self, **given: Any) -> SamplingParams:
        """How the checkpoint's generation_config.json asks for a model's turn to be sampled, but for what is given.

        The arguments are those of SamplingParams; None is not given, and `logit_bias` is joined with the tokens that
        the file suppresses. Raises SamplingError.
        """
        return sampling_params(self.generation.conversation(), **given)

    def new_result(
        self, prompt_ids: list[int], params: SamplingParams, draft_tokens: DraftTokens, verification: Verification
    ) -> GenerationResult:
        """To be filled by decoding."""
        return GenerationResult(prompt_ids, draft_tokens, verification, tokenizer=self.tokenizer, stop=params.stop)

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
        return self._grammars.start(params.grammar, ends, self.target.embed_tokens.weight.device)

    def round_costs(self, choice: ChoiceKind = "argmax", sequences: int = 1) -> RoundCosts:
        """What rounds of every length cost on this machine: as kept from an earlier run, or measured in 0.2 seconds.

        Rounds that draw cost another thing than those that take the arg max (`SamplingParams.choice`), and those of
        several `sequences` together another than those of one.
        """
        key = choice, sequences
        if key not in self._costs:
            assert self.drafter is not None
            self._costs[key] = round_costs(self.target, self.drafter, choice, sequences)
        return self._costs[key]

    def draft_length(self, costs: RoundCosts) -> DraftLength:
        """A new sequence's policy. On a GPU, looking at every draft would make the host wait for each."""
        return DraftLength(costs, early_stop=self.target.embed_tokens.weight.device.type == "cpu")

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
        vocab_size = self.target.config.vocab_size
        for name, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
            for token_id in ids:
                if token_id >= vocab_size:
                    raise SamplingError(
                        f"{name} has token id {token_id}, but the target's ids end at {vocab_size - 1}."
                    )
        if params.grammar is not None:
            self._grammars.check(params.grammar)


class TextStream(Iterator[str]):
    """Text pieces of one generation; `result` holds what has been generated so far."""

    def __init__(
        self, pair: Pair, result: GenerationResult, params: SamplingParams, verification: Verification
    ) -> None:
        self.result = result
        self._pieces = _decode(pair, result, params, verification)

    def __next__(self) -> str:
        return next(self._pieces)


def _decode(pair: Pair, result: GenerationResult, params: SamplingParams, verification: Verification) -> Iterator[str]:
    """Prefill, then rounds until a stop condition holds. Times exclude what the reader does between pieces."""
    prompt = result.prompt_token_ids
    limit = min(params.max_tokens, pair.target.config.max_position_embeddings - len(prompt))
    output, reader = OutputBuilder(result, params, limit, pair.eos_token_ids), result.text_reader()
    device = pair.target.embed_tokens.weight.device
    policy, fixed = None, Plan(LONGEST)
    if result.draft_tokens == "auto":
        policy = pair.draft_length(pair.round_costs(params.choice))
    else:
        fixed = Plan(result.draft_tokens)
    started = time.perf_counter()
    with torch.inference_mode():
        grammar = pair.grammar_state(params)
        sequence = open_sequence(pair.target, len(prompt), limit, fixed.longest, params, grammar=grammar)
        first = prefill(pair.target, sequence, torch.tensor(prompt, device=device), PREFILL_CHUNK_ROWS)
    token_ids = output.push(first)
    result.prefill_seconds = time.perf_counter() - started
    while True:
        if reader is not None and (text := reader.push(token_ids, last=output.done)):
            yield text
        if output.done:
            return
        started = time.perf_counter()
        plan = fixed if policy is None else policy.choose()
        drafts = min(plan.longest, output.remaining - 1)
        with torch.inference_mode():
            turns = [Turn(sequence, drafts, verification, plan.stop)]
            proposed = propose(pair.target, pair.drafter, turns)
            drafted = time.perf_counter()
            (played,) = verify_round(pair.target, turns, proposed)
        token_ids = output.push(played)
        seconds = time.perf_counter() - started
        result.decode_seconds += seconds
        if policy is not None:
            policy.learn([played], seconds, drafted - started)


def _listed(prompt: Sequence[int]) -> list[int]:
    """A prompt's token ids, not checked yet. Raises PromptError for what is no list."""
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
    """SamplingParams of defaults and of what is given; None is not given, and `logit_bias` is joined."""
    given = {name: value for name, value in given.items() if value is not None}
    biases = {**defaults.get("logit_bias", {}), **given.get("logit_bias", {})}
    return SamplingParams(**{**defaults, **given, "logit_bias": biases})


def bundled_directory() -> Path:
    """Where the bundled pair lies: `target`, `drafter`, its card and the held-out prompts."""
    return Path(str(resources.files("gemma_mtp") / "bundled"))


def load_pair(
    target: str | Path | None = None,
    drafter: str | Path | None = None,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    use_drafter: bool = True,
    quantize: str | WeightTypes | None = None,
    strict: bool = False,
) -> Pair:
    """Load a target and its drafter from checkpoint directories; without arguments, the bundled pair.

    A target given without a drafter decodes plainly. `dtype` "auto" is bfloat16 on a GPU; on a CPU it is what the
    weights are stored in where the native operators compute with that in float32, else float32. `device` "auto" is CUDA
    where there is one. `quantize` says what to quantise while loading, as "int8", "int4", or part by part
    (`weight_types.parse_weight_types`). What a checkpoint has that is not known or not honoured, or that contradicts
    something else and can be loaded all the same, is logged as a warning, or refused with `strict`. The pair's fit is
    checked before any weight is read. Raises CheckpointError, ConfigError, PairError, QuantisationError.
    """
    types = parse_weight_types(quantize) if isinstance(quantize, str) else quantize
    if not (types is None or isinstance(types, WeightTypes)):
        raise QuantisationError(f"quantize is of type {type(types).__name__}, but must be text such as int8, or none.")
    for directory in (target, drafter):
        if not (directory is None or isinstance(directory, str | Path)):
            raise CheckpointError(f"a directory is of type {type(directory).__name__}, but must be text or a Path.")
    if target is None:
        target, drafter = bundled_directory() / "target", drafter or bundled_directory() / "drafter"
    if not use_drafter:
        drafter = None
    chosen_device = choose_device(device)
    target_config: TargetConfig = checkpoint.read_target_config(target)
    if drafter is not None:
        drafter_config: DrafterConfig = checkpoint.read_drafter_config(drafter)
        check_pair(target_config, drafter_config)
    generation = _generation_defaults(target, target_config, strict)
    chosen_dtype = _dtype(dtype, chosen_device, target)
    loaded_target = checkpoint.load_target(target, chosen_dtype, chosen_device, types, strict)
    loaded_target.pack_()
    loaded_drafter = None
    if drafter is not None:
        loaded_drafter = checkpoint.load_drafter(drafter, chosen_dtype, chosen_device, types, strict)
        loaded_drafter.pack_(loaded_target.native)
    return Pair(
        target=loaded_target,
        drafter=loaded_drafter,
        tokenizer=Tokenizer.from_dir(target) if (Path(target) / "tokenizer.json").exists() else None,
        generation=generation,
    )


def _generation_defaults(target: str | Path, config: TargetConfig, strict: bool) -> GenerationDefaults:
    """Those of the checkpoint, held to be usable; a suppressed token that the model does not have is left out."""
    found = checkpoint.read_generation_config(target)
    checkpoint.report(target, found.notes, strict)
    known = tuple(i for i in found.suppress_tokens if 0 <= i < config.text.vocab_size)
    generation = replace(found, suppress_tokens=known)
    try:
        SamplingParams(**generation.conversation())
    except SamplingError as error:
        raise CheckpointError(f"{target}: generation_config.json asks for what can not be done: {error}") from None
    return generation


def choose_device(device: str | torch.device) -> torch.device:
    """The device that a name means; "auto" is CUDA where there is one. Raises CheckpointError."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        raise CheckpointError(f"device {device!r} is not known; use auto, cpu, cuda or cuda:N.") from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise CheckpointError(f"device {device!r} was asked for, but this PyTorch sees no CUDA device; use cpu.")
    return chosen


def _dtype(dtype: str | torch.dtype, device: torch.device, target: str | Path) -> torch.dtype:
    if isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
        return dtype
    if dtype == "auto":
        if device.type != "cpu":
            return torch.bfloat16
        # native operators widen bfloat16 exactly and compute in float32; PyTorch's own round every step
        stored = checkpoint.stored_dtypes(target)
        narrow = "BF16" in stored and not stored & {"F32", "F64"}
        return torch.bfloat16 if narrow and module() is not None else torch.float32
    if isinstance(dtype, str) and dtype in DTYPES:
        return DTYPES[dtype]
    raise CheckpointError(f"dtype {dtype!r} is not known; use auto, {', '.join(DTYPES)}.")
