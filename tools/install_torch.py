"""Install PyTorch into this virtual environment: its CPU build where no NVIDIA GPU is.

On Linux the package index has PyTorch with CUDA, some gigabytes. PyTorch's own index has the CPU build, a tenth of
that. Where it can not be reached, or there is a GPU, nothing is done: pip then installs what its index has.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
PATIENCE_SECONDS = 5


def has_nvidia_gpu() -> bool:
    """Whether this machine has a GPU that CUDA drives."""
    return shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia").exists()


def reachable(url: str) -> bool:
    """Whether an index answers soon."""
    try:
        with urllib.request.urlopen(f"{url}/torch/", timeout=PATIENCE_SECONDS):
            return True
    except (OSError, ValueError):
        return False


def wanted() -> str:
    """Returns the requirement that the project's constraints make of PyTorch."""
    found = re.search(r"^torch==\S+$", CONSTRAINTS.read_text(encoding="utf-8"), re.MULTILINE)
    return found.group() if found else "torch"


def command() -> list[str] | None:
    """Returns what installs the CPU build, or None where it is not to be: on other systems PyTorch is that anyway."""
    if sys.platform != "linux" or importlib.util.find_spec("torch") is not None or has_nvidia_gpu():
        return None
    if not reachable(CPU_INDEX):
        print(f"{CPU_INDEX} does not answer; pip's own index may have PyTorch with CUDA only, which is 3 GB.")
        return None
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    return [*pip, "--index-url", CPU_INDEX, wanted()]


def main() -> int:
    asked = command()
    if asked is None:
        return 0
    print("no NVIDIA GPU: installing PyTorch's CPU build, about 200 MB", flush=True)
    return subprocess.run(asked, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
