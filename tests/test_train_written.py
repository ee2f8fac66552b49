"""Text that the target writes: several at once, as it would write each alone, and what is kept of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from models import agreeing_pair

from gemma_mtp.backend.select import make_backend
from gemma_mtp.config.generation import GenerationDefaults
from gemma_mtp.decoding.params import SamplingParams
from gemma_mtp.engine.pair import Pair
from gemma_mtp.training.examples import ExampleSet
from gemma_mtp.training.material import Beginning
from gemma_mtp.training.written import Writing, WrittenStore, write_texts

TEMPERATURES = (0.0, 1.0, 1.0)


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair(make_backend(*agreeing_pair()), None, GenerationDefaults(eos_token_ids=()))


def beginnings(count: int = 12, limit: int = 24) -> list[Beginning]:
    generator = np.random.default_rng(0)
    return [Beginning(generator.integers(5, 60, 3 + i % 7).tolist(), limit, True) for i in range(count)]


def texts(examples: ExampleSet) -> list[tuple[list[int], float]]:
    return [(examples[i].tokens.tolist(), examples[i].temperature) for i in range(len(examples))]


@pytest.mark.parametrize("drafted", [False, True])
def test_texts_written_together_are_those_written_alone(pair: Pair, tmp_path: Path, drafted: bool) -> None:
    writer = pair if drafted else pair.with_drafter(None)
    found = write_texts(writer, beginnings(), Writing(TEMPERATURES, seed=3), tmp_path, "target")
    assert len(found) == 36 and sorted({t for _, t in texts(found)}) == [0.0, 1.0]
    order = np.random.default_rng(3).permutation(12).tolist()
    for place, (tokens, temperature) in enumerate(texts(found)):
        shift, i = place // 12, order[place % 12]
        beginning = beginnings()[i].ids
        params = SamplingParams(temperature=temperature, seed=3 + i + 12 * shift, max_tokens=24 - len(beginning),
                                ignore_eos=True)  # fmt: skip
        assert tokens == beginning + pair.generate(beginning, params, draft_tokens=0).token_ids


def test_a_temperature_given_twice_brings_two_texts(pair: Pair, tmp_path: Path) -> None:
    found = write_texts(pair, beginnings(1, 48), Writing(TEMPERATURES), tmp_path, "target")
    drawn = [tokens for tokens, temperature in texts(found) if temperature]
    assert len(drawn) == 2 and drawn[0] != drawn[1]


def test_writing_stops_at_the_limit_and_goes_on_from_what_is_kept(pair: Pair, tmp_path: Path) -> None:
    told: list[int] = []
    few = write_texts(pair, beginnings(), Writing(TEMPERATURES, max_tokens=100), tmp_path, "target",
                      lambda tokens, share: told.append(tokens))  # fmt: skip
    assert told == sorted(told) and told[-2] < 100 <= told[-1]
    kept = (tmp_path / "written-target.jsonl").read_text().splitlines()
    assert len(kept) == len(few)
    every = write_texts(pair, beginnings(), Writing(TEMPERATURES), tmp_path, "target")
    assert texts(every)[: len(few)] == texts(few)
    stored = (tmp_path / "written-target.jsonl").read_text().splitlines()
    assert stored[: len(kept)] == kept and len(stored) == len(every)


def test_a_store_that_two_runs_wrote_to_keeps_what_is_whole(tmp_path: Path) -> None:
    """Each line by one call, those of others beside it; of a kill or of two lines in each other, the rest."""
    one, other = (WrittenStore(tmp_path / "texts.jsonl") for _ in range(2))
    long = list(range(20_000))
    one.put("a", long)
    other.put("b", [1])
    lines = one.path.read_bytes()
    one.path.write_bytes(b'{"key": "c", "ids": [1]}{"key": "d", "ids": [2]}\n[]\n' + lines + b'{"key": "e", "ids": [1')
    one.put("f", [3])
    again = WrittenStore(one.path)
    assert {key: again.texts.get(key) for key in "abcdef"} == {**dict.fromkeys("cde"), "a": long, "b": [1], "f": [3]}
