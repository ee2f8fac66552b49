"""What a checkpoint holds and what decoding with it takes, from its configuration and file headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from gemma_mtp.backend.select import kv_dtype
from gemma_mtp.checkpoint import (
    Location,
    Source,
    StoredTensor,
    check_headers,
    empty_model,
    open_source,
    read_config,
    read_contents,
    stored_tensors,
)
from gemma_mtp.config import FULL, SLIDING, DrafterConfig, TargetConfig, TextConfig
from gemma_mtp.engine.pair import choose_device, choose_dtype
from gemma_mtp.kv.blocks import row_bytes


@dataclass(frozen=True)
class KVBytes:
    """Bytes of one sequence's KV cache, whose elements are of `dtype`.

    `per_token` counts the full layers, which grow with the context. The sliding layers' share grows only until the
    window is full.
    """

    dtype: str
    element_bytes: int
    per_token: int
    sliding_per_token_until_window: int
    at_max_context: int


@dataclass(frozen=True)
class CheckpointReport:
    """A checkpoint's geometry and sizes. Bytes are the files' own; parameters count the text model only."""

    kind: str
    model_type: str
    geometry: dict[str, Any]
    parameters: int
    stored_dtypes: dict[str, int]
    quantised: dict[str, str]
    weight_bytes: int
    skipped_tensors: int
    skipped_bytes: int
    kv_bytes: KVBytes | None
    notes: list[str]
    read_as: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without what does not apply: a drafter has no KV of its own."""
        return {name: value for name, value in asdict(self).items() if value not in (None, {}, [])}


def inspect_checkpoint(location: Location) -> CheckpointReport:
    """Read a target's or drafter's checkpoint, and hold every tensor against the configuration.

    No weights are read, but for a head that the configuration ties to the embedding. Keys and values are counted in the
    dtype in which the backend that would run keeps them, on this machine and with nothing asked for.

    Raises CheckpointError, ConfigError or QuantisationError where it could not be loaded.
    """
    source = open_source(location)
    contents = read_contents(source, read_config(source))
    config = contents.config
    model = empty_model(config, contents.types)
    weights = model.checkpoint_tensors()
    check_headers(stored_tensors(weights), contents)
    used = [contents.headers[name] for name in stored_tensors(weights)]
    return CheckpointReport(
        kind="target" if isinstance(config, TargetConfig) else "drafter",
        model_type=config.model_type,
        geometry=geometry(config),
        parameters=sum(weight.numel() for weight in weights.values() if weight.dtype.is_floating_point),
        stored_dtypes=dict(Counter(header.dtype for header in used)),
        quantised=dict(model.weight_types.quantised),
        weight_bytes=_nbytes(used),
        skipped_tensors=len(contents.unused),
        skipped_bytes=_nbytes(contents.unused),
        kv_bytes=kv_bytes(config.text, _kv_dtype(source)) if isinstance(config, TargetConfig) else None,
        notes=contents.notes,
        read_as=contents.summary,
    )


def kv_bytes(config: TextConfig, dtype: torch.dtype) -> KVBytes:
    """Bytes of a target's KV cache for one sequence: keys and values, in `dtype`, of the layers that have their own."""
    full, sliding = (row_bytes(config, kind, dtype.itemsize) for kind in (FULL, SLIDING))
    return KVBytes(
        dtype=str(dtype).removeprefix("torch."),
        element_bytes=dtype.itemsize,
        per_token=full,
        sliding_per_token_until_window=sliding,
        at_max_context=sliding * min(config.sliding_window, config.max_position_embeddings)
        + full * config.max_position_embeddings,
    )


def _kv_dtype(source: Source) -> torch.dtype:
    device = choose_device("auto")
    return kv_dtype(device, choose_dtype("auto", device, source))


def geometry(config: TargetConfig | DrafterConfig) -> dict[str, Any]:
    """The sizes that tell one model from another, by Hugging Face's names."""
    text = config.text
    shown: dict[str, Any] = {
        "layers": f"{text.num_hidden_layers} ({_pattern(text)})",
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "attention_heads": text.num_attention_heads,
        "kv_heads_sliding_full": [text.num_key_value_heads, text.num_global_key_value_heads],
        "head_dim_sliding_full": [text.head_dim, text.global_head_dim],
        "sliding_window": text.sliding_window,
        "vocab_size": text.vocab_size,
        "max_position_embeddings": text.max_position_embeddings,
    }
    if isinstance(config, DrafterConfig):
        shown["backbone_hidden_size"] = config.backbone_hidden_size
        if config.use_ordered_embeddings:
            shown["centroids"] = config.num_centroids
        return shown
    shown["donor_layers"] = {kind.removesuffix("_attention"): i for kind, i in text.donor_layers.items()}
    optional = {
        "kv_shared_layers": text.num_kv_shared_layers,
        "double_wide_mlp": text.use_double_wide_mlp,
        "k_eq_v": text.attention_k_eq_v,
        "per_layer_embedding_size": text.hidden_size_per_layer_input,
        "experts": text.num_experts if text.enable_moe_block else 0,
        "logit_softcap": text.final_logit_softcapping,
    }
    return {**shown, **{name: value for name, value in optional.items() if value}}


def _pattern(text: TextConfig) -> str:
    """The layer types in short: "4S+F x 7" where they repeat, else letter by letter."""
    letters = "".join("F" if kind == FULL else "S" for kind in text.layer_types)
    sliding = letters.find("F")
    unit = letters[: sliding + 1]
    if sliding > 0 and letters == unit * (len(letters) // len(unit)):
        return f"{sliding}S+F x {len(letters) // len(unit)}"
    return letters


def _nbytes(headers: Iterable[StoredTensor]) -> int:
    return sum(header.nbytes for header in headers)
