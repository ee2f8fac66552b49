"""Rounds on the device where they can not be recorded, and how many are: the same bytes, under a recorder that errs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mixed_load import play, requests
from models import play_rounds
from recorded_rounds import Recorder, plain_backend
from test_device_round import ROOM, TOKENS, pair_of, sequences
from torch.utils._python_dispatch import TorchDispatchMode

from gemma_mtp.backend import device_memory
from gemma_mtp.backend.cuda.device_round import COUNTS
from gemma_mtp.backend.cuda.replay import CudaReplays
from gemma_mtp.decoding.round_costs import LONGEST
from gemma_mtp.engine.sequence import Sequence, Turn
from gemma_mtp.engine.settings import EngineSettings
from gemma_mtp.engine.whole_rounds import play_whole
from gemma_mtp.sizes.card import MOST_RECORDED, recorded_rounds


def short() -> RuntimeError:
    """What PyTorch raises. Made anew each time: an error that is kept keeps all that its calls had."""
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nand more")


def ended() -> RuntimeError:
    """What CUDA says of a recording that it ended."""
    return RuntimeError("operation failed due to a previous error during capture")


def no_launch() -> RuntimeError:
    """And of a graph that does not fit at its first launch."""
    return RuntimeError("CUDA error: out of memory")


def same_rounds(recorder: Recorder, drafts: list[int], temperatures: list[float]) -> int:
    """Rounds of so many drafts, one after another, are those that the host plays. Returns how many are recorded."""
    ours, theirs = plain_backend(recorder), plain_backend(None)
    recorded, eager = (sequences(backend, temperatures, 0) for backend in (ours, theirs))
    check_rounds(ours, theirs, recorded, eager, drafts)
    return len(recorder.recordings)


def check_rounds(ours: Any, theirs: Any, recorded: list[Sequence], eager: list[Sequence], drafts: list[int]) -> None:
    for most in drafts:
        outputs = play_whole(ours, [Turn(one, most) for one in recorded])
        expected = play_rounds(theirs, [Turn(one, most) for one in eager])
        assert [output and output[:3] for output in outputs] == [output[:3] for output in expected]
        for one, other in zip(recorded, eager, strict=True):
            assert torch.equal(one.cache.state, other.cache.state)


@pytest.mark.parametrize("error", [short, ended])
@torch.inference_mode()
def test_a_round_that_can_not_be_recorded_is_played_all_the_same(
    error: Callable[[], RuntimeError], caplog: pytest.LogCaptureFixture
) -> None:
    """Launch by launch from then on, without a second attempt, and with one warning; other shapes are recorded."""
    recorder = Recorder()
    # of the second and the third shape
    recorder.refusal = lambda what: error() if what == "capture" and recorder.attempts in (1, 2) else None
    with caplog.at_level(logging.WARNING):
        left = same_rounds(recorder, [2, 2, 4, 1, 4, 1, 4, 2, 2, 6, 6], [0.0, 0.8])
    assert recorder.attempts == 2 + 1 + 1 + 1  # that of two drafts twice: its recording was given up
    assert recorder.captured == 3 and recorder.replayed == 3 and left == 2
    (warning,) = [record.getMessage() for record in caplog.records if "not recorded" in record.getMessage()]
    assert "rounds of 4 drafts and 2 sequences are not recorded" in warning
    assert type(error()).__name__ in warning and "and more" not in warning


@torch.inference_mode()
def test_a_recording_that_fails_is_played_launch_by_launch() -> None:
    """CUDA takes memory for a graph at its first launch. What was recorded beside it is given up."""
    recorder = Recorder()
    recorder.refusal = lambda what: no_launch() if what == "replay" and recorder.replayed == 2 else None
    left = same_rounds(recorder, [2, 2, 2, 3, 3, 3, 2, 3], [0.5])
    assert recorder.replayed == 2 and recorder.attempts == 3  # two drafts once more, three never again
    assert recorder.given_back == 2 and left == 1


@torch.inference_mode()
def test_a_device_that_failed_is_an_error() -> None:
    """Whether it works on is asked before rounds go on without their recordings."""
    recorder = Recorder()

    def dead() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    recorder.refusal = lambda what: ended() if what == "replay" else None
    recorder.give_back = dead  # type: ignore[method-assign]
    backend = plain_backend(recorder)
    made = sequences(backend, [0.0], 0)
    play_whole(backend, [Turn(made[0], 2)])
    with pytest.raises(RuntimeError, match="illegal memory access"):
        play_whole(backend, [Turn(made[0], 2)])


@torch.inference_mode()
def test_an_error_of_ours_is_no_lack_of_memory() -> None:
    """A round that reads the device is to be mended, not to be played without a recording."""
    recorder = Recorder()
    recorder.refusal = lambda what: AssertionError("the host reads the device")
    backend = plain_backend(recorder)
    with pytest.raises(AssertionError, match="the host reads the device"):
        play_whole(backend, [Turn(sequences(backend, [0.0], 0)[0], 2)])


def test_requests_go_on_where_memory_is_short() -> None:
    """Of an engine: every third recording fails, and every tenth replay."""
    recorder, asked = Recorder(), {"capture": 0, "replay": 0}

    def refusal(what: str) -> Exception | None:
        asked[what] += 1
        return short() if asked[what] % {"capture": 3, "replay": 10}[what] == 0 else None

    recorder.refusal = refusal
    load = requests([TOKENS, TOKENS[::-1]], 12, seed=4, longest=30)
    loaded = play(pair_of(recorder), load, EngineSettings(max_running=5, max_tokens=140, kv_memory_mb=0.08))
    assert loaded.mismatches == [] and loaded.completed > 6
    assert asked["capture"] > 6 and asked["replay"] > 10
    assert loaded.stats.finished["error"] == 0


class Short(TorchDispatchMode):
    """Memory that suffices for so many calls which make tensors."""

    def __init__(self, calls: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.left = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func._schema.is_mutable and not func.is_view:
            self.left -= 1
            if self.left < 0:
                raise short()
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
def test_a_round_that_lacked_memory_anywhere_can_be_played_again() -> None:
    """Whatever call it is that fails: nothing that the round reads has changed."""
    recorder = Recorder()
    recorder.refusal = lambda what: ended()  # launch by launch
    ours, theirs = plain_backend(recorder), plain_backend(None)
    recorded, eager = (sequences(backend, [0.0, 0.9], 0) for backend in (ours, theirs))
    for most in (3, 0):
        check_rounds(ours, theirs, recorded, eager, [most])
        with Short(10**9) as counter:
            play_whole(ours, [Turn(one, most) for one in recorded])
        play_rounds(theirs, [Turn(one, most) for one in eager])
        calls = 10**9 - counter.left
        assert calls > 30
        for enough in (*range(0, calls - 6, 11), *range(calls - 6, calls)):
            with Short(enough), pytest.raises(torch.OutOfMemoryError):
                play_whole(ours, [Turn(one, most) for one in recorded])
        check_rounds(ours, theirs, recorded, eager, [most])


@torch.inference_mode()
def test_what_is_recorded_makes_room_for_a_call() -> None:
    """Of the backend: before it fails for lack of memory, recordings are given up, that of a round under way too. Then
    it is made once more."""
    recorder = Recorder()
    backend = plain_backend(recorder)
    made = sequences(backend, [0.0], ROOM)
    play_whole(backend, [Turn(made[0], 2)])
    assert len(recorder.recordings) == 1 and recorder.replayed == 1
    left = [short()]
    own = backend.on_device.forward

    def forward(*args: Any) -> torch.Tensor:
        if left:
            raise left.pop()
        return own(*args)

    backend.on_device.forward = forward  # type: ignore[method-assign, assignment]
    (output,) = play_rounds(backend, [Turn(made[0], 2)])
    assert output.token_ids and len(recorder.recordings) == 0
    left.append(short())
    with pytest.raises(torch.OutOfMemoryError):  # nothing is recorded that could make room
        play_rounds(backend, [Turn(made[0], 2)])


@torch.inference_mode()
def test_so_many_rounds_are_recorded_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that were played last; what is given up is recorded anew when it comes up."""
    monkeypatch.setattr("gemma_mtp.backend.cuda.device_round.recorded_rounds", lambda slots: 3)
    recorder = Recorder()
    ours, theirs = plain_backend(recorder), plain_backend(None)
    recorded, eager = (sequences(backend, [0.0, 0.8], 0) for backend in (ours, theirs))
    most: list[int] = []
    for drafts, captures in ((0, 1), (1, 2), (2, 3), (0, 3), (3, 4), (0, 4), (2, 4), (1, 5), (3, 6), (1, 6)):
        check_rounds(ours, theirs, recorded, eager, [drafts])
        assert recorder.captured == captures, drafts
        most.append(len(recorder.recordings))
    assert max(most) == 3


