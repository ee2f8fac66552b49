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
from gemma_mtp.checkpoint.read import Contents, read_config, read_contents, read_generation_config, report
from gemma_mtp.checkpoint.source import Location, Source
from gemma_mtp.checkpoint.tensors import read_values
from gemma_mtp.config import DrafterConfig, TargetConfig, TextConfig
from gemma_mtp.config.generation import GenerationDefaults
from gemma_mtp.errors import CheckpointError, ConfigError, QuantisationError
from gemma_mtp.families.gemma4 import GEMMA4
from gemma_mtp.families.known import family_of
from gemma_mtp.files.gguf import nbytes_of
from gemma_mtp.files.gguf_write import GgufWriter
from gemma_mtp.files.replace import replace_file
from gemma_mtp.interop.card import write_card
from gemma_mtp.interop.gguf_tokenizer import tokenizer_metadata
from gemma_mtp.locate import GGUF
from gemma_mtp.tokenizer import Tokenizer
from gemma_mtp.tokenizer.gguf import HF_JSON, MODEL

#: types of matrices that are written, and llama.cpp's number for files of it
FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7, "Q4_0": 2}
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
#: what divides the frequency of a dimension that does not rotate
UNROTATED = 1e30
QUANTISATION_VERSION = 2
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
) -> Exported:
    """Write a target's text model, or a drafter, to the file `out`, its matrices as `kind`, one of `FILE_TYPES`.

    Vectors are float32, and so are matrices that the type's blocks do not fit. The generation config goes along, and
    the checkpoint's own tokenizer, another one or none. What was written is read again before the file has its name; a
    model card is written beside it, under its name with the suffix `.md`. Weights are read and written piece by piece,
    and never in memory as a whole. `strict` refuses what is lost. Raises CheckpointError, ConfigError,
    QuantisationError or TokenizerError.
    """
    if kind not in FILE_TYPES:
        raise QuantisationError(f"type {kind!r} can not be written to GGUF; use one of {', '.join(FILE_TYPES)}.")
    path = Path(out)
    if path.suffix != GGUF:
        raise CheckpointError(f"{path} must end in {GGUF}, by which programs know a file of that format.")
    source = open_source(location)
    config = read_config(source)
    if family_of(config.model_type) is not GEMMA4:
        raise ConfigError(f"{source.path} is of model_type {config.model_type!r}, which can not be written as GGUF.")
    contents: Contents[Any] = read_contents(source, config)
    if contents.types:
        raise QuantisationError(f"{source.path} is quantised already; export the checkpoint that it was made of.")
    model = planned_model(source, contents, torch.float32, None)
    weights = [name for name in model.checkpoint_tensors() if not name.startswith("masked_embedding.")]
    layout = {_name(name): (_type_of(name, contents, kind), contents.headers[name].shape) for name in weights}
    metadata = {**_metadata(contents.config, kind), **_companions(source, contents.config, tokenizer)}
    losses = _losses(contents, metadata, kind, layout)
    report(location, contents.notes, strict)
    report(location, losses, strict)
    replace_file(path, lambda partial: _write(partial, metadata, layout, source, contents, weights))
    of_target = isinstance(contents.config, TargetConfig)
    write_card(path.parent, origin_of(source.path), "gguf", kind, of_target, losses, f"{path.stem}.md")
    return Exported(dict(Counter(dtype for dtype, _ in layout.values())), path.stat().st_size, losses)


