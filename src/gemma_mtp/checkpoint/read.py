"""What a checkpoint holds, found without reading weights but for a head that the config ties."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from gemma_mtp.checkpoint.blocks import READ
from gemma_mtp.checkpoint.derived import activations_of, with_activations
from gemma_mtp.checkpoint.names import EMBEDDING, HEAD, missing_tensor, unused_tensors
from gemma_mtp.checkpoint.open import open_source
from gemma_mtp.checkpoint.source import FLOAT_DTYPES, Location, Source
from gemma_mtp.checkpoint.tensors import allowed_dtypes, same_values, stored_tensors
from gemma_mtp.config import DrafterConfig, TargetConfig, TextConfig, parse_drafter_config, parse_target_config
from gemma_mtp.config.fields import config_notes
from gemma_mtp.config.generation import GenerationDefaults, parse_generation_config
from gemma_mtp.errors import CheckpointError, ConfigError
from gemma_mtp.families.base import Family
from gemma_mtp.families.known import family_of
from gemma_mtp.files.headers import StoredTensor
from gemma_mtp.model.drafter import Drafter
from gemma_mtp.model.layers import cast_
from gemma_mtp.model.target import Target
from gemma_mtp.weight_types import WeightTypes, parse_quantization_config
from gemma_mtp.weights.base import SCALES

logger = logging.getLogger("gemma_mtp")

_Config = TypeVar("_Config", bound=TargetConfig | DrafterConfig)


@dataclass(frozen=True)
class Contents(Generic[_Config]):
    """What a checkpoint holds.

    `config` has tie_word_embeddings as the weights have it. `types` says which parts are stored quantised. `headers`
    are by official name, `unused` all others. `notes` are sentences on what is not as it should be, though it can be
    loaded; `summary` on what is read in another way than it is stored.
    """

    config: _Config
    types: WeightTypes
    headers: dict[str, StoredTensor]
    unused: list[StoredTensor]
    notes: list[str]
    summary: list[str] = field(default_factory=list)


def read_target_config(location: Location) -> TargetConfig:
    """The target's configuration. Raises CheckpointError (no such file, malformed) or ConfigError (unusable)."""
    return parse_target_config(open_source(location).config())


def read_drafter_config(location: Location) -> DrafterConfig:
    """The drafter's configuration. Raises CheckpointError (no such file, malformed) or ConfigError (unusable)."""
    return parse_drafter_config(open_source(location, "drafter").config())


def read_config(location: Location) -> TargetConfig | DrafterConfig:
    """Either, by the model_type in the file."""
    raw = open_source(location).config()
    is_drafter = isinstance(raw, dict) and "assistant" in str(raw.get("model_type"))
    return parse_drafter_config(raw) if is_drafter else parse_target_config(raw)


def read_weight_types(location: Location) -> WeightTypes:
    """Which parts are stored quantised. Raises QuantisationError where another tool quantised them."""
    return parse_quantization_config(open_source(location).config().get("quantization_config"))


def read_generation_config(location: Location) -> GenerationDefaults:
    """Sampling defaults and end-of-sequence ids; a missing generation_config.json leaves those of config.json."""
    source = open_source(location)
    return parse_generation_config(source.generation_config(), read_config(source).text.eos_token_ids)


def read_headers(location: Location) -> dict[str, StoredTensor]:
    """How every tensor is stored, by its stored name. Raises CheckpointError where a file is missing or damaged."""
    return dict(open_source(location).tensors())


def text_headers(location: Location) -> dict[str, StoredTensor]:
    """The tensors of a target's text model or of a drafter, by their official names. Raises as `read_headers`."""
    source = open_source(location)
    return _named(source, read_config(source), read_weight_types(source))


def stored_dtypes(location: Location) -> set[str]:
    """Names of the floating dtypes of a checkpoint's text tensors, types of blocks too, scales of quantised ones left
    out.

    A float32 vector whose values bfloat16 has counts as BF16: some formats store vectors wider than the model has them.
    """
    source = open_source(location)
    found = [header for name, header in text_headers(source).items() if not name.endswith(SCALES)]
    dtypes = {header.dtype for header in found if header.dtype in (*FLOAT_DTYPES, *READ) and not _is_wide(header)}
    vectors = [header for header in found if _is_wide(header)]
    if dtypes == {"BF16"} and all(map(_fits_bfloat16, source.read((header, None) for header in vectors))):
        return dtypes
    return dtypes | {header.dtype for header in vectors}


def _is_wide(header: StoredTensor) -> bool:
    """Whether it is a vector of float32."""
    return header.dtype == "F32" and len(header.shape) == 1


def _fits_bfloat16(values: Tensor) -> bool:
    return torch.equal(values.to(torch.bfloat16).float(), values)


def read_contents(location: Location, config: _Config) -> Contents[_Config]:
    """What is in the files of a checkpoint of this configuration. Raises CheckpointError or QuantisationError."""
    source = open_source(location)
    stored = source.tensors()
    types = read_weight_types(source)
    headers = _named(source, config, types)
    known = {header.name for header in headers.values()}
    text, head_notes = _with_stored_head(source, config.text, headers)
    if isinstance(config, DrafterConfig) and not text.tie_word_embeddings:
        text = _with_head_as_table(text, headers)
    used = {header.name for header in headers.values()}
    unknown = unused_tensors(stored, known, range(text.first_kv_shared_layer, text.num_hidden_layers))
    notes = [*config_notes(source.config()), *source.notes(), *head_notes]
    if unknown:
        notes.append(
            f"the checkpoint has {len(unknown)} tensors that the model of its config.json has no use for, such as"
            f" {unknown[0]}; they are not loaded."
        )
    return Contents(
        config=replace(config, text=text),
        types=types,
        headers=headers,
        unused=[header for name, header in stored.items() if name not in used],
        notes=notes,
        summary=source.summary(),
    )