def test_a_pool_of_more_sequences_keeps_more_rounds() -> None:
    assert [recorded_rounds(n) for n in (1, 2, 3, 16, 4096)] == [12, 24, *[MOST_RECORDED] * 3]
    assert COUNTS[-1] == LONGEST and recorded_rounds(1) >= len(COUNTS)


# CUDA's own part, with what stands for PyTorch's


class Graphs:
    """PyTorch's graphs, streams and allocator as far as a recording goes: which stream is current, what is allocated
    to, and what a recording that fails leaves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ends: Callable[[], None] = lambda: None) -> None:
        self.current, self.handles, self.resets, self.emptied = "first", 0, 0, 0
        self.recording: list[int] = []
        world = self

        class Graph:
            def replay(self) -> None:
                pass

            def reset(self) -> None:
                world.resets += 1

        class Recording:
            def __init__(self, graph: Graph, pool: Any, stream: Any, mode: str) -> None:
                self.pool, self.stream = pool, stream
                assert mode == "thread_local"

            def __enter__(self) -> None:
                world.current = self.stream
                world.recording.append(self.pool)

            def __exit__(self, *args: object) -> None:
                ends()  # where it raises, PyTorch leaves both as they are
                world.recording.remove(self.pool)
                world.current = "first"

        def handle() -> int:
            self.handles += 1
            return self.handles

        def end(device: int, pool: int) -> None:
            if pool not in self.recording:
                raise RuntimeError("not currently recording to mempool_id")
            self.recording.remove(pool)

        class Device:
            def __init__(self, card: Any) -> None:
                pass

            def __enter__(self) -> None:
                pass

            def __exit__(self, *args: object) -> None:
                pass

        def empty() -> None:
            assert not self.recording, "nobody may give memory back while another thread records"
            self.emptied += 1

        for name, value in {
            "device": Device, "graph": Recording, "CUDAGraph": Graph, "graph_pool_handle": handle,
            "Stream": lambda card: f"stream {self.handles}", "current_stream": lambda: self.current,
            "set_stream": lambda stream: setattr(self, "current", stream), "current_device": lambda: 0,
            "synchronize": lambda: None, "empty_cache": empty, "mem_get_info": lambda card: (7 * 10**9, 8 * 10**9),
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)


def failing() -> None:
    raise short()


@pytest.mark.parametrize("ends", [lambda: None, failing])
def test_a_failed_recording_leaves_nothing(monkeypatch: pytest.MonkeyPatch, ends: Callable[[], None]) -> None:
    """Neither its stream nor its memory goes on: with an end that CUDA accepts, and one that it does not, where
    PyTorch 2.11 goes on allocating for the recording."""
    world = Graphs(monkeypatch, ends)
    replays = CudaReplays(torch.device("cuda", 0))
    with pytest.raises(torch.OutOfMemoryError):
        replays.capture(failing)
    assert world.current == "first" and world.recording == [] and world.resets == 1
    assert world.handles == 2 and not device_memory.WHOLE_CARD.locked()


def test_a_recording_that_ends_well_keeps_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    world = Graphs(monkeypatch)
    replays = CudaReplays(torch.device("cuda", 0))
    assert callable(replays.capture(lambda: None)) and callable(replays.capture(lambda: None))
    assert world.current == "first" and world.recording == [] and (world.resets, world.handles) == (0, 1)


def test_what_is_kept_for_later_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool that nobody uses any more lies in PyTorch's own store, and is not missing to the next. Nobody gives back
    while another thread records."""
    world = Graphs(monkeypatch)
    card, replays = torch.device("cuda", 0), CudaReplays(torch.device("cuda", 0))
    assert device_memory.device_free_bytes(card) == 7 * 10**9 and world.emptied == 1
    assert device_memory.free_for_pool(card, 3 * 10**9) == 4 * 10**9
    assert device_memory.free_for_pool(card, 9 * 10**9) == 0
    begun, go_on = threading.Event(), threading.Event()

    def body() -> None:
        begun.set()
        go_on.wait(10)

    recording = threading.Thread(target=replays.capture, args=(body,))
    giving = threading.Thread(target=replays.give_back)
    recording.start()
    begun.wait(10)
    giving.start()
    giving.join(0.05)
    assert giving.is_alive() and world.emptied == 3
    go_on.set()
    for thread in (recording, giving):
        thread.join(10)
    assert world.emptied == 4
