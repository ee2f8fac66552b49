"""Text written by the target itself, in the engine: what a drafter meets when it decodes. Kept on disk and taken up
again: a text depends on the target, its beginning, its settings and its seed alone."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gemma_mtp.checkpoint import Location, open_source
from gemma_mtp.checkpoint.adapter import Adapter
from gemma_mtp.decoding.draft_length import DraftTokens
from gemma_mtp.decoding.params import SamplingParams
from gemma_mtp.engine.pair import Pair
from gemma_mtp.engine.request import Generation, Request
from gemma_mtp.engine.settings import EngineSettings
from gemma_mtp.engine.thread import EngineThread
from gemma_mtp.errors import TrainingError
from gemma_mtp.training.examples import ExampleSet, TokenExample
from gemma_mtp.training.material import Beginning

#: samples of a weight file that its fingerprint is made of, and their bytes
SAMPLES, SAMPLE_BYTES = 64, 65536
#: texts that are looked up or submitted before the first of them is waited for: twice what the engine runs at once
TEXTS_AHEAD = 32


@dataclass(frozen=True)
class Writing:
    """How the target writes. Text is written until there are `max_tokens` new ones or every beginning was gone on from
    at every temperature."""

    temperatures: tuple[float, ...]
    top_k: int = 0
    top_p: float = 1.0
    max_tokens: int = 400_000
    seed: int = 0


def write_texts(
    pair: Pair, beginnings: Sequence[Beginning], writing: Writing, cache: Path, fingerprint: str,
    on_text: Callable[[int, float], object] = lambda tokens, share: None,
) -> ExampleSet:  # fmt: skip
    """Let the target go on from `beginnings`. Texts that lie in `cache` already are taken from there.

    `on_text` is told the new tokens so far, and the share that is done of the tokens or of the texts, whichever ends
    first. Raises TrainingError where the cache can not be written.
    """
    store = WrittenStore(cache / f"written-{fingerprint}.jsonl")
    examples: list[TokenExample] = []
    tokens = 0
    with EngineThread(pair, _engine_settings(pair, beginnings)) as engine:
        for beginning, params, ids in _written(engine, store, _plan(beginnings, writing)):
            tokens += len(ids)
            sequence = np.array([*beginning.ids, *ids], np.int32)
            examples.append(TokenExample(sequence, len(beginning.ids) - 1, params.temperature))
            texts = len(examples) / (len(beginnings) * len(writing.temperatures))
            on_text(tokens, max(texts, tokens / writing.max_tokens))
            if tokens >= writing.max_tokens:
                break
    return ExampleSet.of(examples)


def _engine_settings(pair: Pair, beginnings: Sequence[Beginning]) -> EngineSettings:
    context = pair.target.config.max_position_embeddings
    longest = max((beginning.limit for beginning in beginnings), default=context)
    return EngineSettings(max_tokens=min(context, longest + 1), prefix_reuse=False)


def _written(
    engine: EngineThread, store: WrittenStore, plan: Iterator[tuple[Beginning, SamplingParams]]
) -> Iterator[tuple[Beginning, SamplingParams, list[int]]]:
    """The plan's texts in its order, from the store or written: several at once, which changes no text. Those that are
    under way when the reader leaves are cancelled as the engine stops."""
    drafts: DraftTokens = 0 if engine.pair.drafter is None else "auto"
    ahead: deque[tuple[Beginning, SamplingParams, list[int] | Generation]] = deque()

    def first() -> tuple[Beginning, SamplingParams, list[int]]:
        beginning, params, text = ahead.popleft()
        if isinstance(text, Generation):
            text = text.wait().token_ids
            store.put(_key(beginning, params), text)
        return beginning, params, text

    for beginning, params in plan:
        kept = store.texts.get(_key(beginning, params))
        text = engine.submit(Request(beginning.ids, params, drafts)) if kept is None else kept
        ahead.append((beginning, params, text))
        if len(ahead) == TEXTS_AHEAD:
            yield first()
    while ahead:
        yield first()


def _plan(beginnings: Sequence[Beginning], writing: Writing) -> Iterator[tuple[Beginning, SamplingParams]]:
    """Every beginning once, at the temperatures in turn, in a seeded order; then all again, each at its next one and
    with another seed, lest a temperature that is given twice brings the same text twice."""
    order = np.random.default_rng(writing.seed).permutation(len(beginnings)).tolist()
    for shift in range(len(writing.temperatures)):
        for place, index in enumerate(order):
            beginning = beginnings[index]
            yield beginning, SamplingParams(
                temperature=writing.temperatures[(place + shift) % len(writing.temperatures)],
                top_k=writing.top_k, top_p=writing.top_p, seed=writing.seed + index + shift * len(beginnings),
                max_tokens=beginning.limit - len(beginning.ids), ignore_eos=beginning.past_end,
            )  # fmt: skip


def _key(beginning: Beginning, params: SamplingParams) -> str:
    settings = [params.temperature, params.top_k, params.top_p, params.seed, params.max_tokens, params.ignore_eos]
    return hashlib.sha256(json.dumps([beginning.ids, settings]).encode()).hexdigest()[:32]


class WrittenStore:
    """A file of lines {"key", "ids"}, appended to as texts are written, by several runs too. A line that was cut off by
    a kill, or that the end of another got into, is none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.texts: dict[str, list[int]] = {}
        if path.exists():
            for line in path.read_bytes().split(b"\n"):
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    entry = json.loads(line)
                    self.texts[entry["key"]] = entry["ids"]

    def put(self, key: str, ids: list[int]) -> None:
        line = json.dumps({"key": key, "ids": ids})
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b", buffering=0) as file:  # a line at once, lest another run's comes into it
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - 1))
                cut_off = file.read(1) not in (b"", b"\n")
                file.write((b"\n" if cut_off else b"") + f"{line}\n".encode())
        except OSError as error:
            raise TrainingError(
                f"{self.path} can not be written: {error}; make room, then go on with the same command."
            ) from None


def fingerprint(target: Location, adapter: Path | None = None) -> str:
    """A short name of a checkpoint's weights and the adapter's, from samples of their files: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    files = sorted({header.file for header in open_source(target).tensors().values()})
    for path in [*files, *([] if adapter is None else Adapter(adapter).files)]:
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            for i in range(SAMPLES):
                file.seek(i * max(0, size - SAMPLE_BYTES) // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]
