"""From a data set to what training needs: texts as they stand, beginnings for the target to go on from, and prompts
held out for the gate."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gemma_mtp.datasets import Example, check_token_ids
from gemma_mtp.errors import DataError, TrainingError
from gemma_mtp.measure.acceptance import Prompt
from gemma_mtp.tokenizer import Tokenizer
from gemma_mtp.training.examples import SHORTEST, ExampleSet, TokenExample

#: fewer documents are held out in pieces, more of them whole
FEW_DOCUMENTS = 20
HELD_OUT_PROMPTS = 24
#: most of the data that may be held out
HELD_OUT_SHARE = 0.2
#: a held-out text's beginning
PROMPT_TOKENS = 128
#: shares of a text that the target is given to go on from, in turn
BEGINNINGS = (0.25, 0.4375, 0.625)


@dataclass(frozen=True)
class Unit:
    """A text of at most one row, or a prompt. `prompt_length` tokens are not the model's to write; None: a document,
    of which any beginning may be gone on from. `open`: the rest is not there yet."""

    origin: str
    task: str
    ids: list[int]
    prompt_length: int | None
    open: bool = False


@dataclass(frozen=True)
class Beginning:
    """Token ids for the target to go on from, up to `limit` tokens in all, past an end of text for documents."""

    ids: list[int]
    limit: int
    past_end: bool


@dataclass(frozen=True)
class Material:
    """Units to train on, and prompts that training must not see."""

    units: list[Unit]
    held_out: list[Prompt]

    def as_is(self, temperatures: Sequence[float]) -> ExampleSet:
        """The texts as they stand, to be drafted at the temperatures in turn."""
        closed = [unit for unit in self.units if not unit.open]
        return ExampleSet.of(
            TokenExample(np.array(unit.ids, np.int32), max(0, (unit.prompt_length or 1) - 1),
                         temperatures[i % len(temperatures)])
            for i, unit in enumerate(closed)
        )  # fmt: skip

    def beginnings(self, length: int, max_new_tokens: int) -> list[Beginning]:
        """What the target is to go on from, for every unit."""
        found = []
        for i, unit in enumerate(self.units):
            if unit.prompt_length is None:
                count = max(1, int(len(unit.ids) * BEGINNINGS[i % len(BEGINNINGS)]))
                found.append(Beginning(unit.ids[:count], length, True))
            else:
                limit = min(length, unit.prompt_length + max_new_tokens)
                found.append(Beginning(unit.ids[: unit.prompt_length], limit, False))
        return found


def gather(examples: Iterable[Example], tokenizer: Tokenizer, vocab_size: int, length: int) -> list[Unit]:
    """Tokenise, cut documents into rows of `length`, and drop repeats.

    Raises DataError naming file and line for prompts and conversations that leave no room in a row, and for token ids
    outside the vocabulary.
    """
    return list(_distinct(unit for example in examples for unit in _units(example, tokenizer, vocab_size, length)))


def _units(example: Example, tokenizer: Tokenizer, vocab_size: int, length: int) -> Iterator[Unit]:
    if example.kind == "text":
        ids = example.token_ids(tokenizer, vocab_size=vocab_size)
        yield from (Unit(example.origin, example.task, part, None) for part in rows_of(ids, tokenizer, length))
        return
    prompt = example.token_ids(tokenizer, vocab_size=vocab_size)
    room = length - SHORTEST
    if len(prompt) > room:
        raise DataError(
            f"{example.origin} has {len(prompt)} tokens before the model's turn, but a row of {length} tokens leaves"
            f" room for {room}; shorten it, or raise --length."
        )
    answered = _answered(example, tokenizer)
    if answered is None:
        yield Unit(example.origin, example.task, prompt, len(prompt), open=True)
        return
    check_token_ids(answered, example.origin, vocab_size, length)
    yield Unit(example.origin, example.task, answered, min(len(prompt), len(answered)))


def _answered(example: Example, tokenizer: Tokenizer) -> list[int] | None:
    """The ids of a conversation with the assistant's last turn, or None where it has none."""
    if example.kind != "messages" or example.content[-1]["role"] not in ("assistant", "model"):  # type: ignore[index]
        return None
    return tokenizer.encode_chat(example.content, add_generation_prompt=False)  # type: ignore[arg-type]


def rows_of(ids: list[int], tokenizer: Tokenizer, length: int) -> Iterator[list[int]]:
    """A document in rows of at most `length` tokens, each with the beginning that the tokenizer gives to a text."""
    start = tokenizer.encode("")
    body = ids[len(start) :] if ids[: len(start)] == start else ids
    size = length - len(start)
    for first in range(0, len(body), size):
        if len(body) - first >= SHORTEST:
            yield start + body[first : first + size]


def _distinct(units: Iterable[Unit]) -> Iterator[Unit]:
    seen: set[bytes] = set()
    for unit in units:
        digest = _digest(unit)
        if digest not in seen:
            seen.add(digest)
            yield unit


def _digest(unit: Unit) -> bytes:
    return hashlib.sha256(np.array(unit.ids, np.int32).tobytes()).digest()


def hold_out(units: list[Unit], prompts: int = HELD_OUT_PROMPTS) -> Material:
    """Hold out `prompts` units, or a fifth of what there is if that is less, chosen by a hash of their content; of many
    documents whole ones, so that no text next to a held-out one is trained on. Raises TrainingError for too little."""
    documents: dict[str, list[Unit]] = {}
    for unit in units:
        documents.setdefault(unit.origin, []).append(unit)
    groups = list(documents.values()) if len(documents) >= FEW_DOCUMENTS else [[unit] for unit in units]
    groups.sort(key=lambda group: _digest(group[0]))
    count = min(prompts, int(len(groups) * HELD_OUT_SHARE))
    if count < 2:
        raise TrainingError(
            f"the data has {len(groups)} distinct texts, of which a fifth is held out to measure acceptance, at least"
            " 2; give at least 10, or --held-out with other data."
        )
    held = groups[:count]
    out = {id(unit) for group in held for unit in group}
    return Material([unit for unit in units if id(unit) not in out], [prompt_of(group[0]) for group in held])


def prompt_of(unit: Unit) -> Prompt:
    """The beginning of a unit, to be gone on from when acceptance is measured."""
    known = unit.prompt_length
    length = min(PROMPT_TOKENS, max(2, len(unit.ids) // 2)) if known is None else known
    return Prompt(f"{unit.origin} {_digest(unit).hex()[:8]}", unit.ids[:length], unit.task)
