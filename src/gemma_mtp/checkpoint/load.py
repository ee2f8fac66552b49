"""Checkpoint directories in the official Hugging Face layout: open, check, load, save. safetensors only."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from gemma_mtp.checkpoint.names import EMBEDDING, HEAD, find_tensors, missing_tensor, unused_tensors
from gemma_mtp.checkpoint.safetensors import (
    FLOAT_DTYPES,
    SINGLE_FILE,
    TensorHeader,
    allowed_dtypes,
    copy_tensors,
    file_notes,
    read_headers,
    same_values,
)
from gemma_mtp.config import (
    DrafterConfig,
    TargetConfig,
    TextConfig,
    drafter_config_to_hf,
    parse_drafter_config,
    parse_target_config,
    target_config_to_hf,
)
from gemma_mtp.config.fields import config_notes
from gemma_mtp.config.generation import FILE as GENERATION_FILE
from gemma_mtp.config.generation import GenerationDefaults, parse_generation_config
from gemma_mtp.errors import CheckpointError
from gemma_mtp.json_files import existing, read_json, replace_file, write_json
from gemma_mtp.model.drafter import Drafter
from gemma_mtp.model.target import Target
from gemma_mtp.ops.quantise import QuantisedMatrix, Weight
from gemma_mtp.weight_types import WeightTypes, parse_quantization_config, weight_types_to_hf

logger = logging.getLogger("gemma_mtp")

#: a quantised matrix is stored under the official name, and its scales under the same with this at its end, which no
#: official name has (a router's per_expert_scale comes near)
SCALES = "_scales"

_Model = TypeVar("_Model", Target, Drafter)
_Config = TypeVar("_Config", bound=TargetConfig | DrafterConfig)


@dataclass(frozen=True)
class Contents(Generic[_Config]):
    """What a checkpoint directory holds, found without reading weights but for a head that the config ties.

    `config` has tie_word_embeddings as the weights have it. `headers` are by official name, `unused` all others.
    `notes` are sentences on what is not as it should be, though it can be loaded.
    """

    config: _Config
    headers: dict[str, TensorHeader]
    unused: list[TensorHeader]
    notes: list[str]


def read_target_config(directory: str | Path) -> TargetConfig:
    """The target's configuration. Raises CheckpointError (no such file, malformed) or ConfigError (unusable)."""
    return parse_target_config(read_json(existing(directory) / "config.json"))


def read_drafter_config(directory: str | Path) -> DrafterConfig:
    """The drafter's configuration. Raises CheckpointError (no such file, malformed) or ConfigError (unusable)."""
    return parse_drafter_config(read_json(existing(directory) / "config.json"))


def read_config(directory: str | Path) -> TargetConfig | DrafterConfig:
    """Either, by the model_type in the file."""
    raw = read_json(existing(directory) / "config.json")
    is_drafter = isinstance(raw, dict) and "assistant" in str(raw.get("model_type"))
    return parse_drafter_config(raw) if is_drafter else parse_target_config(raw)


def read_weight_types(directory: str | Path) -> WeightTypes:
    """Which parts are stored quantised. Raises QuantisationError where another tool quantised them."""
    return parse_quantization_config(read_json(existing(directory) / "config.json").get("quantization_config"))


def read_generation_config(directory: str | Path) -> GenerationDefaults:
    """Sampling defaults and end-of-sequence ids; a missing generation_config.json leaves those of config.json."""
    path = existing(directory) / GENERATION_FILE
    return parse_generation_config(read_json(path) if path.exists() else {}, read_config(directory).text.eos_token_ids)


def text_headers(directory: str | Path) -> dict[str, TensorHeader]:
    """The tensors of a target's text model or of a drafter, by their official names. Raises as `read_headers`."""
    return _named(read_headers(directory), read_config(directory), read_weight_types(directory))


