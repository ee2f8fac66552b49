"""Writes targets and drafters as directories in the Hugging Face layout, for programs that read these.

Everything that is no part of the text model goes along as it is: towers, tokenizer, chat template, generation config.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma_mtp.checkpoint.derived import rounded_products
from gemma_mtp.checkpoint.experts import separate_modules
from gemma_mtp.checkpoint.load import planned_model
from gemma_mtp.checkpoint.names import OUTSIDE_TEXT
from gemma_mtp.checkpoint.open import open_source
from gemma_mtp.checkpoint.origin import origin_of
from gemma_mtp.checkpoint.pieces import TORCH_DTYPES
from gemma_mtp.checkpoint.read import Contents, read_config, read_contents, report
from gemma_mtp.checkpoint.save import stored_name, write_shards
from gemma_mtp.checkpoint.source import INTEGER_DTYPES, Location, OnBytes, Source
from gemma_mtp.checkpoint.tensors import nobody, read_values, values_of_both
from gemma_mtp.config import TargetConfig, config_to_hf
from gemma_mtp.config.generation import FILE as GENERATION_FILE
from gemma_mtp.errors import CheckpointError, QuantisationError
from gemma_mtp.files.headers import StoredTensor
from gemma_mtp.files.replace import new_directory, replace_text
from gemma_mtp.interop.card import CARD, card
from gemma_mtp.interop.packings import EXPERTS, PACKINGS, Packing
from gemma_mtp.json_files import write_json

WEIGHT = ".weight"
OFFICIAL = "model."
#: the largest error that becoming another dtype of floats leaves
ROUNDING = 0.005


@dataclass
class Changed:
    """What became of values that were written: of `values` numbers, `changed` are not what they were, rounded to the
    dtype that they were in; `error` is the root of their mean square error, relative to the values'."""

    values: int = 0
    changed: int = 0
    squares: float = 0.0
    errors: float = 0.0

    @property
    def error(self) -> float:
        return (self.errors / self.squares) ** 0.5 if self.squares else float(self.errors > 0)

    def count(self, before: Tensor, after: Tensor) -> None:
        wide, made = before.double(), after.double()
        self.values += before.numel()
        self.changed += int((after.to(before.dtype) != before).sum())
        self.squares += float(wide.square().sum())
        self.errors += float((wide - made).square().sum())

    def add(self, other: Changed) -> None:
        self.values += other.values
        self.changed += other.changed
        self.squares += other.squares
        self.errors += other.errors


@dataclass(frozen=True)
class Written:
    """A directory that was written: matrices packed and not, bytes of its weights, what packing changed, and a sentence
    on each thing that it does not hold as it was."""

    packed: int
    floats: int
    nbytes: int
    changed: Changed
    losses: list[str]


def export_directory(
    location: Location,
    out: str | Path,
    to: str = "safetensors",
    kind: str = "BF16",
    *,
    tokenizer: Location | None = None,
    strict: bool = False,
    on_bytes: OnBytes = nobody,
    on_checked: OnBytes = nobody,
) -> Written:
    """Write a target or a drafter to the new directory `out`, as the type `kind` of the format `to` (`PACKINGS`).

    `tokenizer`: a checkpoint whose tokenizer goes along, for a drafter that has none. Weights are read and written
    piece by piece, then read again and held against what they were: nothing is left where that fails. `on_bytes` and
    `on_checked` are told of either how many bytes of the source are done, and of how many. `strict` refuses what is
    lost. Raises CheckpointError, ConfigError, QuantisationError or TokenizerError.
    """
    packing = _packing(to, kind)
    source = open_source(location)
    contents: Contents[Any] = read_contents(source, read_config(source))
    if contents.types:
        raise QuantisationError(f"{source.path} is quantised already; export the checkpoint that it was made of.")
    odd = [
        f"{name} of {list(header.shape)}" for name, header in contents.headers.items()
        if packing.experts_apart and len(header.shape) > 2 and not packing.fits(name, header.shape)
    ]  # fmt: skip
    if odd:
        raise QuantisationError(
            f"{source.path} has {odd[0]}, but {kind} packs experts whose rows are whole groups; choose another type, or"
            " export to gguf or mlx."
        )
    planned_model(source, contents, torch.float32, None)  # what is missing or of another shape is said first
    report(location, contents.notes, strict)
    towers, left = _towers(contents)
    with new_directory(Path(out)) as directory:
        plan = _Plan(source, contents, packing, towers)
        write_shards(directory, plan.layout, plan.values(on_bytes))
        write_json(directory / "config.json", _config(source, contents, packing, plan.kept_modules))
        if tokenizer is not None:
            open_source(tokenizer).copy_companions(directory)
            (directory / GENERATION_FILE).unlink(missing_ok=True)  # of the other checkpoint
        source.copy_companions(directory)
        changed = _checked(plan, directory, on_checked)
        losses = [*left, *activation_losses(contents), *_losses(changed, kind)]
        report(location, losses, strict)
        nbytes = sum(shape.numel() * dtype.itemsize for dtype, shape in plan.layout.values())
        matrices = sum(len(plan.matrices(name, contents.headers[name].shape)) for name in plan.packed)
        made = Written(matrices, len(contents.headers) - len(plan.packed), nbytes, changed["packed"], losses)
        of_target = isinstance(contents.config, TargetConfig)
        replace_text(directory / CARD, card(origin_of(source.path), to, kind, of_target, losses))
    return made


