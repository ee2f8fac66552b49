"""Measured round costs, and the cache that keeps them: what its key tells apart, and that it never breaks a run."""

# mypy: disable-error-code="func-returns-value"

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from models import agreeing_pair, native_only, random_drafter, random_target

from gemma_mtp.backend import processor as processor_module
from gemma_mtp.backend.cpu import CpuBackend
from gemma_mtp.backend.native import native_available, set_threads
from gemma_mtp.backend.reference import ReferenceBackend
from gemma_mtp.backend.select import make_backend
from gemma_mtp.cpu_clock import CpuClock
from gemma_mtp.decoding.params import SamplingParams
from gemma_mtp.decoding.round_costs import LONGEST, RoundCosts
from gemma_mtp.engine import cost_cache, costs
from gemma_mtp.engine.cost_cache import Key, cache_directory, cost_key, load_costs, store_costs
from gemma_mtp.engine.costs import measure_costs, round_costs
from gemma_mtp.engine.pair import load_pair

KEY: Key = {"processor": "one", "threads": 2}
COSTS = RoundCosts({0: 0.001, 4: 0.0013, LONGEST: 0.0021}, {1: 0.00006, 4: 0.00021})


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GEMMA_MTP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(CpuClock, "share_elsewhere", lambda self: 0.0)
    return tmp_path / "cache"


def the_file(directory: Path) -> Path:
    (path,) = directory.iterdir()
    return path


def test_costs_come_back_as_they_were_stored(tmp_path: Path) -> None:
    directory = tmp_path / "deep" / "cache"
    assert load_costs(directory, KEY) is None
    store_costs(directory, KEY, COSTS)
    loaded = load_costs(directory, KEY)
    assert loaded is not None and loaded.seconds == pytest.approx(COSTS.seconds)
    assert loaded.drafting == pytest.approx(COSTS.drafting)
    assert load_costs(directory, {**KEY, "threads": 3}) is None
    assert the_file(directory).name.startswith("costs-"), "nothing temporary is left"


@pytest.mark.parametrize(
    ("said", "name"),
    [("processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n\nprocessor\t: 1\nmodel\t\t: 9\n",
      "AMD EPYC, family 25, model 17, "),
     ("processor\t: 0\nmodel name\t: Cortex: A7\n\n", "Cortex: A7, "),
     ("processor\t: 0\n\n", "riscv64, "), (None, "riscv64, ")],
)  # fmt: skip
def test_processors_of_one_name_are_told_apart(monkeypatch: pytest.MonkeyPatch, said: str | None, name: str) -> None:
    def read(path: Path, encoding: str) -> str:
        if path != Path("/proc/cpuinfo") or said is None:
            raise FileNotFoundError
        return said

    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr("gemma_mtp.backend.processor.platform.processor", lambda: "")
    monkeypatch.setattr("gemma_mtp.backend.processor.platform.machine", lambda: "riscv64")
    assert processor_module.processor(torch.device("cpu")) == f"{name}{len(os.sched_getaffinity(0))} cores"


DAMAGE = {
    "empty": "", "not JSON": "{", "another type": "[1, 2]", "no costs": json.dumps({"version": 1, "key": KEY}),
    "deep": "[" * 100_000,
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(DAMAGE))
def test_a_damaged_file_counts_for_nothing(name: str, tmp_path: Path) -> None:
    store_costs(tmp_path, KEY, COSTS)
    the_file(tmp_path).write_text(DAMAGE[name])
    assert load_costs(tmp_path, KEY) is None
    store_costs(tmp_path, KEY, COSTS)
    assert load_costs(tmp_path, KEY) is not None, "and is replaced"


