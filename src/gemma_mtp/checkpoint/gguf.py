"""Checkpoints in GGUF files, llama.cpp's: weights, configuration and tokenizer in one file, or in a split one."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma_mtp.checkpoint.blocks import READ, dequantised
from gemma_mtp.checkpoint.derived import Part, derived, read_derived
from gemma_mtp.checkpoint.gguf_config import ARCHITECTURE, DRAFTERS, architecture_of, config_of, unknown_keys
from gemma_mtp.checkpoint.gguf_config import GEMMA3 as GEMMA3_ARCHITECTURE
from gemma_mtp.checkpoint.gguf_metadata import Metadata
from gemma_mtp.checkpoint.gguf_names import FUSED_QKV, GATE_UP_EXPERTS, ROPE_FACTORS, SPLIT_EXPERTS, official_name
from gemma_mtp.checkpoint.pieces import read_pieces
from gemma_mtp.checkpoint.source import FLOAT_DTYPES, Piece
from gemma_mtp.config.generation import FILE as GENERATION_FILE
from gemma_mtp.errors import CheckpointError
from gemma_mtp.families.gemma3 import GEMMA3
from gemma_mtp.files.gguf import part_of_split, read_header
from gemma_mtp.files.headers import Header, StoredTensor
from gemma_mtp.files.replace import replace_file
from gemma_mtp.json_files import write_json
from gemma_mtp.tokenizer import Tokenizer
from gemma_mtp.tokenizer.gguf import end_token_ids, has_tokenizer, read_tokenizer, unreadable
from gemma_mtp.weights.blocks import KINDS

SUFFIX = ".gguf"
SAMPLING = "general.sampling."
#: a whole generation_config.json; ours alone
OWN_GENERATION = "gemma_mtp.generation_config"
#: what the format's keys for sampling are in a generation_config.json; others stand there under their own names
SAMPLING_FIELDS = {
    "temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "penalty_repeat": "repetition_penalty",
}  # fmt: skip
SUPPRESSED = "tokenizer.ggml.suppress_tokens"


class GgufSource:
    """A GGUF file, or any part of a split one; its methods are those of `Source`."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError where the file is not there."""
        if not path.is_file():
            raise CheckpointError(f"{path} does not exist; give a GGUF file.")
        self._path = path

    @property
    def path(self) -> Path:
        return self._path

    @functools.cached_property
    def _header(self) -> Header:
        return read_header(self._path)

    @property
    def metadata(self) -> Metadata:
        return Metadata(self._path, self._header.metadata)

    def config(self) -> dict[str, Any]:
        """Returns what config.json would hold. Raises ConfigError for a model that can not be decoded."""
        return dict(self._config)

    @functools.cached_property
    def _config(self) -> dict[str, Any]:
        architecture_of(self.metadata)
        entry = self._header.tensors.get(ROPE_FACTORS)
        factors = None
        if entry is not None:
            if entry.dtype not in ("F32", "F16", "BF16"):
                raise CheckpointError(f"{self._path} stores {ROPE_FACTORS} as {entry.dtype}, but F32 was expected.")
            (factors,) = read_pieces([(entry, None)])
        return config_of(self.metadata, self.tensors(), factors)

    def generation_config(self) -> dict[str, Any]:
        """Returns what generation_config.json would hold: what we wrote, or tokens and sampling by the format's own
        keys."""
        metadata = self.metadata
        if OWN_GENERATION in metadata.values:
            try:
                return dict(json.loads(metadata.text(OWN_GENERATION)))
            except (ValueError, TypeError, RecursionError):
                raise metadata.wrong(OWN_GENERATION, "a JSON object") from None
        raw: dict[str, Any] = {}
        if ends := end_token_ids(metadata.values):
            raw["eos_token_id"] = ends
        if suppressed := metadata.integers(SUPPRESSED):
            raw["suppress_tokens"] = suppressed
        for key, value in metadata.values.items():
            if key.startswith(SAMPLING):
                name = key.removeprefix(SAMPLING)
                raw[SAMPLING_FIELDS.get(name, key)] = metadata.real(key) if isinstance(value, float) else value
        return raw

    @property
    def has_tokenizer(self) -> bool:
        return has_tokenizer(self._header.metadata)

    def tokenizer(self) -> Tokenizer:
        return read_tokenizer(self._header.metadata)

    def tensors(self) -> dict[str, StoredTensor]:
        """Returns how every tensor is stored, by its official name where it has one.

        A tensor of queries, keys and values is three, and two of experts are one.
        """
        return self._tensors

    @functools.cached_property
    def _tensors(self) -> dict[str, StoredTensor]:
        entries = {name: entry for name, entry in self._header.tensors.items() if name != ROPE_FACTORS}
        tensors: dict[str, StoredTensor] = {}
        for name, entry in entries.items():
            official = official_name(name)
            if name.endswith(".weight") and ".attn_qkv." in name:
                tensors |= self._fused(name, entry)
            elif name not in self._joined_from:
                tensors[official or name] = self._whole(official or name, entry)
        for official, parts in self._joined.items():
            first = parts[0]
            experts, rows, columns = first.shape
            tensors[official] = replace(
                first, name=official, shape=(experts, 2 * rows, columns), nbytes=2 * first.nbytes
            )
        return tensors

    def _whole(self, name: str, entry: StoredTensor) -> StoredTensor:
        """A tensor as Hugging Face's files have it: without what the format adds to a family's norms."""
        architecture = self._header.metadata.get(ARCHITECTURE)
        stored, added = replace(entry, name=name), GEMMA3.added(name) if architecture == GEMMA3_ARCHITECTURE else 0.0
        if not added or entry.dtype not in (*FLOAT_DTYPES, *READ):
            return stored
        blocks = entry.dtype in READ

        def decode(parts: Sequence[Tensor], rows: range) -> Tensor:
            values = dequantised(entry.dtype, parts[0]) if blocks else parts[0].float()
            return values[rows.start : rows.stop] - added

        return derived(name, entry.shape, "F32" if blocks else entry.dtype, [Part(stored, 0)], decode)

    @functools.cached_property
    def _joined(self) -> dict[str, tuple[StoredTensor, StoredTensor]]:
        """Gates and the rest of the experts' first products, which the model has in one tensor."""
        joined: dict[str, tuple[StoredTensor, StoredTensor]] = {}
        for layer in range(self._layers):
            gate, up = (self._header.tensors.get(name.format(layer=layer)) for name in SPLIT_EXPERTS)
            if gate is not None and up is not None:
                if (gate.dtype, gate.shape) != (up.dtype, up.shape) or len(gate.shape) != 3:
                    raise CheckpointError(
                        f"{self._path} stores the experts of layer {layer} as {gate.dtype} {list(gate.shape)} and"
                        f" {up.dtype} {list(up.shape)}, but two alike were expected; convert the model again."
                    )
                official = GATE_UP_EXPERTS.format(layer=layer)
                joined[official] = replace(gate, name=official), replace(up, name=official)
        return joined

    @functools.cached_property
    def _joined_from(self) -> set[str]:
        layers = [layer for layer in range(self._layers) if GATE_UP_EXPERTS.format(layer=layer) in self._joined]
        return {name.format(layer=layer) for layer in layers for name in SPLIT_EXPERTS}

    @property
    def _layers(self) -> int:
        """How many layers may have tensors: no more than there are tensors."""
        return min(self.metadata.integer(f"{architecture_of(self.metadata)}.block_count"), len(self._header.tensors))

    def _fused(self, name: str, entry: StoredTensor) -> dict[str, StoredTensor]:
        """Queries, keys and values of one tensor, whose rows lie in this order."""
        layer = int(name.split(".")[1]) if name.split(".")[1].isdigit() else -1
        o_proj = self._header.tensors.get(f"blk.{layer}.attn_output.weight")
        if name != FUSED_QKV.format(layer=layer) or o_proj is None or len(entry.shape) != 2:
            raise CheckpointError(f"{self._path} has {name} of shape {list(entry.shape)}, which can not be split.")
        queries = o_proj.shape[-1]
        others, odd = divmod(entry.shape[0] - queries, 2)
        if odd or others <= 0:
            raise CheckpointError(f"{self._path} has {name} of shape {list(entry.shape)}, which can not be split.")
        row_bytes = entry.nbytes // entry.shape[0]
        parts: dict[str, StoredTensor] = {}
        first = 0
        for part, rows in (("q_proj", queries), ("k_proj", others), ("v_proj", others)):
            official = f"model.layers.{layer}.self_attn.{part}.weight"
            parts[official] = replace(
                entry, name=official, shape=(rows, entry.shape[1]), nbytes=rows * row_bytes,
                offset=entry.offset + first * row_bytes,
            )  # fmt: skip
            first += rows
        return parts

    def places(self, needed: Collection[str], optional: Collection[str] = ()) -> dict[str, str]:
        return {name: name for name in (*needed, *optional) if name in self.tensors()}

    def read(self, pieces: Iterable[Piece]) -> Iterator[Tensor]:
        for tensor, rows in pieces:
            parts = self._joined.get(tensor.name, (tensor,))
            values = list(read_derived(((part, rows) for part in parts), read_pieces))
            yield values[0] if len(values) == 1 else torch.cat(values, 1)

    def notes(self) -> list[str]:
        """Returns a sentence on each key that is not applied, and on a tokenizer that can not be read."""
        notes = [
            f"its metadata has the key {key}, which is not known and not applied."
            for key in unknown_keys(self.metadata)
        ]
        no_tokenizer = unreadable(self._header.metadata)
        return notes if no_tokenizer is None else [*notes, no_tokenizer]

    def summary(self) -> list[str]:
        """Returns what becomes of what it stores: of blocks of quantised values, and of a drafter's head."""
        counts = Counter(tensor.dtype for tensor in self.tensors().values() if tensor.dtype in READ)
        facts = []
        if counts:
            kinds = ", ".join(f"{count} of {kind}" for kind, count in sorted(counts.items()))
            facts.append(
                f"tensors are stored as quantised blocks ({kinds}): those of {' and '.join(sorted(KINDS))} stay so"
                " where rows are whole pairs of blocks; the others become floating-point numbers, as float32 without a"
                " loss."
            )
        if architecture_of(self.metadata) in DRAFTERS:
            facts.append("GGUF files have no centroid head: the drafter scores the whole vocabulary.")
        return facts

    def copy_companions(self, directory: Path) -> None:
        """Write the tokenizer, its template and the generation config as files of the Hugging Face layout."""
        write_json(directory / GENERATION_FILE, self.generation_config())
        if not self.has_tokenizer:
            return
        tokenizer = self.tokenizer()
        replace_file(directory / "tokenizer.json", lambda partial: tokenizer.raw.save(str(partial)))
        templates: Any = tokenizer.chat_template
        if isinstance(templates, Mapping):
            templates = [{"name": name, "template": text} for name, text in templates.items()]
        written = {**tokenizer.special_tokens, **({} if templates is None else {"chat_template": templates})}
        write_json(directory / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **written})


def gguf_in(directory: Path) -> Path | None:
    """Returns the one GGUF file of a directory, or the first part of it, or None where there is none.

    Left out are the towers' files (`mmproj`), and drafters beside a target. Raises CheckpointError where several are
    left.
    """
    files = sorted(file for file in directory.glob(f"*{SUFFIX}") if not file.name.lower().startswith("mmproj"))
    models = [file for file in files if (part_of_split(file) or ("", 1, 1))[1] == 1]
    if len(models) > 1:
        models = [file for file in models if not _is_drafter(file)]
    if len(models) > 1:
        raise CheckpointError(
            f"{directory} has several GGUF files, {', '.join(file.name for file in models)}; give one of them."
        )
    return models[0] if models else None


def _is_drafter(file: Path) -> bool:
    return read_header(file).metadata.get("general.architecture") in DRAFTERS
