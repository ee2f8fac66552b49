"""What the source distribution carries: our own files, and nothing that lies beside them."""

import tarfile
import zipfile
from pathlib import Path

import pytest

backend = pytest.importorskip("scikit_build_core.build")

ROOT = Path(__file__).parents[1]
TOP = {"src", "tests", "docs", "benchmarks", "examples", "tools", "CMakeLists.txt", "pyproject.toml", "README.md",
       "LICENSE", "CHANGELOG.md", "Makefile", "constraints.txt", "PKG-INFO"}  # fmt: skip


def ours() -> set[str]:
    """Files of the working tree that belong into it, but for what is built."""
    found = {path for name in TOP for path in [ROOT / name, *(ROOT / name).rglob("*")] if path.is_file()}
    return {
        path.relative_to(ROOT).as_posix() for path in found if "__pycache__" not in path.parts and path.suffix != ".so"
    }


def test_the_sdist_carries_just_our_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with tarfile.open(tmp_path / backend.build_sdist(str(tmp_path))) as archive:
        names = {member.name.split("/", 1)[1] for member in archive if member.isfile()}
    assert {name.split("/")[0] for name in names} == TOP
    assert names - {"PKG-INFO"} == ours()


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(None, marks=pytest.mark.slow),
        pytest.param({"wheel.cmake": "false", "wheel.py-api": "py3"}, marks=pytest.mark.slow),
    ],
)
def test_without_a_compiler_there_is_a_wheel_for_every_machine(
    settings: dict[str, str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where compiling fails, and where it is told not to."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("CXX", "/bin/false")
    name = backend.build_wheel(str(tmp_path), settings)
    assert name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(tmp_path / name) as archive:
        names = archive.namelist()
    assert "gemma_mtp/__init__.py" in names and not [name for name in names if name.endswith((".so", ".pyd"))]


@pytest.mark.slow
def test_the_wheel_carries_the_package_and_its_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with zipfile.ZipFile(tmp_path / backend.build_wheel(str(tmp_path))) as archive:
        names = set(archive.namelist())
    package = {name.removeprefix("src/") for name in ours() if name.startswith("src/gemma_mtp/")}
    built = {name for name in names if name.startswith("gemma_mtp/_native.") and not name.endswith(".pyi")}
    assert {name for name in names if name.startswith("gemma_mtp/")} == package | built and len(built) == 1
    assert all(name.startswith(("gemma_mtp/", "gemma_mtp-")) for name in names)
