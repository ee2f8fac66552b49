"""A target and its drafter, loaded and ready to decode."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from gemma_mtp import checkpoint
from gemma_mtp.backend.cuda.usable import usable_on
from gemma_mtp.backend.native import native_available
from gemma_mtp.backend.select import make_backend
from gemma_mtp.chat.turn import Event, TurnReader
from gemma_mtp.checkpoint import Source
from gemma_mtp.config import TargetConfig
from gemma_mtp.config.generation import GenerationDefaults
from gemma_mtp.config.pairing import check_pair
from gemma_mtp.decoding.draft_length import DraftTokens
from gemma_mtp.decoding.params import SamplingParams
from gemma_mtp.decoding.verify import Verification
from gemma_mtp.engine.engine import Engine
from gemma_mtp.engine.loaded import LoadedPair
from gemma_mtp.engine.request import Generation, Request
from gemma_mtp.engine.result import GenerationResult
from gemma_mtp.engine.settings import EngineSettings
from gemma_mtp.engine.start import check_weights_fit, drafter_of
from gemma_mtp.errors import CheckpointError, PairError, QuantisationError, SamplingError
from gemma_mtp.locate import BUNDLED, bundled_directory
from gemma_mtp.model.drafter import Drafter
from gemma_mtp.weight_types import WeightTypes, merge, parse_weight_types

__all__ = ["DTYPES", "Pair", "TextStream", "bundled_directory", "choose_device", "load_pair"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(repr=False)
class Pair(LoadedPair):
    """A loaded pair that completes prompts, one at a time. Each has an engine of its own, of just the size it needs.

    `found_drafter`: the name of the drafter where it was found by the target's, and not given.
    """

    found_drafter: str | None = None

    def __repr__(self) -> str:
        sizes = [
            f"{name}={sum(w.numel() for w in model.checkpoint_tensors().values()) / 1e6:.1f}M"
            for name, model in (("target", self.target), ("drafter", self.drafter))
            if model is not None
        ]
        text = "with" if self.tokenizer is not None else "without"
        return f"<Pair {' '.join(sizes)} on {self.backend.device}, {text} tokenizer>"

    def with_drafter(self, drafter: Drafter | None) -> Pair:
        """Returns a pair of the same target and another drafter. Raises PairError for what is no drafter."""
        if not (drafter is None or isinstance(drafter, Drafter)):
            raise PairError(f"the drafter is of type {type(drafter).__name__}, but must be a Drafter or None.")
        drafted = self.backend.with_drafter(drafter)
        return replace(self, backend=drafted, _costs={}, policies={}, found_drafter=None)

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
        engine, generation = self._begin(prompt, params, draft_tokens, verification)
        generation.leave_out_text()
        with torch.inference_mode():  # once: entering it takes a while
            while not generation.ended:
                engine.play()
        for _ in generation.take():  # raises what the request failed with
            pass
        return generation.result

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
        return TextStream(*self._begin(prompt, params, draft_tokens, verification))

    def turn(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        draft_tokens: DraftTokens = "auto",
        verification: Verification = "exact",
        tools: Collection[str] = (),
    ) -> TurnStream:
        """The same, as an iterator of the events of a model's turn: text, thoughts, and calls of the `tools` named.

        `params.apart` must be set, so that stop strings are looked for in the text alone. Raises SamplingError where it
        is not, and what `generate` raises.
        """
        if not params.apart:
            raise SamplingError("a turn is read in parts, so apart must be true.")
        return TurnStream(*self._begin(prompt, params, draft_tokens, verification), tools)

    def _begin(
        self, prompt: str | Sequence[int], params: SamplingParams | None, draft_tokens: DraftTokens,
        verification: Verification,
    ) -> tuple[Engine, Generation]:  # fmt: skip
        """Returns an engine of just the size, and the generation that waits in it."""
        params = SamplingParams() if params is None else params
        prompt_ids = self.encode(prompt)
        self.check(params, draft_tokens, verification)
        longest = min(len(prompt_ids) + max(1, params.max_tokens), self.target.config.max_position_embeddings)
        engine = Engine(self, EngineSettings(max_running=1, max_tokens=longest, prefix_reuse=False))
        job = engine.job(Request(prompt_ids, params, draft_tokens, verification), prompt_ids)
        return engine, engine.add(job)


class TextStream(Iterator[str]):
    """Text pieces of one generation; `result` holds what has been generated so far."""

    def __init__(self, engine: Engine, generation: Generation) -> None:
        self.result = generation.result
        self._pieces = _pieces(engine, generation)

    def __next__(self) -> str:
        return next(self._pieces)


def _pieces(engine: Engine, generation: Generation) -> Iterator[str]:
    """Steps until the request has ended. What the reader does between pieces is in nobody's time."""
    while not generation.ended:
        engine.step()
        for update in generation.take():
            if update.text:
                yield update.text