def _write(
    path: Path, metadata: Mapping[str, Any], layout: Mapping[str, tuple[str, tuple[int, ...]]], source: Source,
    contents: Contents[Any], weights: list[str],
) -> None:  # fmt: skip
    rope = _rope_divisors(contents.config.text)
    whole = {**layout, ROPE_FACTORS: ("F32", tuple(rope.shape))}
    with GgufWriter(path, metadata, whole) as writer:
        writer.write(ROPE_FACTORS, bytes_of(rope))
        for name, rows, value in read_values(source, weights, contents.headers, {}):
            dtype, shape = layout[_name(name)]
            nbytes = nbytes_of(dtype, shape)
            assert nbytes is not None
            first = 0 if rows is None else rows.start * (nbytes // shape[0])
            writer.write(_name(name), bytes_of(_converted(value.float(), dtype)), first)
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
    losses = []
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


def _metadata(config: TargetConfig | DrafterConfig, kind: str) -> dict[str, Any]:
    """The configuration, by llama.cpp's keys. Raises ConfigError for what they can not say."""
    text = config.text
    drafter = isinstance(config, DrafterConfig)
    architecture = "gemma4-assistant" if drafter else "gemma4"
    layers = range(text.num_hidden_layers)
    keys: dict[str, Any] = {
        "vocab_size": text.vocab_size, "context_length": text.max_position_embeddings,
        "embedding_length": text.hidden_size, "block_count": text.num_hidden_layers,
        "feed_forward_length": _of_layers([text.layer_intermediate_size(i) for i in layers]),
        "attention.head_count": text.num_attention_heads,
        "attention.head_count_kv": _of_layers([text.layer_kv_heads(i) for i in layers]),
        "attention.layer_norm_rms_epsilon": float(text.rms_norm_eps),
        "attention.key_length": text.global_head_dim, "attention.value_length": text.global_head_dim,
        "attention.key_length_swa": text.head_dim, "attention.value_length_swa": text.head_dim,
        "attention.sliding_window": text.sliding_window,
        "attention.sliding_window_pattern": [text.is_sliding(i) for i in layers],
        "attention.shared_kv_layers": text.num_kv_shared_layers,
        "embedding_length_per_layer_input": text.hidden_size_per_layer_input,
        "rope.dimension_count": text.global_head_dim, "rope.dimension_count_swa": text.head_dim,
        "rope.freq_base": float(text.full_rope.rope_theta), "rope.freq_base_swa": float(text.sliding_rope.rope_theta),
    }  # fmt: skip
    if text.final_logit_softcapping or not drafter:  # of a target llama.cpp has one where the file does not say
        keys["final_logit_softcapping"] = float(text.final_logit_softcapping or 0.0)
    if text.enable_moe_block:
        keys |= {"expert_count": text.num_experts, "expert_used_count": text.top_k_experts,
                 "expert_feed_forward_length": text.moe_intermediate_size}  # fmt: skip
    if isinstance(config, DrafterConfig):
        keys |= {"embedding_length_out": config.backbone_hidden_size, "nextn_predict_layers": text.num_hidden_layers}
    return {
        "general.architecture": architecture, "general.type": "model", "general.file_type": FILE_TYPES[kind],
        "general.quantization_version": QUANTISATION_VERSION,
        **{f"{architecture}.{name}": value for name, value in keys.items()},
    }  # fmt: skip


def _of_layers(values: list[int]) -> int | array.array[int]:
    """One number where all layers have it."""
    return values[0] if len(set(values)) == 1 else array.array("i", values)


def _companions(
    source: Source, config: TargetConfig | DrafterConfig, tokenizer: Tokenizer | Literal["own"] | None
) -> dict[str, Any]:
    """The tokenizer and the generation config."""
    ends = list(read_generation_config(source).eos_token_ids)
    generation = {"eos_token_id": ends, **source.generation_config()}
    if tokenizer == "own":
        tokenizer = source.tokenizer() if source.has_tokenizer else None
    words = {MODEL: "none"} if tokenizer is None else tokenizer_metadata(tokenizer, config.text.vocab_size)
    return {**_sampling(read_generation_config(source)), OWN_GENERATION: json.dumps(generation), **words}


def _sampling(defaults: GenerationDefaults) -> dict[str, Any]:
    """What of the generation config the format has keys for."""
    named = ((f"{SAMPLING}{key}", getattr(defaults, field)) for key, field in SAMPLING_FIELDS.items())
    found = {key: value if key.endswith("top_k") else float(value) for key, value in named if value is not None}
    return {**found, **({SUPPRESSED: array.array("i", defaults.suppress_tokens)} if defaults.suppress_tokens else {})}


def _rope_divisors(text: TextConfig) -> Tensor:
    """Full layers rotate only their first dimensions, by frequencies of the whole head. Raises ConfigError for other
    kinds of rotation."""
    full, sliding = text.full_rope, text.sliding_rope
    if (sliding.rope_type, sliding.factor) != ("default", 1) or full.rope_type == "linear" or full.factor != 1:
        raise ConfigError("GGUF files of Gemma 4 can not say rope_parameters with a factor or of type 'linear'.")
    half = text.global_head_dim // 2
    rotated = int(half * full.partial_rotary_factor)
    return torch.tensor([1.0] * rotated + [UNROTATED] * (half - rotated))