def _packing(to: str, kind: str) -> Packing:
    kinds = PACKINGS[to]
    if kind not in kinds:
        raise QuantisationError(f"type {kind!r} can not be written as {to}; use one of {', '.join(kinds)}.")
    return kinds[kind]


class _Plan:
    """What is written of a checkpoint: the layout of the files, and their tensors' values as they come."""

    def __init__(self, source: Source, contents: Contents[Any], packing: Packing, towers: list[StoredTensor]) -> None:
        self.source, self.contents, self.packing = source, contents, packing
        self.towers = {header.name: header for header in towers}
        named = {stored_name(name, contents.config): name for name in contents.headers}
        self.modules = {name: named_as.removesuffix(WEIGHT) for named_as, name in named.items()}
        self.packed = {
            name for name, header in contents.headers.items()
            if name.endswith((WEIGHT, *EXPERTS)) and packing.fits(self.modules[name], header.shape)
        }  # fmt: skip
        self.kept_modules = [
            self.modules[name] for name, header in contents.headers.items()
            if name not in self.packed and len(header.shape) == 2
        ] + [name.removesuffix(WEIGHT) for name, header in self.towers.items() if len(header.shape) == 2]  # fmt: skip
        self.layout = {
            stored: described
            for name, header in contents.headers.items()
            for stored, described in self._of(name, header)
        } | {name: (TORCH_DTYPES[header.dtype], torch.Size(header.shape)) for name, header in self.towers.items()}

    def _of(self, name: str, header: StoredTensor) -> list[tuple[str, tuple[torch.dtype, torch.Size]]]:
        if name in self.packed:
            return [
                item for module, shape in self.matrices(name, header.shape)
                for item in self.packing.layout(module, shape).items()
            ]  # fmt: skip
        dtype = TORCH_DTYPES[header.dtype] if header.dtype in INTEGER_DTYPES else self.packing.dtype
        return [(stored_name(name, self.contents.config), (dtype, torch.Size(header.shape)))]

    def _apart(self, shape: Sequence[int]) -> bool:
        return self.packing.experts_apart and len(shape) > 2

    def matrices(self, name: str, shape: Sequence[int]) -> list[tuple[str, Sequence[int]]]:
        """Returns the modules that a packed tensor is written as, and the shape of each: itself, or every expert's."""
        module = self.modules[name]
        if not self._apart(shape):
            return [(module, shape)]
        experts, rows, columns = shape
        names = [separate_modules(module, expert) for expert in range(experts)]
        return [(part, (rows // len(parts), columns)) for parts in names for part in parts]

    def _rows(self, name: str, first: int, value: Tensor) -> Iterator[tuple[str, int, Tensor]]:
        """The modules that some rows of a packed tensor belong to, with the first of their own rows, and these."""
        module = self.modules[name]
        if not self._apart(value.shape):
            yield module, first, value
            return
        for expert, rows in enumerate(value, first):
            parts = separate_modules(module, expert)
            for part, own in zip(parts, rows.chunk(len(parts)), strict=True):
                yield part, 0, own

    def values(self, on_bytes: OnBytes) -> Iterator[tuple[str, int, Tensor]]:
        """Yields the name of a tensor of the layout, the first of the rows that follow, and these."""
        headers = self.contents.headers
        for name, rows, value in read_values(self.source, headers, headers, {}, on_bytes):
            first = 0 if rows is None else rows.start
            if name not in self.packed:
                stored = stored_name(name, self.contents.config)
                yield stored, first, value.to(self.layout[stored][0])
                continue
            if not first:
                for module, shape in self.matrices(name, headers[name].shape):
                    for stored, constant in self.packing.constants(module, shape).items():
                        yield stored, 0, constant
            for module, at, own in self._rows(name, first, value):
                for stored, part in self.packing.packed(module, own).items():
                    yield stored, at, part
        for name, rows, value in read_values(self.source, self.towers, self.towers, {}):
            yield name, 0 if rows is None else rows.start, value


def activation_losses(contents: Contents[Any]) -> list[str]:
    """Returns a sentence where a checkpoint rounds activations, which no format that is written does."""
    if not rounded_products(contents.headers.values()):
        return []
    return ["the static scales that it rounds activations by are not written: what reads it does not round them."]


def _towers(contents: Contents[Any]) -> tuple[list[StoredTensor], list[str]]:
    """What belongs to images and sound and can go along, and a sentence on what can not."""
    outside = [header for header in contents.unused if OUTSIDE_TEXT & set(header.name.split("."))]
    kept = [header for header in outside if header.name.startswith(OFFICIAL) and header.dtype in TORCH_DTYPES]
    if len(kept) == len(outside):
        return kept, []
    return [], [f"its {len(outside)} tensors for images and sound are not written: they are not named as officially."]


def _config(source: Source, contents: Contents[Any], packing: Packing, kept: list[str]) -> dict[str, Any]:
    config = contents.config
    config_to_hf(config)  # or refused
    raw = dict(source.config())
    if raw.get("tie_word_embeddings", config.text.tie_word_embeddings) != config.text.tie_word_embeddings:
        raw["tie_word_embeddings"] = config.text.tie_word_embeddings  # the weights decided otherwise
    return {**raw, "dtype": str(packing.dtype).removeprefix("torch."), **packing.config(kept)}


def _checked(plan: _Plan, directory: Path, on_checked: OnBytes) -> dict[str, Changed]:
    """Read what was written, and return what became of packed matrices ("packed") and of all else ("floats").

    Raises CheckpointError where the model is another one, or a tensor further off than its type's rounding.
    """
    written, contents = open_source(directory), plan.contents
    read = read_contents(written, read_config(written))
    if read.config != contents.config:
        raise CheckpointError(f"{plan.source.path} would be read as another model than it is; please report this.")
    planned_model(written, read, torch.float32, None)
    whole, done, total = {"packed": Changed(), "floats": Changed()}, 0, sum(h.nbytes for h in contents.headers.values())
    for name, header in contents.headers.items():
        of_one, is_packed = Changed(), name in plan.packed
        for before, after in values_of_both(plan.source, header, written, read.headers[name]):
            of_one.count(before, after)
        done += header.nbytes
        on_checked(done, total)
        if not of_one.error <= (plan.packing.worst if is_packed else ROUNDING):  # an infinite one is not a number
            raise CheckpointError(
                f"{name} is off by {of_one.error:.3g} of its size once written; its values are out of the type's range,"
                " or the disk is at fault: choose another type, or try again."
            )
        whole["packed" if is_packed else "floats"].add(of_one)
    return whole


def _losses(changed: dict[str, Changed], kind: str) -> list[str]:
    """A sentence on each thing that is not written as it was."""
    floats, packed = changed["floats"], changed["packed"]
    losses = []
    if packed.changed:
        losses.append(
            f"{packed.changed:,} of {packed.values:,} values of its matrices changed in becoming {kind}"
            f" (relative error {packed.error:.4f})."
        )
    if floats.changed:
        which = "other values" if packed.values else "values"
        losses.append(f"{floats.changed:,} of {floats.values:,} {which} were rounded (error {floats.error:.1e}).")
    return losses