@pytest.mark.parametrize(
    "change",
    [{"version": 0}, {"key": {}}, {"seconds": COSTS.seconds[:-1]}, {"seconds": [*COSTS.seconds[:-1], -1.0]},
     {"seconds": [*COSTS.seconds[:-1], float("nan")]}, {"seconds": [*COSTS.seconds[:-1], "1"]}, {"seconds": 3},
     {"drafting": [-1.0, *COSTS.drafting[1:]]}, {"drafting": COSTS.drafting[:-1]}, {"drafting": None}],
)  # fmt: skip
def test_values_that_are_not_what_they_should_be_count_for_nothing(change: dict[str, object], tmp_path: Path) -> None:
    store_costs(tmp_path, KEY, COSTS)
    path = the_file(tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert load_costs(tmp_path, KEY) is None


def test_bytes_that_are_no_text_count_for_nothing(tmp_path: Path) -> None:
    store_costs(tmp_path, KEY, COSTS)
    the_file(tmp_path).write_bytes(b"\xff\xfe\x00")
    assert load_costs(tmp_path, KEY) is None


def test_old_costs_are_measured_anew(tmp_path: Path) -> None:
    store_costs(tmp_path, KEY, COSTS)
    old = time.time() - cost_cache.MAX_AGE_SECONDS - 10
    os.utime(the_file(tmp_path), (old, old))
    assert load_costs(tmp_path, KEY) is None


def test_many_writers_leave_one_whole_file(tmp_path: Path) -> None:
    threads = [
        threading.Thread(target=lambda: [store_costs(tmp_path, KEY, COSTS) for _ in range(20)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        loaded = load_costs(tmp_path, KEY)
        assert loaded is None or loaded.seconds == pytest.approx(COSTS.seconds)
    assert the_file(tmp_path)


def test_a_place_that_can_not_be_written_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("no directory")
    store_costs(blocked / "cache", KEY, COSTS)
    assert load_costs(blocked / "cache", KEY) is None

    def refuse(self: Path, target: Path) -> None:
        raise PermissionError(13, "read-only")

    monkeypatch.setattr(Path, "replace", refuse)
    store_costs(tmp_path / "cache", KEY, COSTS)
    assert list((tmp_path / "cache").iterdir()) == [], "no temporary file stays"


def test_the_directory_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMMA_MTP_CACHE", "0")
    assert cache_directory() is None
    monkeypatch.setenv("GEMMA_MTP_CACHE", str(tmp_path / "own"))
    assert cache_directory() == tmp_path / "own"
    monkeypatch.delenv("GEMMA_MTP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "gemma-mtp"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the specification says to ignore it
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_directory() == tmp_path / "home" / ".cache" / "gemma-mtp"


def test_the_key_tells_pairs_and_ways_to_run_them_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    target, drafter = agreeing_pair()
    key = cost_key(ReferenceBackend(target, drafter))
    assert key == cost_key(ReferenceBackend(*agreeing_pair(7))), "weights of the same geometry cost the same"
    others = [
        cost_key(ReferenceBackend(target, drafter), "drawn"),
        cost_key(ReferenceBackend(target, random_drafter(centroids=True))),
        cost_key(ReferenceBackend(target.bfloat16(), drafter)),
        cost_key(ReferenceBackend(agreeing_pair()[0], drafter.bfloat16())),
    ]
    threads = torch.get_num_threads()
    set_threads(threads + 1)
    others.append(cost_key(ReferenceBackend(*agreeing_pair())))
    set_threads(threads)
    if native_available():
        others.append(cost_key(CpuBackend(*agreeing_pair())))
    monkeypatch.setattr(torch, "__version__", "0.0")
    others.append(cost_key(ReferenceBackend(*agreeing_pair())))
    assert len({json.dumps(each, sort_keys=True) for each in [key, *others]}) == len(others) + 1


@native_only
def test_the_key_tells_weight_types_apart() -> None:
    keys = []
    for quantize in (None, "int8", "int4"):
        pair = load_pair(quantize=quantize)
        assert pair.drafter is not None
        keys.append(cost_key(pair.backend))
    assert len({key["target"] for key in keys}) == 3
    assert len({key["drafter"] for key in keys}) == 3


def test_the_key_is_the_same_in_every_process() -> None:
    imports = (
        "from models import agreeing_pair; from gemma_mtp.engine.cost_cache import cost_key;"
        " from gemma_mtp.backend.reference import ReferenceBackend;"
        " from gemma_mtp.backend.native import set_threads"
    )
    threads = torch.get_num_threads()  # part of the key
    command = [
        sys.executable,
        "-c",
        f"{imports}; set_threads({threads}); print(cost_key(ReferenceBackend(*agreeing_pair())))",
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "PYTHONHASHSEED": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=True, timeout=300)
    assert ran.stdout.strip() == str(cost_key(ReferenceBackend(*agreeing_pair())))


def test_costs_are_measured_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = make_backend(*agreeing_pair())
    first = round_costs(backend)
    assert the_file(cache).is_file()
    monkeypatch.setattr(costs, "measure_costs", lambda *pair: pytest.fail("measured again"))
    assert round_costs(backend).seconds == pytest.approx(first.seconds)


@pytest.mark.parametrize(("share", "kept"), [(None, True), (0.05, True), (0.4, False)])
def test_costs_of_a_busy_machine_are_not_kept(
    share: float | None, kept: bool, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CpuClock, "share_elsewhere", lambda self: share)
    round_costs(make_backend(*agreeing_pair()))
    assert kept == (cache.exists() and len(list(cache.iterdir())) == 1)


def test_others_work_is_seen() -> None:
    clock = CpuClock([os.getpid()])
    script = "import time\nwhile time.process_time() < 0.5: pass"
    subprocess.run([sys.executable, "-c", script], check=True)
    share = clock.share_elsewhere()
    assert share is None or share > 0.2 / (os.cpu_count() or 1)


def test_drawing_has_costs_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = load_pair()
    asked: list[str] = []
    monkeypatch.setattr(costs, "measure_costs", lambda backend, choice, sequences: asked.append(choice) or COSTS)
    for temperature, top_p in ((0.0, 1.0), (1.0, 1.0), (0.0, 0.9), (1.0, 0.9), (1.0, 1.0)):
        pair.generate("import os", SamplingParams(max_tokens=4, temperature=temperature, top_p=top_p))
    assert asked == ["argmax", "drawn", "processed"]
    assert min(measure_costs(pair.backend, "drawn").seconds) > 0


def test_without_a_cache_they_are_measured_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMMA_MTP_CACHE", "0")
    monkeypatch.setattr(costs, "measure_costs", lambda *pair: COSTS)
    monkeypatch.setattr(cost_cache, "write_json", None)  # writing would fail
    assert round_costs(make_backend(*agreeing_pair())) is COSTS


def test_measuring_takes_no_longer_than_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock on which every round takes a tenth of a second."""
    ticks = iter(range(1000))
    monkeypatch.setattr("gemma_mtp.engine.costs.time.perf_counter", lambda: 0.05 * next(ticks))
    monkeypatch.setattr(costs, "BUDGET_SECONDS", 0.3)
    measured = measure_costs(make_backend(random_target(), random_drafter()))
    assert next(ticks) * 0.05 < 1
    assert len(measured.seconds) == LONGEST + 1 and min(measured.seconds) > 0


def test_a_few_lengths_are_played_again_rather_than_many_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds of many sequences take long: those with few drafts are known well, the others follow from them. What was
    disturbed once, the second round of four drafts here, is not what counts."""
    clock, played = [0.0], Counter[int]()

    def round_seconds(backend: object, prompts: object, drafts: int) -> tuple[float, float]:
        played[drafts] += 1
        took = 0.004 * (1 + drafts) * (2.0 if (drafts, played[drafts]) == (4, 2) else 1.0)
        clock[0] += took
        return 0.001 * drafts, took

    monkeypatch.setattr("gemma_mtp.engine.costs.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr(costs, "BUDGET_SECONDS", 0.3)
    monkeypatch.setattr(costs, "_round_seconds", round_seconds)
    measured = measure_costs(make_backend(random_target(), random_drafter()), sequences=4)
    assert set(played) == {0, 4, 1, 2, 8}
    assert min(played.values()) >= 3
    assert clock[0] < 1.4 * costs.BUDGET_SECONDS
    assert measured.seconds == pytest.approx([0.004 * (1 + k) for k in range(LONGEST + 1)])
