"""Checkpoint directories in the official Hugging Face layout: open, check, load, save. safetensors only."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gemma_mtp.config import (
    DrafterConfig,
    TargetConfig,
    drafter_config_to_hf,
    parse_drafter_config,
    parse_target_config,
    target_config_to_hf,
)
from gemma_mtp.errors import CheckpointError
from gemma_mtp.model.drafter import Drafter
from gemma_mtp.model.target import Target
from gemma_mtp.ops.quantise import QuantisedMatrix, Weight
from gemma_mtp.weight_types import WeightTypes, parse_quantization_config, weight_types_to_hf

logger = logging.getLogger("gemma_mtp")

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
#: a file is opened anew after so many bytes, so that the pages mapped for tensors already copied are given back
MAPPED_BYTES = 32 << 20
#: safetensors' names of the dtypes we load, and their size in bytes
FLOAT_DTYPES = {"F32": 4, "BF16": 2, "F16": 2}
INTEGER_DTYPES = {"I64": 8, "I32": 4}
#: safetensors' names of what quantised matrices are stored as
QUANTISED_DTYPES = {torch.int8: "I8", torch.uint8: "U8"}
#: a quantised matrix is stored under the official name, and its scales under the same with this at its end, which no
#: official name has (a router's per_expert_scale comes near)
SCALES = "_scales"

_Model = TypeVar("_Model", Target, Drafter)


@dataclass(frozen=True)
class TensorHeader:
    """What a safetensors header says of one tensor, and the file it is in."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return int(torch.Size(self.shape).numel())

    @property
    def nbytes(self) -> int:
        return self.numel * {**FLOAT_DTYPES, **INTEGER_DTYPES}.get(self.dtype, 1)


@dataclass(frozen=True)
class GenerationDefaults:
    """What a checkpoint's generation_config.json asks for; None where it says nothing."""

    eos_token_ids: tuple[int, ...]
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    suppress_tokens: tuple[int, ...] = ()


def read_target_config(directory: str | Path) -> TargetConfig:
    """The target's configuration. Raises CheckpointError (no such file, malformed) or ConfigError (unusable)."""
    return parse_target_config(read_json(_existing(directory) / "config.json"))


def read_drafter_config(directory: str | Path) -> DrafterConfig:
    """The drafter's configuration. Raises CheckpointError (no such file, malformed) or ConfigError (unusable)."""
    return parse_drafter_config(read_json(_existing(directory) / "config.json"))


def read_config(directory: str | Path) -> TargetConfig | DrafterConfig:
    """Either, by the model_type in the file."""
    raw = read_json(_existing(directory) / "config.json")
    is_drafter = isinstance(raw, dict) and "assistant" in str(raw.get("model_type"))
    return parse_drafter_config(raw) if is_drafter else parse_target_config(raw)


def read_weight_types(directory: str | Path) -> WeightTypes:
    """Which parts are stored quantised. Raises QuantisationError where another tool quantised them."""
    return parse_quantization_config(read_json(_existing(directory) / "config.json").get("quantization_config"))


def read_generation_config(directory: str | Path) -> GenerationDefaults:
    """Sampling defaults and end-of-sequence ids; a missing generation_config.json leaves those of config.json."""
    path = _existing(directory) / "generation_config.json"
    raw = read_json(path) if path.exists() else {}
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} must hold a JSON object, but holds a {type(raw).__name__}.")
    eos = _ids(raw.get("eos_token_id"), path, "eos_token_id")
    return GenerationDefaults(
        eos_token_ids=eos or read_config(directory).text.eos_token_ids,
        temperature=_number(raw, "temperature", path),
        top_k=None if raw.get("top_k") is None else int(_number(raw, "top_k", path) or 0),
        top_p=_number(raw, "top_p", path),
        suppress_tokens=_ids(raw.get("suppress_tokens"), path, "suppress_tokens"),
    )


def read_headers(directory: str | Path) -> dict[str, TensorHeader]:
    """Names, dtypes and shapes of every tensor, from the files' headers alone.

    Raises CheckpointError where there are no safetensors files, or a shard is missing or truncated.
    """
    headers: dict[str, TensorHeader] = {}
    for file in _weight_files(_existing(directory)):
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
                    entry = tensors.get_slice(name)
                    headers[name] = TensorHeader(file, entry.get_dtype(), tuple(entry.get_shape()))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file} can not be read as safetensors ({error}); it is truncated or damaged: copy it again."
            ) from None
    return headers