def stored_dtypes(directory: str | Path) -> set[str]:
    """safetensors' names of the floating dtypes of a checkpoint's text tensors, scales of quantised ones left out."""
    headers = text_headers(directory).items()
    return {header.dtype for name, header in headers if header.dtype in FLOAT_DTYPES and not name.endswith(SCALES)}


def read_contents(directory: str | Path, config: _Config) -> Contents[_Config]:
    """What is in the files of a checkpoint of this configuration. Raises CheckpointError or QuantisationError."""
    stored = read_headers(directory)
    headers = _named(stored, config, read_weight_types(directory))
    known = {header.name for header in headers.values()}
    text, head_notes = _with_stored_head(config.text, headers)
    used = {header.name for header in headers.values()}
    unknown = unused_tensors(stored, known, range(text.first_kv_shared_layer, text.num_hidden_layers))
    notes = [*config_notes(read_json(Path(directory) / "config.json")), *file_notes(Path(directory)), *head_notes]
    if unknown:
        notes.append(
            f"the checkpoint has {len(unknown)} tensors that the model of its config.json has no use for, such as"
            f" {unknown[0]}; they are not loaded."
        )
    return Contents(
        config=replace(config, text=text),
        headers=headers,
        unused=[header for name, header in stored.items() if name not in used],
        notes=notes,
    )


def report(directory: str | Path, notes: Sequence[str], strict: bool) -> None:
    """Log each note on a checkpoint as a warning. Raises CheckpointError with the first where `strict`."""
    for note in notes:
        if strict:
            raise CheckpointError(f"{directory}: {note}")
        logger.warning("%s: %s", directory, note)


def load_target(
    directory: str | Path,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    types: WeightTypes | None = None,
    strict: bool = False,
) -> Target:
    """Load a target's text model in inference mode. Every name and shape is checked before any weight is read.

    `types` says which parts to quantise, piece by piece as they are read; what is stored quantised stays so. What is
    not as it should be but can be loaded is logged, or refused with `strict`. Peak memory: the weights as they are
    kept, plus 32 MB of mapped file and as much again where it is quantised. Raises CheckpointError, ConfigError or
    QuantisationError.
    """
    contents = read_contents(directory, read_target_config(directory))
    report(directory, contents.notes, strict)
    with torch.device("meta"):
        model = Target(contents.config.text)
    return _load(model, contents, read_weight_types(directory), dtype, device, types or WeightTypes())


def load_drafter(
    directory: str | Path,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    types: WeightTypes | None = None,
    strict: bool = False,
) -> Drafter:
    """Load a drafter in inference mode; the rest as in `load_target`."""
    contents = read_contents(directory, read_drafter_config(directory))
    report(directory, contents.notes, strict)
    with torch.device("meta"):
        model = Drafter(contents.config)
    drafter = _load(model, contents, read_weight_types(directory), dtype, device, types or WeightTypes())
    head = drafter.masked_embedding
    if head is not None:
        expected = torch.arange(contents.config.text.vocab_size, device=head.token_ordering.device)
        if not torch.equal(head.token_ordering.sort().values, expected):
            raise CheckpointError(
                f"{directory}: masked_embedding.token_ordering must list every token id once, but does not;"
                " the checkpoint is damaged: copy it again."
            )
    return drafter


