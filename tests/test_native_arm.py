"""The NEON kernels: compiled for 64-bit ARM, and held to their rules under emulation (`make arm`)."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NATIVE = ROOT / "src" / "native"
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
#: as in CMakeLists.txt, but for the time that more optimisation takes
FLAGS = ["-std=c++20", "-O2", "-ffp-contract=off", "-fno-tree-loop-distribute-patterns", "-Wall", "-Wextra", "-Werror",
         "-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]  # fmt: skip
#: instruction sets, and what each is compiled with
SETS = {"portable": ["GEMMA_PORTABLE"], "control": ["GEMMA_PORTABLE", "GEMMA_CONTROL"], "neon": ["GEMMA_NEON"]}

needed = [name for name in (COMPILER, EMULATOR) if shutil.which(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(needed), reason=f"no {needed}; apt-get install g++-aarch64-linux-gnu qemu-user-static"),
]


def compiled(source: Path, out: Path, *defines: str) -> Path:
    words = [COMPILER, *FLAGS, *(f"-D{define}" for define in defines), "-c", str(source), "-o", str(out)]
    subprocess.run(words, check=True, timeout=300)
    return out


def test_neon_kernels_keep_to_their_rules(tmp_path: Path) -> None:
    """Exact products of integers, float32's error elsewhere, and the same bits for a row whatever shares its call."""
    kernels = sorted((NATIVE / "kernels").glob("*.cpp"))
    jobs = [(source, tmp_path / f"{isa}_{source.stem}.o", f"GEMMA_ISA={isa}", *defines)
            for isa, defines in SETS.items() for source in kernels]  # fmt: skip
    jobs += [(source, tmp_path / f"{source.stem}.o")
             for source in (NATIVE / "dispatch.cpp", ROOT / "tests" / "native" / "kernels_check.cpp")]  # fmt: skip
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda job: compiled(*job), jobs))
    program = tmp_path / "kernels_check"
    subprocess.run([COMPILER, "-static", *map(str, objects), "-o", str(program)], check=True, timeout=300)
    ran = subprocess.run([EMULATOR, str(program)], capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stdout
    *checked, last = ran.stdout.splitlines()
    assert checked == ["neon: checked", "portable: checked"] and last.endswith(" passed, 0 failed")
    assert int(last.split()[0]) > 500
