"""Writes targets and drafters as GGUF files, for llama.cpp and what is built on it.

Keys and names are those of llama.cpp's own conversion (conversion/gemma.py, src/models/gemma4*.cpp as vendored in
llama-cpp-python 0.3.36).
"""

from __future__ import annotations

import array
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from gemma_mtp.checkpoint.blocks import WRITTEN, quantised
from gemma_mtp.checkpoint.gguf import OWN_GENERATION, SAMPLING, SAMPLING_FIELDS, SUPPRESSED, GgufSource
from gemma_mtp.checkpoint.gguf_names import ROPE_FACTORS, gguf_name
from gemma_mtp.checkpoint.load import planned_model
from gemma_mtp.checkpoint.open import open_source
from gemma_mtp.checkpoint.origin import origin_of
from gemma_mtp.checkpoint.pieces import bytes_of
from gemma_mtp.checkpoint.read import Contents, family_table, read_config, read_contents, read_generation_config, report
from gemma_mtp.checkpoint.source import Location, OnBytes, Source
from gemma_mtp.checkpoint.tensors import nobody, read_values
from gemma_mtp.config import DrafterConfig, TargetConfig, TextConfig
from gemma_mtp.config.generation import GenerationDefaults
from gemma_mtp.errors import CheckpointError, QuantisationError
from gemma_mtp.files.gguf import nbytes_of
from gemma_mtp.files.gguf_write import GgufWriter
from gemma_mtp.files.replace import replace_file, replace_text
from gemma_mtp.interop.card import card
from gemma_mtp.interop.directory import activation_losses
from gemma_mtp.interop.gguf_keys import general_keys, is_gemma3, model_keys, rope_divisors
from gemma_mtp.interop.gguf_tokenizer import tokenizer_metadata
from gemma_mtp.locate import GGUF
from gemma_mtp.tokenizer import Tokenizer
from gemma_mtp.tokenizer.gguf import HF_JSON, MODEL

#: types of matrices that are written, and llama.cpp's number for files of it
FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7, "Q4_0": 2}
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
#: matrices that choose experts are never rounded
CHOOSERS = ("router.proj.weight",)


@dataclass(frozen=True)
class Exported:
    """What was written: tensors by type, bytes, and a sentence on each thing that the file does not hold as it was."""

    types: dict[str, int]
    nbytes: int
    losses: list[str]


def export_gguf(
    location: Location,
    out: str | Path,
    kind: str = "BF16",
    *,
    tokenizer: Tokenizer | Literal["own"] | None = "own",
    strict: bool = False,
    on_bytes: OnBytes = nobody,
) -> Exported:
    """Write a target's text model, or a drafter, to the file `out`, its matrices as `kind`, one of `FILE_TYPES`.

    Vectors are float32, and so are matrices that the type's blocks do not fit. The generation config goes along, and
    the checkpoint's own tokenizer, another one or none. What was written is read again before the file has its name; a
    model card is written beside it, under its name with the suffix `.md`. Weights are read and written piece by piece,
    and never in memory as a whole. `strict` refuses what is lost; `on_bytes` is told of the source how many bytes are
    done, and of how many. Raises CheckpointError, ConfigError, QuantisationError or TokenizerError.
    """
    if kind not in FILE_TYPES:
        raise QuantisationError(f"type {kind!r} can not be written to GGUF; use one of {', '.join(FILE_TYPES)}.")
    path = Path(out)
    if path.suffix != GGUF:
        raise CheckpointError(f"{path} must end in {GGUF}, by which programs know a file of that format.")
    source = open_source(location)
    contents: Contents[Any] = read_contents(source, read_config(source))
    if contents.types:
        raise QuantisationError(f"{source.path} is quantised already; export the checkpoint that it was made of.")
    model = planned_model(source, contents, torch.float32, None)
    weights = [name for name in model.checkpoint_tensors() if not name.startswith("masked_embedding.")]
    layout = {_name(name): (_type_of(name, contents, kind), contents.headers[name].shape) for name in weights}
    metadata = {
        **general_keys(FILE_TYPES[kind]), **model_keys(contents.config),
        **_companions(source, contents.config, tokenizer),
    }  # fmt: skip
    losses = _losses(contents, metadata, kind, layout)
    report(location, contents.notes, strict)
    report(location, losses, strict)
    replace_file(path, lambda partial: _write(partial, metadata, layout, source, contents, weights, on_bytes))
    of_target = isinstance(contents.config, TargetConfig)
    replace_text(path.with_name(f"{path.stem}.md"), card(origin_of(source.path), "gguf", kind, of_target, losses))
    return Exported(dict(Counter(dtype for dtype, _ in layout.values())), path.stat().st_size, losses)


