"""A bounded part of what tools/fuzz_checkpoints.py runs for as long as one likes: only typed errors come of damage."""

import logging
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzz_checkpoints import Fuzzer
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.fixture(autouse=True)
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is logged of damaged names may have halves of characters, which pytest-xdist can not send on."""
    monkeypatch.setattr(logging.getLogger("gemma_mtp"), "disabled", True)


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzer]:
    fuzzer = Fuzzer(tmp_path_factory.mktemp("fuzz"), memory_mb=500)
    yield fuzzer
    fuzzer.close()


def test_the_sound_ones_are_read(fuzzer: Fuzzer) -> None:
    """Else nothing behind the first bytes would be tried."""
    loaded = {kind for kind in fuzzer.seeds.files if kind == "adapter" or kind.startswith("drafter")}
    assert fuzzer.sound() == {kind: "loaded" if kind in loaded else "decoded" for kind in fuzzer.seeds.files}


@pytest.mark.parametrize("count", [120, pytest.param(5000, marks=pytest.mark.slow)])
def test_damage_gives_typed_errors(fuzzer: Fuzzer, count: int) -> None:
    before = sum(fuzzer.counts.values())
    for number in range(count):
        fuzzer.one(random.Random(number).randint)
    assert fuzzer.findings == {}
    assert sum(fuzzer.counts.values()) == before + count
    assert {what.split(": ")[1] for what in fuzzer.counts} >= {"decoded", "CheckpointError", "ConfigError"}


@settings(max_examples=40)
@given(st.data())
def test_damage_that_hypothesis_draws(fuzzer: Fuzzer, data: st.DataObject) -> None:
    fuzzer.one(lambda least, most: data.draw(st.integers(least, most)))
    assert fuzzer.findings == {}


def test_a_finding_is_seen(fuzzer: Fuzzer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The control: a reader that lets a plain error out."""

    def broken(*_: object) -> None:
        raise KeyError("x")

    monkeypatch.setattr("fuzz_checkpoints.open_source", broken)
    other = Fuzzer(tmp_path, memory_mb=500)
    for number in range(4):
        other.one(random.Random(number).randint)
    other.close()
    assert any(name.startswith("KeyError at test_fuzz_checkpoints.py") for name in other.findings)
    assert (tmp_path / "finding-1.json").exists()
