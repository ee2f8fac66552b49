"""Which PyTorch `make` installs: never gigabytes of CUDA on a machine without a GPU, where that can be helped."""

import importlib.util
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import install_torch
import pytest


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Linux without PyTorch and without a GPU, which reaches PyTorch's index."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(install_torch, "has_nvidia_gpu", lambda: False)
    monkeypatch.setattr(install_torch, "reachable", lambda url: True)
    return monkeypatch


def test_without_a_gpu_the_cpu_build_of_the_constrained_version_is_taken(bare: pytest.MonkeyPatch) -> None:
    version = next(line for line in install_torch.CONSTRAINTS.read_text().splitlines() if line.startswith("torch=="))
    command = install_torch.command()
    assert command is not None and command[:4] == [sys.executable, "-m", "pip", "install"]
    assert command[-3:] == ["--index-url", "https://download.pytorch.org/whl/cpu", version]
    ran: list[list[str]] = []

    def run(words: list[str], check: bool) -> Any:
        ran.append(words)
        return subprocess.CompletedProcess(words, 3)

    bare.setattr(subprocess, "run", run)
    assert install_torch.main() == 3 and ran == [command]


@pytest.mark.parametrize("why", ["gpu", "installed", "unreachable", "darwin"])
def test_else_pip_decides(why: str, bare: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if why == "gpu":
        bare.setattr(install_torch, "has_nvidia_gpu", lambda: True)
    elif why == "installed":
        bare.setattr(importlib.util, "find_spec", lambda name: object())
    elif why == "unreachable":
        bare.setattr(install_torch, "reachable", lambda url: False)
    else:
        bare.setattr(sys, "platform", "darwin")
    assert install_torch.command() is None and install_torch.main() == 0
    assert ("does not answer" in capsys.readouterr().out) == (why == "unreachable")


def test_an_index_that_is_not_there_is_not_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch").mkdir()
    assert install_torch.reachable(tmp_path.as_uri()) is False, "a directory is no index"
    assert not install_torch.reachable("http://127.0.0.1:9")
    asked: list[tuple[str, float]] = []

    class Answer:
        def __enter__(self) -> None: ...
        def __exit__(self, *given: object) -> None: ...

    def urlopen(url: str, timeout: float) -> Answer:
        asked.append((url, timeout))
        return Answer()

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    assert install_torch.reachable("https://index") and asked == [("https://index/torch/", 5)]