def save_target(
    model: Target, config: TargetConfig, directory: str | Path, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write a target in the official layout: `model.safetensors` and `config.json`, each renamed into place."""
    prefix = "model." if "text" in config.model_type else "model.language_model."
    weights = model.checkpoint_tensors()
    named = {name.replace("model.", prefix, 1): weight for name, weight in weights.items()}
    config = replace(config, text=_tied_as(config.text, weights))
    _save(named, target_config_to_hf(config), model.weight_types, directory, dtype)


def save_drafter(
    model: Drafter, config: DrafterConfig, directory: str | Path, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write a drafter in the official layout: `model.safetensors` and `config.json`, each renamed into place."""
    weights = model.checkpoint_tensors()
    config = replace(config, text=_tied_as(config.text, weights))
    _save(weights, drafter_config_to_hf(config), model.weight_types, directory, dtype)


def _empty(config: TargetConfig | DrafterConfig, types: WeightTypes) -> Target | Drafter:
    """The model without memory, for the names and shapes of its tensors."""
    with torch.device("meta"):
        model = Target(config.text) if isinstance(config, TargetConfig) else Drafter(config)
    model.quantise_(types)
    return model


def _named(
    stored: Mapping[str, TensorHeader], config: TargetConfig | DrafterConfig, types: WeightTypes
) -> dict[str, TensorHeader]:
    """The stored tensors that a configuration calls for, and a head that it does not, by official name."""
    needed = stored_tensors(_empty(config, types).checkpoint_tensors())
    return {name: stored[place] for name, place in find_tensors(stored, needed, (HEAD, HEAD + SCALES)).items()}


def _with_stored_head(config: TextConfig, headers: dict[str, TensorHeader]) -> tuple[TextConfig, list[str]]:
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
    if alone or all(table in headers and same_values(headers[table], headers[head]) for table, head in pairs):
        for table, head in pairs:
            headers.setdefault(table, headers.pop(head))
        return config, []
    note = (
        f"config.json ties the head to the embedding (tie_word_embeddings), but {HEAD} differs from it; the stored head"
        " is used: set tie_word_embeddings to false."
    )
    return replace(config, tie_word_embeddings=False), [note]


def _tied_as(config: TextConfig, weights: Mapping[str, Weight]) -> TextConfig:
    return replace(config, tie_word_embeddings=HEAD not in weights)


def _load(
    model: _Model,
    contents: Contents[Any],
    stored_types: WeightTypes,
    dtype: torch.dtype,
    device: torch.device | str,
    types: WeightTypes,
) -> _Model:
    skipped = contents.unused
    if skipped:
        size = sum(header.nbytes for header in skipped) / 1e6
        logger.info("skipped %d tensors (%.1f MB) that text decoding does not use", len(skipped), size)
    model = model.to(dtype)
    model.quantise_(stored_types)
    stored = stored_tensors(model.checkpoint_tensors())
    check_headers(stored, contents)
    model.quantise_(types)
    model = model.to_empty(device=device)
    views: dict[str, Weight] = {}
    for name, weight in model.checkpoint_tensors().items():
        views |= stored_tensors({name: weight}) if name + SCALES in stored else {name: weight}
    with torch.no_grad():
        copy_tensors(views, contents.headers)
    return model.eval().requires_grad_(False)


def stored_tensors(weights: Mapping[str, Weight]) -> dict[str, Tensor]:
    """The tensors a file holds of them: of a quantised matrix its data and its scales."""
    tensors: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if isinstance(weight, QuantisedMatrix):
            tensors |= {name: weight.data, name + SCALES: weight.scales}
        else:
            tensors[name] = weight
    return tensors


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
                " use an unquantised checkpoint."
            )


def _save(
    named: Mapping[str, Weight], config: dict[str, Any], types: WeightTypes, directory: str | Path, dtype: torch.dtype
) -> None:
    names = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
    if dtype not in names:
        raise CheckpointError(f"checkpoints can not be saved as {dtype}; use one of {', '.join(names.values())}.")
    tensors = {
        name: tensor.detach().to("cpu", _saved_dtype(name, tensor, dtype)).contiguous()
        for name, tensor in stored_tensors(named).items()
    }
    path = Path(directory)
    quantization = {"quantization_config": weight_types_to_hf(types)} if types else {}
    replace_file(path / SINGLE_FILE, lambda partial: save_file(tensors, partial, metadata={"format": "pt"}))
    write_json(path / "config.json", {**config, "dtype": names[dtype], **quantization})


def _saved_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    return dtype if tensor.is_floating_point() and not name.endswith(SCALES) else tensor.dtype
