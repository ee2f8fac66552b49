"""Where the GPU kernels are taken, and what is said where they are not."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shutil
import sys
import sysconfig
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from models import WIDE, random_target, wide_drafter

from gemma_mtp.backend.cuda.replay import CudaReplays
from gemma_mtp.backend.cuda.usable import asked_for, usable, usable_on, why_not
from gemma_mtp.backend.reference import ReferenceBackend
from gemma_mtp.config import LayerOptions
from gemma_mtp.engine.pair import choose_device
from gemma_mtp.errors import CheckpointError, DeviceError
from gemma_mtp.weights.activations import ActivationScales
from gemma_mtp.weights.int2 import Int2
from gemma_mtp.weights.matrix import Linear, Matrix

CARD = torch.device("cuda", 0)
#: needs Triton and a card; what takes its place is looked up where it would be imported from
PROBE = "gemma_mtp.backend.cuda.probe"


@dataclasses.dataclass(frozen=True)
class Strange(LayerOptions):
    """Options of a family that nobody has met."""

    parallel_branches: bool = False


def model(
    dtype: torch.dtype = torch.bfloat16, device: torch.device = CARD, options: LayerOptions | None = None,
    matrix: Matrix | None = None,
) -> Any:  # fmt: skip
    """What is looked at of a model, on a card that is not there."""
    options = options or LayerOptions(value_norm=False, score_scale=0.1, layer_scalar=False)
    config = SimpleNamespace(options=options, text=SimpleNamespace(options=options))
    parts = [] if matrix is None else [matrix]
    table = SimpleNamespace(device=device, dtype=dtype)
    return SimpleNamespace(embed_tokens=table, config=config, modules=lambda: parts)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """An H100 with all that is needed."""
    monkeypatch.setenv("GEMMA_MTP_CUDA", "1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_path", lambda name, scheme: str(tmp_path))
    monkeypatch.setitem(sys.modules, PROBE, SimpleNamespace(failed_launch=lambda device: None))
    return monkeypatch


def test_they_are_taken_where_they_are_asked_for(card: pytest.MonkeyPatch) -> None:
    assert why_not(model(), model()) is None and usable(model(), model())
    assert usable_on(CARD) and not usable_on(torch.device("cpu"))
    card.delenv("GEMMA_MTP_CUDA")
    assert not usable(model(), model()) and not usable_on(CARD)  # without a word


@pytest.mark.parametrize(
    ("name", "replacement", "reason"),
    [
        (
            "torch.cuda.get_device_capability",
            lambda device: (7, 5),
            "compute capability 7.5, and bf16 products need 8.0",
        ),
        ("importlib.util.find_spec", lambda name: None, "Triton is not installed"),
        ("shutil.which", lambda name: None, "there is no C compiler"),
        ("sysconfig.get_path", lambda name, scheme: "/nowhere", "Python's headers are missing.*python3-dev"),
        ("torch.version.hip", "6.2", "the card is AMD's"),
    ],
)
def test_what_is_missing_is_one_warning(card: pytest.MonkeyPatch, name: str, replacement: Any, reason: str) -> None:
    card.setattr(name, replacement)
    with pytest.warns(RuntimeWarning, match=reason) as warned:
        assert not usable(model(), None)
    assert len(warned) == 1


def test_a_card_on_which_no_kernel_runs_is_named(card: pytest.MonkeyPatch) -> None:
    card.setitem(sys.modules, PROBE, SimpleNamespace(failed_launch=lambda device: f"no kernel runs on {device}"))
    with pytest.warns(RuntimeWarning, match="no kernel runs on cuda:0; decoding goes on with PyTorch"):
        assert not usable(model(), None)


def test_a_first_kernel_says_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that can not be built, one that gives something else, and one that is right, by the interpreter."""
    pytest.importorskip("triton", reason="the extra gpu-test is not installed")
    from tensor_core import Interpreter

    from gemma_mtp.backend.cuda import probe

    run, here = Interpreter(), torch.device("cpu")

    def failing(*args: Any, **options: Any) -> None:
        raise OSError("libcuda.so can not be found\nand more")

    for launch, said in (
        (failing, r"a first kernel does not run \(OSError: libcuda.so can not be found\)"),
        (lambda kernel, grid, parts, out, *args, **options: out.zero_(), "wrong numbers"), (run, None),
    ):  # fmt: skip
        monkeypatch.setattr(probe, "on_device", launch)
        probe.failed_launch.cache_clear()
        found = probe.failed_launch(here)
        assert found is None if said is None else re.search(said, str(found))
    probe.failed_launch.cache_clear()


