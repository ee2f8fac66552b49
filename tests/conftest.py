import os
from collections.abc import Callable
from pathlib import Path

import pytest

import gemma_mtp

if "GEMMA_MTP_BUILD" in os.environ:  # another build of the native operators than the installed one (`make sanitize`)
    gemma_mtp.__path__.insert(0, os.environ["GEMMA_MTP_BUILD"])


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Directories of a family's target and drafter, written once by transformers. "e2b" and "e4b" have centroids."""
    from oracle import build_drafter, build_target

    written: dict[str, tuple[Path, Path]] = {}

    def directories(family: str) -> tuple[Path, Path]:
        if family not in written:
            root = tmp_path_factory.mktemp(family)
            build_target(family).save_pretrained(root / "target")
            build_drafter(family, centroids=family in ("e2b", "e4b")).save_pretrained(root / "drafter")
            written[family] = root / "target", root / "drafter"
        return written[family]

    return directories
