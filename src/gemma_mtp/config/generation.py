"""What a checkpoint's generation_config.json asks for: fields that are honoured, that do not matter, and all others.

The fields are those of transformers' GenerationConfig (5.22.2). One that would change the output and is not honoured is
named, unless its value turns it off.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gemma_mtp.config.values import LARGEST, is_token_id
from gemma_mtp.errors import CheckpointError
from gemma_mtp.json_files import shown

FILE = "generation_config.json"

#: what `GenerationDefaults` holds
HONOURED = frozenset({
    "eos_token_id", "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "suppress_tokens",
    "max_new_tokens", "stop_strings",
})  # fmt: skip
#: what no token depends on: how transformers computes, drafts and reports; and settings of beams, which `num_beams`
#: turns on, and of encoders
IRRELEVANT = frozenset({
    "use_cache", "cache_config", "max_cache_len", "use_mtp", "output_attentions", "output_hidden_states",
    "output_scores", "output_logits", "return_dict_in_generate", "pad_token_id", "bos_token_id",
    "decoder_start_token_id", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit",
    "assistant_lookbehind", "target_lookbehind", "speculation_type", "compile_config", "disable_compile",
    "continuous_batching_config", "low_memory", "prefill_chunk_size", "renormalize_logits", "length_penalty",
    "early_stopping", "num_beam_groups", "diversity_penalty", "_from_model_config", "transformers_version",
})  # fmt: skip


def _is(*values: object) -> Callable[[Any], bool]:
    """Whether a value is one of these; None and an empty list turn every field off."""
    return lambda value: value in (None, *values) or value == []


def _at_least_one(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and value >= 1)


#: what is not honoured, with the values that turn it off
NOT_HONOURED: dict[str, Callable[[Any], bool]] = {
    "max_length": _is(), "min_length": _is(0), "min_new_tokens": _is(0), "max_time": _is(), "num_beams": _is(1),
    "cache_implementation": lambda value: value != "quantized", "typical_p": _at_least_one, "top_h": _is(),
    "epsilon_cutoff": _is(0), "eta_cutoff": _is(0), "encoder_repetition_penalty": _is(1),
    "no_repeat_ngram_size": _is(0), "encoder_no_repeat_ngram_size": _is(0), "bad_words_ids": _is(),
    "forced_bos_token_id": _is(), "forced_eos_token_id": _is(), "remove_invalid_values": _is(False),
    "exponential_decay_length_penalty": _is(), "begin_suppress_tokens": _is(), "sequence_bias": _is({}),
    "token_healing": _is(False), "guidance_scale": _is(1), "watermarking_config": _is({}),
    "num_return_sequences": _is(1), "assistant_ensemble_weight": _is(), "penalty_alpha": _is(0), "dola_layers": _is(),
    "constraints": _is(), "force_words_ids": _is(),
}  # fmt: skip
#: of those, what only shapes draws, so that it does nothing where do_sample is false
DRAWS_ONLY = frozenset({"typical_p", "top_h", "epsilon_cutoff", "eta_cutoff"})


@dataclass(frozen=True)
class GenerationDefaults:
    """What a checkpoint's generation_config.json asks for; None where it says nothing.

    `temperature` is 0 where it has do_sample false, whatever temperature stands beside it. `notes` are sentences on
    what it asks for and is not done.
    """

    eos_token_ids: tuple[int, ...]
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    suppress_tokens: tuple[int, ...] = ()
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def sampling(self) -> dict[str, Any]:
        """How tokens are to be drawn, as arguments of SamplingParams; only those that it says something of."""
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def conversation(self) -> dict[str, Any]:
        """The same and what else is for the model's turns: forbidden tokens, their length, and where they stop."""
        arguments = self.sampling()
        if self.suppress_tokens:
            arguments["logit_bias"] = dict.fromkeys(self.suppress_tokens, -math.inf)
        if self.max_new_tokens is not None:
            arguments["max_tokens"] = self.max_new_tokens
        if self.stop:
            arguments["stop"] = self.stop
        return arguments


def parse_generation_config(raw: Any, eos_token_ids: tuple[int, ...]) -> GenerationDefaults:
    """Read a generation_config.json; `eos_token_ids` are config.json's, for where it has none.

    Raises CheckpointError naming a field of the wrong kind.
    """
    if not isinstance(raw, dict):
        raise CheckpointError(f"{FILE} must hold a JSON object, but holds a {type(raw).__name__}.")
    return GenerationDefaults(
        eos_token_ids=_ids(raw, "eos_token_id") or eos_token_ids,
        temperature=_temperature(raw),
        top_k=_whole(raw, "top_k"),
        top_p=_number(raw, "top_p"),
        suppress_tokens=_ids(raw, "suppress_tokens"),
        min_p=_number(raw, "min_p"),
        repetition_penalty=_number(raw, "repetition_penalty"),
        max_new_tokens=_whole(raw, "max_new_tokens"),
        stop=_several(raw, "stop_strings", lambda text: isinstance(text, str) and text != "", "a text"),
        notes=tuple(_notes(raw)),
    )


def _temperature(raw: Mapping[str, Any]) -> float | None:
    """The temperature in force: 0 without sampling, and 1 where sampling is asked for and no temperature given.

    Where do_sample is absent, a temperature is taken to ask for sampling, though transformers would decode greedily.
    """
    sample, temperature = raw.get("do_sample"), _number(raw, "temperature")
    if sample is not None and not isinstance(sample, bool):
        raise CheckpointError(f"{FILE} has do_sample = {shown(sample)}, but true or false was expected.")
    if sample is False:
        return 0.0
    return 1.0 if sample and temperature is None else temperature


def _notes(raw: Mapping[str, Any]) -> list[str]:
    """A sentence for each field that is not honoured or not known, unless its value turns it off."""
    notes = []
    for name, value in raw.items():
        if name in HONOURED | IRRELEVANT or (raw.get("do_sample") is False and name in DRAWS_ONLY):
            continue
        known = name in NOT_HONOURED
        if not (NOT_HONOURED[name](value) if known else value is None):
            what = "is not honoured" if known else "is not known"
            notes.append(f"{FILE} has the field {name} = {shown(value)}, which {what}; output is made without it.")
    return notes


def _number(raw: Mapping[str, Any], name: str) -> float | None:
    value = raw.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise CheckpointError(f"{FILE} has {name} = {shown(value)}, but a number was expected.")
    return value


def _whole(raw: Mapping[str, Any], name: str) -> int | None:
    value = _number(raw, name)
    if value is not None and not (value == int(value) and abs(value) <= LARGEST):
        raise CheckpointError(
            f"{FILE} has {name} = {shown(value)}, but a whole number of {LARGEST} at most was expected."
        )
    return None if value is None else int(value)


def _several(raw: Mapping[str, Any], name: str, fits: Callable[[Any], bool], one: str) -> tuple[Any, ...]:
    """Returns what a field holds: one thing, a list of them, or nothing."""
    value = raw.get(name)
    found = [] if value is None else value if isinstance(value, list) else [value]
    if not all(map(fits, found)):
        raise CheckpointError(f"{FILE} has {name} = {shown(value)}, but {one} or a list of them was expected.")
    return tuple(found)


def _ids(raw: Mapping[str, Any], name: str) -> tuple[int, ...]:
    return _several(raw, name, is_token_id, "a token id")