class _Guard:
    """Stands for `torch.cuda.device_of` and the like: knows which device is current."""

    current: ClassVar[list[Any]] = []

    def __init__(self, on: Any) -> None:
        self._device = on.device if isinstance(on, torch.Tensor) else on

    def __enter__(self) -> None:
        self.current.append(self._device)

    def __exit__(self, *args: object) -> None:
        self.current.pop()


def test_kernels_run_on_the_card_of_their_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton takes the thread's current card: a second card's tensors would be read by the first."""
    from gemma_mtp.backend.cuda.launch import on_device

    seen: list[Any] = []
    kernel = {(1,): lambda *args, **options: seen.append((_Guard.current[-1], options["enable_fp_fusion"]))}
    monkeypatch.setattr(torch.cuda, "device_of", _Guard)
    on_device(kernel, (1,), torch.empty(1, device="meta"), 7)
    assert seen == [(torch.device("meta"), False)]


def test_rounds_are_recorded_one_at_a_time_on_their_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stream of that card; two threads never record at once."""
    second, streams, at_once, most = torch.device("cuda", 1), [], [0], [0]

    class Recording(_Guard):
        def __init__(self, graph: Any, pool: Any, stream: Any, mode: str) -> None:
            assert mode == "thread_local"
            streams.append(stream)
            super().__init__(None)

    for name, value in {
        "device": _Guard, "graph": Recording, "CUDAGraph": lambda: SimpleNamespace(replay=print),
        "Stream": lambda device: f"stream of {device}", "graph_pool_handle": lambda: (0, 1),
        "current_stream": lambda: None, "set_stream": lambda stream: None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    replays = [CudaReplays(second), CudaReplays(second)]

    def body() -> None:
        assert second in _Guard.current
        at_once[0] += 1
        most[0] = max(most[0], at_once[0])
        time.sleep(0.01)
        at_once[0] -= 1

    threads = [threading.Thread(target=one.capture, args=(body,)) for one in replays]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert streams == ["stream of cuda:1"] * 2 and most == [1]


def test_models_that_do_not_fit_are_named(card: pytest.MonkeyPatch) -> None:
    assert "float32 and not bfloat16" in str(why_not(model(torch.float32), None))
    assert "float16 and not bfloat16" in str(why_not(model(), model(torch.float16)))
    assert why_not(model(options=Strange()), None) is None
    for pair in (
        (model(options=Strange(parallel_branches=True)), None),
        (model(), model(options=Strange(parallel_branches=True))),
    ):
        assert "do not know the layers' option parallel_branches = True" in str(why_not(*pair))
    two_bits, rounding = Linear(64, 8), Linear(64, 8)
    two_bits.convert_(Int2)
    rounding.activations = (ActivationScales(8, 0.1, 0.0),)
    assert "do not multiply weights of 2 bits" in str(why_not(model(), model(matrix=two_bits)))
    assert "do not round activations by static scales" in str(why_not(model(matrix=rounding), None))
    assert "cuda:1 and not beside its target" in str(why_not(model(), model(device=torch.device("cuda", 1))))


def test_no_card_is_an_error_by_name() -> None:
    pytest.importorskip("triton", reason="the extra gpu-test is not installed")
    from gemma_mtp.backend.cuda.backend import CudaBackend

    target, drafter = random_target(5, WIDE["ple"]).bfloat16(), wide_drafter(WIDE["ple"]).bfloat16()
    with pytest.raises(DeviceError, match="the models are on 'cpu' and not on an NVIDIA card"):
        CudaBackend(target, drafter)


def test_weights_of_another_type_are_refused_by_name() -> None:
    pytest.importorskip("triton", reason="the extra gpu-test is not installed")
    from tensor_core import Interpreter

    from gemma_mtp.backend.cuda.backend import CudaBackend

    with pytest.raises(DeviceError, match="float32, but the GPU kernels multiply bfloat16, fp8, int8, int4 and q8_0"):
        CudaBackend(random_target(5, WIDE["ple"]), None, Interpreter())


def test_nothing_on_a_cpu_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from gemma_mtp.backend.select import make_backend

    monkeypatch.setenv("GEMMA_MTP_CUDA", "1")
    monkeypatch.setenv("GEMMA_MTP_NATIVE", "0")
    target = random_target(5, WIDE["ple"]).half()
    assert not asked_for(target.embed_tokens.device)
    assert isinstance(make_backend(target), ReferenceBackend)


def test_a_card_that_there_is_not_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"is_available": True, "device_count": 1}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    assert choose_device("cuda") == torch.device("cuda") and choose_device("cuda:0").index == 0
    with pytest.raises(CheckpointError, match="'cuda:1' was asked for, but of CUDA devices there are 1"):
        choose_device("cuda:1")