def stored_dtypes(directory: str | Path) -> set[str]:
    """safetensors' names of the floating dtypes of a checkpoint's text tensors, scales of quantised ones left out."""
    headers = text_headers(read_headers(directory)).items()
    return {header.dtype for name, header in headers if header.dtype in FLOAT_DTYPES and not name.endswith(SCALES)}


def load_target(
    directory: str | Path, dtype: torch.dtype, device: torch.device | str = "cpu", types: WeightTypes | None = None
) -> Target:
    """Load a target's text model in inference mode. Every name and shape is checked before any weight is read.

    `types` says which parts to quantise, piece by piece as they are read; what is stored quantised stays so. Peak
    memory: the weights as they are kept, plus 32 MB of mapped file and as much again where it is quantised. Raises
    CheckpointError, ConfigError or QuantisationError.
    """
    config = read_target_config(directory)
    with torch.device("meta"):
        model = Target(config.text)
    return _load(model, directory, dtype, device, types or WeightTypes())


def load_drafter(
    directory: str | Path, dtype: torch.dtype, device: torch.device | str = "cpu", types: WeightTypes | None = None
) -> Drafter:
    """Load a drafter in inference mode; the rest as in `load_target`."""
    config = read_drafter_config(directory)
    with torch.device("meta"):
        model = Drafter(config)
    drafter = _load(model, directory, dtype, device, types or WeightTypes())
    head = drafter.masked_embedding
    if head is not None:
        expected = torch.arange(config.text.vocab_size, device=head.token_ordering.device)
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
    named = {name.replace("model.", prefix, 1): weight for name, weight in model.checkpoint_tensors().items()}
    _save(named, target_config_to_hf(config), model.weight_types, directory, dtype)


def save_drafter(
    model: Drafter, config: DrafterConfig, directory: str | Path, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write a drafter in the official layout: `model.safetensors` and `config.json`, each renamed into place."""
    _save(model.checkpoint_tensors(), drafter_config_to_hf(config), model.weight_types, directory, dtype)


def read_json(path: Path) -> Any:
    """A JSON file's content. Raises CheckpointError naming the file, and the line where it is malformed."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} has no {path.name}; give a directory in the Hugging Face layout."
        ) from None
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{path} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}."
        ) from None
    except (OSError, ValueError, RecursionError) as error:  # not UTF-8, a number too long, nested too deep
        raise CheckpointError(f"{path} can not be read: {error}.") from None


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file under a temporary name, then rename it into place. Raises CheckpointError."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    replace_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, then rename it to `path`; nothing is left where either fails."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")  # other processes may write the same file
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        partial.replace(path)
    except (SafetensorError, OSError) as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise CheckpointError(f"{path} can not be written: {error}.") from None


def text_headers(headers: Mapping[str, TensorHeader]) -> dict[str, TensorHeader]:
    """The text model's tensors of a possibly multimodal checkpoint, under their text-only names."""
    nested = "model.language_model."
    if not any(name.startswith(nested) for name in headers):
        return dict(headers)
    text = {name.replace(nested, "model.", 1): header for name, header in headers.items() if name.startswith(nested)}
    text.update((name, header) for name, header in headers.items() if name.startswith("lm_head."))
    skipped = [header for name, header in headers.items() if not name.startswith((nested, "lm_head."))]
    if skipped:
        size = sum(header.nbytes for header in skipped) / 1e6
        logger.info("skipped %d tensors (%.1f MB) that text decoding does not use (vision, audio)", len(skipped), size)
    return text


def _existing(directory: str | Path) -> Path:
    path = Path(directory)
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise CheckpointError(f"checkpoint directory {path} {what}; give a directory in the Hugging Face layout.")
    return path


def _weight_files(directory: Path) -> list[Path]:
    index = directory / INDEX_FILE
    if index.exists():
        raw = read_json(index)
        names = raw.get("weight_map") if isinstance(raw, dict) else None
        if not isinstance(names, dict) or not names:
            raise CheckpointError(f"{index} has no 'weight_map' object; restore it from the source.")
        files = [directory / name for name in sorted(set(map(str, names.values())))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise CheckpointError(f"{directory} lacks the shard {missing[0]} named in {INDEX_FILE}; copy it there.")
        return files
    if (directory / SINGLE_FILE).is_file():
        return [directory / SINGLE_FILE]
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in directory.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{directory} holds pickled weights only ({pickles[0]}), which are never loaded because unpickling can run"
            " code; convert them to safetensors."
        )
    raise CheckpointError(f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}; copy the weights there.")


