"""Where the GPU kernels are taken, and what is said where they are not."""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import WIDE, random_target, wide_drafter

from gemma_mtp.backend.cuda.usable import asked_for, usable, why_not
from gemma_mtp.backend.reference import ReferenceBackend
from gemma_mtp.config import LayerOptions
from gemma_mtp.errors import DeviceError

CARD = torch.device("cuda", 0)


@dataclasses.dataclass(frozen=True)
class Strange(LayerOptions):
    """Options of a family that nobody has met."""

    parallel_branches: bool = False


def model(dtype: torch.dtype = torch.bfloat16, device: torch.device = CARD, options: LayerOptions | None = None) -> Any:
    """What is looked at of a model, on a card that is not there."""
    options = options or LayerOptions(value_norm=False, score_scale=0.1, layer_scalar=False)
    config = SimpleNamespace(options=options, text=SimpleNamespace(options=options))
    return SimpleNamespace(embed_tokens=SimpleNamespace(device=device, dtype=dtype), config=config)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An H100 with all that is needed."""
    monkeypatch.setenv("GEMMA_MTP_CUDA", "1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    return monkeypatch


def test_they_are_taken_where_they_are_asked_for(card: pytest.MonkeyPatch) -> None:
    assert why_not(model(), model()) is None and usable(model(), model())
    card.delenv("GEMMA_MTP_CUDA")
    assert not usable(model(), model())  # without a word


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
        ("torch.version.hip", "6.2", "the card is AMD's"),
    ],
)
def test_what_is_missing_is_one_warning(card: pytest.MonkeyPatch, name: str, replacement: Any, reason: str) -> None:
    card.setattr(name, replacement)
    with pytest.warns(RuntimeWarning, match=reason) as warned:
        assert not usable(model(), None)
    assert len(warned) == 1


def test_models_that_do_not_fit_are_named(card: pytest.MonkeyPatch) -> None:
    assert "float32 and not bfloat16" in str(why_not(model(torch.float32), None))
    assert "float16 and not bfloat16" in str(why_not(model(), model(torch.float16)))
    assert why_not(model(options=Strange()), None) is None
    for pair in (
        (model(options=Strange(parallel_branches=True)), None),
        (model(), model(options=Strange(parallel_branches=True))),
    ):
        assert "do not know the layers' option parallel_branches = True" in str(why_not(*pair))
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

    with pytest.raises(DeviceError, match="float32, but the GPU kernels multiply bfloat16, int8, int4 and q8_0"):
        CudaBackend(random_target(5, WIDE["ple"]), None, Interpreter())


def test_nothing_on_a_cpu_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from gemma_mtp.backend.select import make_backend

    monkeypatch.setenv("GEMMA_MTP_CUDA", "1")
    monkeypatch.setenv("GEMMA_MTP_NATIVE", "0")
    target = random_target(5, WIDE["ple"]).half()
    assert not asked_for(target)
    assert isinstance(make_backend(target), ReferenceBackend)