class TurnStream(Iterator[Event]):
    """Events of one turn; `result` holds what has been generated so far."""

    def __init__(self, engine: Engine, generation: Generation, tools: Collection[str]) -> None:
        self.result = generation.result
        generation.leave_out_text()  # the reader makes it
        self._events = _turn_events(engine, generation, generation.result.turn_reader(tools))

    def __next__(self) -> Event:
        return next(self._events)


def _turn_events(engine: Engine, generation: Generation, reader: TurnReader) -> Iterator[Event]:
    while not generation.ended:
        engine.step()
        for update in generation.take():
            yield from reader.push(update.token_ids, last=update.finish_reason is not None)


def load_pair(
    target: str | Path | None = None,
    drafter: str | Path | None = None,
    *,
    adapter: str | Path | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    use_drafter: bool = True,
    quantize: str | WeightTypes | None = None,
    strict: bool = False,
    on_bytes: Callable[[str, int, int], object] = lambda part, done, of: None,
) -> Pair:
    """Load a target and its drafter, each a directory, a GGUF file, `bundled`, or a name on the Hugging Face hub whose
    files are in its cache; without arguments, the bundled pair.

    The drafter of a target given alone is found by its name (`locate.find_drafter`); where there is none, a warning
    says that decoding is plain. `use_drafter` false loads and looks for none. `adapter` is the directory of
    a LoRA adapter of PEFT for the target, merged while loading. `dtype` "auto" is bfloat16 on a GPU; on a
    CPU it is what the weights are stored in where the native operators compute with that in float32, else float32.
    `device` "auto" is CUDA where there is one. `quantize` says what to quantise while loading, as "int8", "int4", or
    part by part (`weight_types.parse_weight_types`). What a checkpoint has that is not known or not honoured, or that
    contradicts something else and can be loaded all the same, is logged as a warning, or refused with `strict`. That
    the pair fits together, and the target into memory, is checked before any weight is read. `on_bytes` is told which
    of "target" and "drafter" is being loaded, how many of its stored bytes are, and of how many. Raises
    CheckpointError, ConfigError, PairError, QuantisationError.
    """
    _check_arguments(target, drafter, adapter, quantize, use_drafter, strict, on_bytes)
    types = parse_weight_types(quantize) if isinstance(quantize, str) else quantize
    if target is None:
        target, drafter = BUNDLED, drafter or BUNDLED
    chosen_device = choose_device(device)
    source = checkpoint.open_source(target, adapter=adapter)
    target_config = checkpoint.read_target_config(source)
    found = drafter_of(target, target_config) if use_drafter and drafter is None else None
    drafter = (drafter or found) if use_drafter else None
    drafter_source = None if drafter is None else checkpoint.open_source(drafter, "drafter")
    if drafter_source is not None:
        check_pair(target_config, checkpoint.read_drafter_config(drafter_source))
    generation = _generation_defaults(source, target_config, strict)
    chosen_dtype = choose_dtype(dtype, chosen_device, source)
    stored = merge(checkpoint.read_weight_types(source), types or WeightTypes())
    fp8 = chosen_dtype is torch.bfloat16 and usable_on(chosen_device)
    kept = any(checkpoint.kinds_of(header, fp8) for header in checkpoint.text_headers(source).values())
    held = checkpoint.held_bytes(source, "target", chosen_dtype, types, fp8) if kept else None
    check_weights_fit(source.path, target_config, stored, chosen_dtype, chosen_device, held)
    how = chosen_dtype, chosen_device, types, strict
    loaded_target = checkpoint.load_target(source, *how, functools.partial(on_bytes, "target"), fp8)
    loaded_drafter = None
    if drafter_source is not None:
        loaded_drafter = checkpoint.load_drafter(drafter_source, *how, functools.partial(on_bytes, "drafter"), fp8)
    return Pair(
        backend=make_backend(loaded_target, loaded_drafter),
        tokenizer=source.tokenizer() if source.has_tokenizer else None,
        generation=generation,
        found_drafter=None if found is None else str(found),
    )