def _write(
    path: Path, metadata: Mapping[str, Any], layout: Mapping[str, tuple[str, tuple[int, ...]]], source: Source,
    contents: Contents[Any], weights: list[str], on_bytes: OnBytes,
) -> None:  # fmt: skip
    rope = rope_divisors(contents.config)
    whole = {**layout, **({} if rope is None else {ROPE_FACTORS: ("F32", tuple(rope.shape))})}
    family = family_table(contents.config)
    with GgufWriter(path, metadata, whole) as writer:
        if rope is not None:
            writer.write(ROPE_FACTORS, bytes_of(rope))
        for name, rows, value in read_values(source, weights, contents.headers, {}, on_bytes):
            dtype, shape = layout[_name(name)]
            nbytes = nbytes_of(dtype, shape)
            assert nbytes is not None
            first = 0 if rows is None else rows.start * (nbytes // shape[0])
            writer.write(_name(name), bytes_of(_converted(value.float() + family.added(name), dtype)), first)
    _check(path, contents.config)


def _check(path: Path, config: TargetConfig | DrafterConfig) -> None:
    """Raises CheckpointError where what is read of the file is not the model."""
    written = GgufSource(path)
    read = read_config(written)
    ours, theirs = (_told_alike(each) for each in (config, read))
    if ours != theirs:
        names = [name for name, value in vars(ours).items() if vars(theirs)[name] != value]
        raise CheckpointError(f"GGUF can not hold this model: {', '.join(names)} would be read as something else.")
    planned_model(written, read_contents(written, read), torch.float32, None)


def _told_alike(config: TargetConfig | DrafterConfig) -> TextConfig:
    """The text configuration without what a GGUF file says in other words or elsewhere."""
    text = config.text
    k_eq_v = text.attention_k_eq_v and isinstance(config, TargetConfig)
    if not text.enable_moe_block:
        text = replace(text, num_experts=0, top_k_experts=0, moe_intermediate_size=0)
    return replace(
        text, model_type="", eos_token_ids=(), bos_token_id=None, pad_token_id=None, attention_k_eq_v=k_eq_v,
        use_double_wide_mlp=text.layer_intermediate_size(text.num_hidden_layers - 1) != text.intermediate_size,
        vocab_size_per_layer_input=text.vocab_size_per_layer_input if text.hidden_size_per_layer_input else 0,
    )  # fmt: skip


def _name(official: str) -> str:
    found = gguf_name(official)
    assert found is not None, official
    return found


def _type_of(name: str, contents: Contents[Any], kind: str) -> str:
    shape = contents.headers[name].shape
    if len(shape) < 2 or name.endswith(CHOOSERS) or nbytes_of(kind, shape) is None:
        return "F32"
    return kind


def _converted(values: Tensor, dtype: str) -> Tensor:
    return quantised(dtype, values) if dtype in WRITTEN else values.to(FLOATS[dtype])


def _losses(
    contents: Contents[Any], metadata: Mapping[str, Any], kind: str, layout: Mapping[str, tuple[str, tuple[int, ...]]]
) -> list[str]:
    """A sentence on each thing that is not written as it is."""
    losses = activation_losses(contents)
    written = {name: layout[_name(name)][0] for name in contents.headers if not name.startswith("masked_embedding.")}
    stored = {contents.headers[name].dtype for name, dtype in written.items() if dtype == kind}
    wide = sorted(dtype for dtype in stored if not _holds(kind, dtype))
    if wide:
        losses.append(f"its matrices of {', '.join(wide)} are rounded to {kind}.")
    unfit = [name for name, (dtype, shape) in layout.items() if dtype != kind and len(shape) > 1]
    if unfit:
        losses.append(f"{len(unfit)} matrices are written as float32, such as {unfit[0]}, which {kind} can not hold.")
    if isinstance(contents.config, DrafterConfig) and contents.config.use_ordered_embeddings:
        losses.append("GGUF has no centroid head: the file's drafter scores the whole vocabulary.")
    if HF_JSON in metadata:
        losses.append(
            "its tokenizer is not of Gemma's form: llama.cpp splits text otherwise, so give it token ids;"
            f" gemma-mtp reads the whole tokenizer.json from {HF_JSON}."
        )
    return losses


def _holds(kind: str, stored: str) -> bool:
    """Whether a type holds every value of another."""
    return kind == stored or (kind == "F32" and stored != "F64")


def _companions(
    source: Source, config: TargetConfig | DrafterConfig, tokenizer: Tokenizer | Literal["own"] | None
) -> dict[str, Any]:
    """The tokenizer and the generation config."""
    ends = list(read_generation_config(source).eos_token_ids)
    generation = {"eos_token_id": ends, **source.generation_config()}
    if tokenizer == "own":
        tokenizer = source.tokenizer() if source.has_tokenizer else None
    words = {MODEL: "none"}
    if tokenizer is not None:
        words = tokenizer_metadata(tokenizer, config.text.vocab_size, scored=is_gemma3(config))
    return {**_sampling(read_generation_config(source)), OWN_GENERATION: json.dumps(generation), **words}


def _sampling(defaults: GenerationDefaults) -> dict[str, Any]:
    """What of the generation config the format has keys for."""
    named = ((f"{SAMPLING}{key}", getattr(defaults, field)) for key, field in SAMPLING_FIELDS.items())
    found = {key: value if key.endswith("top_k") else float(value) for key, value in named if value is not None}
    return {**found, **({SUPPRESSED: array.array("i", defaults.suppress_tokens)} if defaults.suppress_tokens else {})}
