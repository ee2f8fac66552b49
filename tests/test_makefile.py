"""`make help` names every target, and says what it does."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_help_says_what_every_target_does() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony is not None and "help" in phony[1].split()
    text = subprocess.run(
        ["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    ).stdout
    said = dict(line.split(maxsplit=1) for line in text.splitlines())
    assert sorted(said) == sorted(phony[1].split())
    assert all(f"## {words}" in makefile for words in said.values())
