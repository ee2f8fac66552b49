from __future__ import annotations

import atexit
import gc
import os
import sys

# bytecode is kept, whatever the environment says: each worker and process that a test starts would compile all again
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
if "PYTEST_XDIST_WORKER" in os.environ:  # which takes three seconds to take all modules apart, for nobody
    atexit.register(os._exit, 0)  # what is registered first runs last

import gemma_mtp.cli.environment  # isort: skip  (before PyTorch)

import importlib.util
import shutil
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

os.environ["TRITON_INTERPRET"] = "1"  # as kernels are defined: there is no card

import pytest
from hypothesis import HealthCheck, settings

import gemma_mtp

if TYPE_CHECKING:
    from live_server import Live

    from gemma_mtp.engine.pair import Pair

if "GEMMA_MTP_BUILD" in os.environ:  # another build of the native operators than the installed one (`make sanitize`)
    (built,) = Path(os.environ["GEMMA_MTP_BUILD"]).glob("_native*.so")
    spec = importlib.util.spec_from_file_location("gemma_mtp._native", built)
    assert spec is not None
    assert spec.loader is not None
    native = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(native)
    sys.modules["gemma_mtp._native"] = gemma_mtp._native = native


if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):  # each with its share of the cores
    import torch  # here and below: who hands out tests needs none

    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # and so the processes that it starts

# time decides no test, and every run tries the same examples
settings.register_profile(
    "ours", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("ours")

# what needs Triton, the extra gpu-test
collect_ignore = (
    []
    if importlib.util.find_spec("triton")
    else ["test_cuda_compile.py", "test_cuda_kernels.py", "test_cuda_rows.py", "test_gpu_check.py"]
)

os.environ["GEMMA_MTP_CACHE"] = "0"  # tests leave the user's own cache alone, and see none but what they wrote


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Garbage is looked for once, and not again and again while the modules' million objects gather, which are out of
    its sight from then on; afterwards seldom, for tests make many objects and few circles of them."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000, 20, 20)


def pytest_unconfigure() -> None:
    gc.unfreeze()  # so that what ends with Python can be let go of: nanobind complains about what is not


@pytest.fixture(autouse=True, scope="session")
def rough_costs() -> Iterator[None]:
    """Hundreds of pairs measure what their rounds cost, and no test depends on what was found."""
    from gemma_mtp.engine import costs

    budget, costs.BUDGET_SECONDS = costs.BUDGET_SECONDS, 0.01
    yield
    costs.BUDGET_SECONDS = budget


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    """The numbers of threads that a test sets are those before it again. With more than a worker's share, all tests
    after it would wait for the cores: some took twenty times as long."""
    import torch

    threads, native = torch.get_num_threads(), sys.modules.get("gemma_mtp._native")
    of_native = native and native.threads()
    yield
    torch.set_num_threads(threads)
    if native is not None and native.threads() != of_native:
        native.set_threads(of_native)


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


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pair as we write it, in fp32: `target` and `drafter`, which has centroids."""
    from models import random_drafter, random_target, save_pair

    root = tmp_path_factory.mktemp("saved")
    save_pair(root, random_target(), random_drafter(centroids=True))
    return root


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return shutil.copytree(saved, tmp_path / "pair")


@pytest.fixture(scope="session")
def pair() -> Pair:
    """The bundled pair, where a module has no `pair` of its own. What a test changes of it, it puts back."""
    from gemma_mtp.engine.pair import load_pair

    return load_pair()


@pytest.fixture(scope="module")
def live(pair: Pair) -> Iterator[Live]:
    """A server of the module's `pair`."""
    from live_server import serving

    with serving(pair) as live:
        yield live
