"""The same bits as in the versions before: tokens, log-probabilities and ends of generations written down once."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from goldens import COUNT, ENVIRONMENT, FILE

from gemma_mtp.backend.native import native_available


def has_avx2_operators() -> bool:
    if platform.machine() != "x86_64" or not native_available():
        return False
    from gemma_mtp import _native

    return "avx2" in _native.isas()


pytestmark = pytest.mark.skipif(not has_avx2_operators(), reason="the outputs were written by the AVX2 operators")


def outputs(first: int, count: int) -> dict[str, str]:
    script = Path(__file__).with_name("goldens.py")
    command = [sys.executable, str(script), str(first), str(count)]
    path = os.pathsep.join(sys.path)
    run = subprocess.run(
        command, env={**os.environ, **ENVIRONMENT, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return dict(json.loads(run.stdout.splitlines()[-1]))


@pytest.mark.parametrize(("first", "count"), [(0, 8), pytest.param(8, COUNT - 8, marks=pytest.mark.slow)])
def test_outputs_are_those_of_the_version_before(first: int, count: int) -> None:
    written = json.loads(FILE.read_text())
    assert len(written) == COUNT
    found = outputs(first, count)
    assert len(found) == count
    assert {index: text for index, text in found.items() if written[index] != text} == {}