def _load(
    model: _Model, directory: str | Path, dtype: torch.dtype, device: torch.device | str, types: WeightTypes
) -> _Model:
    headers = text_headers(read_headers(directory))
    model = model.to(dtype)
    model.quantise_(read_weight_types(directory))
    stored = stored_tensors(model.checkpoint_tensors())
    check_headers(stored, headers)
    model.quantise_(types)
    model = model.to_empty(device=device)
    views: dict[str, Weight] = {}
    for name, weight in model.checkpoint_tensors().items():
        views |= stored_tensors({name: weight}) if name + SCALES in stored else {name: weight}
    with torch.no_grad():
        for file in sorted({headers[name].file for name in views}):
            _copy_file(file, [name for name in views if headers[name].file == file], views, headers)
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


def check_headers(stored: Mapping[str, Tensor], headers: Mapping[str, TensorHeader]) -> None:
    """Hold a file's tensors against what it should hold. Raises CheckpointError naming the first that does not fit."""
    for name, view in stored.items():
        header = headers.get(name)
        if header is None:
            raise CheckpointError(
                f"the checkpoint has no tensor {name}, which its config.json calls for; restore either from the source."
            )
        if header.shape != tuple(view.shape):
            raise CheckpointError(
                f"{header.file.name} has {name} of shape {list(header.shape)}, but config.json calls for"
                f" {list(view.shape)}; restore either from the source."
            )
        allowed = _allowed_dtypes(view.dtype)
        if header.dtype not in allowed:
            raise CheckpointError(
                f"{header.file.name} stores {name} as {header.dtype}, but {' or '.join(allowed)} was expected;"
                " use an unquantised checkpoint."
            )


def _allowed_dtypes(dtype: torch.dtype) -> Iterable[str]:
    if dtype in QUANTISED_DTYPES:
        return [QUANTISED_DTYPES[dtype]]
    return FLOAT_DTYPES if dtype.is_floating_point else INTEGER_DTYPES


def _copy_file(
    file: Path, names: Iterable[str], views: Mapping[str, Weight], headers: Mapping[str, TensorHeader]
) -> None:
    for batch in _batches(names, headers):
        with safe_open(file, "pt") as tensors:
            for name, rows in batch:
                stored = tensors.get_slice(_stored_name(name, tensors))
                if rows is None:
                    views[name].copy_(stored[...])
                else:
                    views[name][rows].copy_(stored[rows])


def _stored_name(name: str, tensors: Any) -> str:
    nested = name.replace("model.", "model.language_model.", 1)
    return nested if nested in tensors.keys() else name  # noqa: SIM118


def _batches(names: Iterable[str], headers: Mapping[str, TensorHeader]) -> Iterable[list[tuple[str, slice | None]]]:
    """Tensors, and row ranges of tensors that are larger, in groups of at most `MAPPED_BYTES`."""
    batch: list[tuple[str, slice | None]] = []
    size = 0
    for name in names:
        for rows, nbytes in _pieces(headers[name]):
            if size + nbytes > MAPPED_BYTES and batch:
                yield batch
                batch, size = [], 0
            batch.append((name, rows))
            size += nbytes
    yield batch


def _pieces(header: TensorHeader) -> Iterable[tuple[slice | None, int]]:
    """The whole tensor, or ranges of its rows that fit into `MAPPED_BYTES`, with their bytes."""
    if header.nbytes <= MAPPED_BYTES or not header.shape:
        return [(None, header.nbytes)]
    count, row_bytes = header.shape[0], header.nbytes // header.shape[0]
    step = max(1, MAPPED_BYTES // row_bytes)
    starts = range(0, count, step)
    return [(slice(i, min(i + step, count)), (min(i + step, count) - i) * row_bytes) for i in starts]


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


def _ids(raw: Any, path: Path, name: str) -> tuple[int, ...]:
    ids = [] if raw is None else raw if isinstance(raw, list) else [raw]
    if any(not isinstance(i, int) or isinstance(i, bool) for i in ids):
        raise CheckpointError(f"{path} has {name} = {raw!r}, but a token id or a list of them was expected.")
    return tuple(ids)


def _number(raw: Mapping[str, Any], name: str, path: Path) -> float | None:
    value = raw.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise CheckpointError(f"{path} has {name} = {value!r}, but a number was expected.")
    return value
