"""A plan against what a run takes: resident memory of a process, and the tensors that it allocates."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "resident_run.py"
#: of all that the process takes
TOLERANCE = 0.03


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
@pytest.mark.parametrize(
    ("case", "kinds"),
    [
        ("bundled", "none"),
        ("small", "int8"),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in (("small", "none"), ("e2b", "none"), ("e2b", "int8"))),
    ],
)
def test_a_run_takes_what_was_planned(case: str, kinds: str) -> None:
    """The bundled pair, and two whose weights are zeros: one of 112 M parameters, and one of E2B's shape with fewer
    layers."""
    command = [sys.executable, str(SCRIPT), case, kinds]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    found = json.loads(ran.stdout.splitlines()[-1])
    planned, process = found["planned"], found["before"]
    print(f"{case} {kinds}: process {process / 1e6:.0f} MB, resident {found['after'] / 1e6:.0f} MB,"
          f" planned {(planned['total'] - planned['process'] + process) / 1e6:.0f} MB")  # fmt: skip
    resident = planned["total"] - planned["process"] + process
    assert resident == pytest.approx(found["after"], rel=TOLERANCE)
    assert planned["kv"] == found["pool"]
    copies = planned["weights"] + planned["drafter"] - found["weights"]
    assert 0 <= copies <= planned["drafter"], "what is counted beyond the tensors are the drafter's copies"
    assert planned["process"] == pytest.approx(process, rel=0.25), "PyTorch takes another amount than was measured"