def _check_arguments(
    target: object, drafter: object, adapter: object, quantize: object, use_drafter: object, strict: object,
    on_bytes: object,
) -> None:  # fmt: skip
    """Raises CheckpointError or QuantisationError where one is of a wrong type."""
    if not (quantize is None or isinstance(quantize, str | WeightTypes)):
        raise QuantisationError(
            f"quantize is of type {type(quantize).__name__}, but must be text such as int8, or none."
        )
    for directory in (target, drafter, adapter):
        if not (directory is None or isinstance(directory, str | Path)):
            raise CheckpointError(f"a directory is of type {type(directory).__name__}, but must be text or a Path.")
    for name, flag in (("use_drafter", use_drafter), ("strict", strict)):
        if not isinstance(flag, bool):
            raise CheckpointError(f"{name} is of type {type(flag).__name__}, but must be True or False.")
    if not callable(on_bytes):
        raise CheckpointError(f"on_bytes is of type {type(on_bytes).__name__}, but must be a function.")


def _generation_defaults(source: Source, config: TargetConfig, strict: bool) -> GenerationDefaults:
    """Returns those of the checkpoint, held to be usable; a suppressed token that the model does not have is left
    out."""
    found = checkpoint.read_generation_config(source)
    checkpoint.report(source, found.notes, strict)
    known = tuple(i for i in found.suppress_tokens if 0 <= i < config.text.vocab_size)
    generation = replace(found, suppress_tokens=known)
    try:
        SamplingParams(**generation.conversation())
    except SamplingError as error:
        raise CheckpointError(f"{source.path}: generation_config.json asks for what can not be done: {error}") from None
    return generation


def choose_device(device: str | torch.device) -> torch.device:
    """The device that a name means; "auto" is CUDA where there is one. Raises CheckpointError."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        raise CheckpointError(f"device {device!r} is not known; use auto, cpu, cuda or cuda:N.") from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise CheckpointError(f"device {device!r} was asked for, but this PyTorch sees no CUDA device; use cpu.")
    if chosen.type == "cuda" and (chosen.index or 0) >= (count := torch.cuda.device_count()):
        raise CheckpointError(
            f"device {device!r} was asked for, but of CUDA devices there are {count}, from cuda:0 on."
        )
    return chosen


def choose_dtype(dtype: str | torch.dtype, device: torch.device, source: Source) -> torch.dtype:
    """The dtype that a checkpoint is loaded in; "auto" as `load_pair` says. Raises CheckpointError."""
    if isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
        return dtype
    if dtype == "auto":
        if device.type != "cpu":
            return torch.bfloat16
        # native operators widen bfloat16 exactly and compute in float32; PyTorch's own round every step
        stored = checkpoint.stored_dtypes(source)
        return torch.bfloat16 if stored == {"BF16"} and native_available() else torch.float32
    if isinstance(dtype, str) and dtype in DTYPES:
        return DTYPES[dtype]
    raise CheckpointError(f"dtype {dtype!r} is not known; use auto, {', '.join(DTYPES)}.")
