"""Token sequences to train on, and the batches they are drawn in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gemma_mtp.checkpoint.tensor_files import load_tensors, save_tensors
from gemma_mtp.errors import TrainingError

#: sequences of a batch are padded to a multiple of this: few shapes, and whole chunks of attention
PAD_MULTIPLE = 64
#: batches whose sequences are sorted by length before they are dealt out, so that little is padding
SORTED_BATCHES = 16
#: fewer tokens hold no draft: the first row predicts the third token
SHORTEST = 3


@dataclass(frozen=True)
class TokenExample:
    """One sequence. Drafts count from row `first`, for a reader who decodes at `temperature`."""

    tokens: npt.NDArray[np.int32]
    first: int
    temperature: float


@dataclass(frozen=True)
class ExampleSet:
    """Many sequences end to end: tokens int32 [N], bounds int64 [E + 1], firsts int32 [E], temperatures float32 [E]."""

    tokens: npt.NDArray[np.int32]
    bounds: npt.NDArray[np.int64]
    firsts: npt.NDArray[np.int32]
    temperatures: npt.NDArray[np.float32]

    @classmethod
    def of(cls, examples: Iterable[TokenExample]) -> ExampleSet:
        kept = [example for example in examples if len(example.tokens) >= SHORTEST + example.first]
        bounds = np.cumsum([0, *(len(example.tokens) for example in kept)], dtype=np.int64)
        tokens = np.concatenate([example.tokens for example in kept]) if kept else np.zeros(0)
        return cls(tokens.astype(np.int32), bounds, np.array([example.first for example in kept], np.int32),
                   np.array([example.temperature for example in kept], np.float32))  # fmt: skip

    def __len__(self) -> int:
        return len(self.firsts)

    def __getitem__(self, index: int) -> TokenExample:
        tokens = self.tokens[self.bounds[index] : self.bounds[index + 1]]
        return TokenExample(tokens, int(self.firsts[index]), float(self.temperatures[index]))

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        return np.diff(self.bounds)

    def digest(self) -> str:
        """A short name of the content: 16 hexadecimal digits."""
        content = hashlib.sha256()
        for array in (self.tokens, self.bounds, self.firsts, self.temperatures):
            content.update(np.ascontiguousarray(array).tobytes())
        return content.hexdigest()[:16]

    @property
    def written_tokens(self) -> int:
        """Tokens after the beginnings that drafts do not count from: what a model wrote."""
        begun = self.firsts > 0
        return int((self.lengths[begun] - self.firsts[begun] - 1).sum())

    def joined(self, other: ExampleSet) -> ExampleSet:
        """The sequences of both."""
        return ExampleSet(np.concatenate((self.tokens, other.tokens)),
                          np.concatenate((self.bounds, other.bounds[1:] + self.bounds[-1])),
                          np.concatenate((self.firsts, other.firsts)),
                          np.concatenate((self.temperatures, other.temperatures)))  # fmt: skip

    def save(self, path: Path) -> None:
        save_tensors(path, {name: torch.from_numpy(array) for name, array in vars(self).items()})

    @classmethod
    def load(cls, path: Path) -> ExampleSet:
        return cls(**{name: tensor.numpy() for name, tensor in load_tensors(path)[0].items()})


@dataclass(frozen=True)
class Batch:
    """Sequences side by side, padded at their ends: tokens int64 [B, T]."""

    tokens_BT: Tensor
    lengths: tuple[int, ...]
    firsts: tuple[int, ...]
    temperatures: tuple[float, ...]
    indices: tuple[int, ...]

    def rows(self, start: int, stop: int) -> Batch:
        """Sequences start to stop - 1."""
        return Batch(self.tokens_BT[start:stop], self.lengths[start:stop], self.firsts[start:stop],
                     self.temperatures[start:stop], self.indices[start:stop])  # fmt: skip

    def reached(self, steps: int) -> list[int]:
        """Rows that draft step i predicts something for, for each i: the ones with a known token to compare with."""
        spans = list(zip(self.lengths, self.firsts, strict=True))
        return [sum(max(0, length - 2 - i - first) for length, first in spans) for i in range(steps)]


class BatchOrder:
    """Endless batches: a fresh seeded order each epoch; the n-th batch depends on the seed alone."""

    def __init__(self, examples: ExampleSet, batch_size: int, seed: int, pad_multiple: int = PAD_MULTIPLE) -> None:
        if not len(examples):
            raise TrainingError("there is nothing to train on: no sequence has three tokens or more; add text.")
        self.examples, self.batch_size, self.seed, self.pad_multiple = examples, batch_size, seed, pad_multiple
        self.per_epoch = -(-len(examples) // batch_size)
        self._epoch, self._batches = -1, np.zeros((0, batch_size), np.int64)

    def batch(self, step: int) -> Batch:
        """Batch number `step`."""
        epoch, index = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._deal(epoch)
        return self._collate(self._batches[index].tolist())

    def _deal(self, epoch: int) -> npt.NDArray[np.int64]:
        """[per_epoch, batch_size] indices; the last batch is filled up from the beginning of the order."""
        generator, count = np.random.default_rng((self.seed, epoch)), len(self.examples)
        order = np.resize(generator.permutation(count), self.per_epoch * self.batch_size)
        lengths, group = self.examples.lengths, SORTED_BATCHES * self.batch_size
        for start in range(0, len(order), group):
            part = order[start : start + group]
            order[start : start + group] = part[np.argsort(lengths[part], kind="stable")]
        return generator.permutation(order.reshape(self.per_epoch, self.batch_size))

    def _collate(self, indices: Sequence[int]) -> Batch:
        chosen = [self.examples[i] for i in indices]
        lengths = tuple(len(example.tokens) for example in chosen)
        tokens = np.zeros((len(chosen), padded_length(max(lengths), self.pad_multiple)), np.int64)
        for row, example in zip(tokens, chosen, strict=True):
            row[: len(example.tokens)] = example.tokens
        return Batch(torch.from_numpy(tokens), lengths, tuple(example.first for example in chosen),
                     tuple(example.temperature for example in chosen), tuple(indices))  # fmt: skip


def padded_length(length: int, multiple: int = PAD_MULTIPLE) -> int:
    return -(-length // multiple) * multiple