def empty_model(
    config: TargetConfig | DrafterConfig, types: WeightTypes, dtype: torch.dtype = torch.float32
) -> Target | Drafter:
    """Returns the model without memory, quantised so, for the names, shapes and dtypes of its tensors.

    Raises ConfigError where they are larger than can be counted.
    """
    try:
        with torch.device("meta"):
            model = Target(config.text) if isinstance(config, TargetConfig) else Drafter(config)
    except RuntimeError as error:
        raise ConfigError(
            f"config.json describes a model that no memory holds ({str(error).splitlines()[0]})."
        ) from None
    model = cast_(model, dtype, config.text.options)
    model.quantise_(types)
    return model


def family_table(config: TargetConfig | DrafterConfig) -> Family:
    """Returns the table of the family that a configuration was read by."""
    family = family_of(config.model_type)
    assert family is not None
    return family


def report(location: Location, notes: Sequence[str], strict: bool) -> None:
    """Log each note on a checkpoint as a warning. Raises CheckpointError with the first where `strict`."""
    path = location if isinstance(location, str | Path) else location.path
    for note in notes:
        if strict:
            raise CheckpointError(f"{path}: {note}")
        logger.warning("%s: %s", path, note)


def check_headers(stored: Mapping[str, Tensor], contents: Contents[Any]) -> None:
    """Hold a file's tensors against what it should hold. Raises CheckpointError naming the first that does not fit."""
    headers = contents.headers
    for name, view in stored.items():
        header = headers.get(name)
        if header is None:
            raise CheckpointError(missing_tensor(name, [found.name for found in (*headers.values(), *contents.unused)]))
        if header.shape != tuple(view.shape):
            raise CheckpointError(
                f"{header.file.name} has {name} of shape {list(header.shape)}, but config.json calls for"
                f" {list(view.shape)}; restore either from the source."
            )
        allowed = allowed_dtypes(view.dtype)
        if header.dtype not in allowed:
            raise CheckpointError(
                f"{header.file.name} stores {name} as {header.dtype}, but {' or '.join(allowed)} was expected;"
                " use a checkpoint that is stored so."
            )


@functools.lru_cache(maxsize=16)  # a pair that loads asks four times, and each time a model would be made
def _needed(config: TargetConfig | DrafterConfig, types: WeightTypes) -> tuple[str, ...]:
    """Official names of the stored tensors that a configuration calls for. Raises what `empty_model` does."""
    return tuple(stored_tensors(empty_model(config, types).checkpoint_tensors()))


def _named(source: Source, config: TargetConfig | DrafterConfig, types: WeightTypes) -> dict[str, StoredTensor]:
    """The stored tensors that a configuration calls for, and a head that it does not, by official name."""
    family, stored, needed = family_table(config), source.tensors(), _needed(config, types)
    spelled = {family.stored_name(name): name for name in (*needed, HEAD, HEAD + SCALES)}
    places = source.places([family.stored_name(name) for name in needed], (HEAD, HEAD + SCALES))
    return {spelled[name]: stored[place] for name, place in places.items()}


def _with_stored_head(
    source: Source, config: TextConfig, headers: dict[str, StoredTensor]
) -> tuple[TextConfig, list[str]]:
    """The configuration with its head tied or not as the weights have it, which decides in transformers too.

    A head that is tied is taken out of `headers`, or stands for the embedding that is not there. Raises CheckpointError
    where the head of an untied model is missing.
    """
    if not config.tie_word_embeddings:
        if headers and HEAD not in headers:
            raise CheckpointError(
                f"config.json has tie_word_embeddings false, but the checkpoint has no {HEAD}; restore it, or set"
                " tie_word_embeddings to true."
            )
        return config, []
    pairs = [(EMBEDDING + end, HEAD + end) for end in ("", SCALES) if HEAD + end in headers]
    alone = EMBEDDING not in headers
    if alone or all(table in headers and same_values(source, headers[table], headers[head]) for table, head in pairs):
        for table, head in pairs:
            stored = headers.pop(head)
            headers[table] = with_activations(headers.get(table, stored), activations_of(stored))
        return config, []
    note = (
        f"config.json ties the head to the embedding (tie_word_embeddings), but {HEAD} differs from it; the stored head"
        " is used: set tie_word_embeddings to false."
    )
    return replace(config, tie_word_embeddings=False), [note]


def _with_head_as_table(config: TextConfig, headers: dict[str, StoredTensor]) -> TextConfig:
    """The configuration and the headers of a drafter whose head stands apart: it looks nothing up, so its table is the
    head, and the embedding is left where it is."""
    for end in ("", SCALES):
        headers.pop(EMBEDDING + end, None)
        if HEAD + end in headers:
            headers[EMBEDDING + end] = headers.pop(HEAD + end)
    return replace(config, tie_word_embeddings=True)
