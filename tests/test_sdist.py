"""What the source distribution carries: our own files, and nothing that lies beside them."""

import gzip
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from project_address import VARIABLE, address, described, dynamic_metadata, faults, urls

from gemma_mtp import __version__

backend = pytest.importorskip("scikit_build_core.build")

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
URL = "https://example.org/us/gemma-mtp"
TOP = {"src", "tests", "docs", "benchmarks", "examples", "tools", "CMakeLists.txt", "pyproject.toml", "README.md",
       "LICENSE", "CHANGELOG.md", "Makefile", "constraints.txt", "PKG-INFO"}  # fmt: skip


def ours() -> set[str]:
    """Files of the working tree that belong into it, but for what is built."""
    found = {path for name in TOP for path in [ROOT / name, *(ROOT / name).rglob("*")] if path.is_file()}
    return {
        path.relative_to(ROOT).as_posix() for path in found if "__pycache__" not in path.parts and path.suffix != ".so"
    }


def stored(*where: Any, packed: Any = gzip.GzipFile, **how: Any) -> gzip.GzipFile:
    """Without compressing, which takes five seconds; who reads it is here."""
    file: gzip.GzipFile = packed(*where, **{**how, "compresslevel": 0})
    return file


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that was told where the project is, built in a copy of the tree. What lies beside our files (environments,
    builds) is there as a folder with one module: all of it would be looked through for ten seconds."""
    directory, tree = tmp_path_factory.mktemp("sdist"), tmp_path_factory.mktemp("tree")
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, tree)
        elif path.name in TOP:
            shutil.copytree(path, tree / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            (tree / path.name).mkdir()
            (tree / path.name / "module.py").touch()
    (tree / "src" / "gemma_mtp" / "__pycache__").mkdir()
    (tree / "src" / "gemma_mtp" / "__pycache__" / "cli.cpython-311.pyc").touch()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(tree)
        monkeypatch.setenv(VARIABLE, f"{URL}/")
        monkeypatch.setattr(gzip, "GzipFile", stored)
        return directory / str(backend.build_sdist(str(directory)))


def test_the_sdist_carries_just_our_files(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {member.name.split("/", 1)[1] for member in archive if member.isfile()}
    assert {name.split("/")[0] for name in names} == TOP
    assert names - {"PKG-INFO"} == ours()


def test_what_is_built_says_where_the_project_is(sdist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The source distribution, and what is built of it where nobody tells any more."""
    message, tree = described(sdist), f"{URL}/blob/v{__version__}"
    assert message.get_all("Project-URL") == [
        f"Source, {URL}", f"Documentation, {tree}/docs/README.md", f"Changelog, {tree}/CHANGELOG.md",
    ]  # fmt: skip
    text = message.get_payload(decode=True)
    assert isinstance(text, bytes) and message["Description-Content-Type"] == "text/markdown"
    links = re.findall(r"\]\(([^)]+)\)", text.decode())
    assert len(links) == README.count("](") > 20 and all(link.startswith(f"{URL}/") for link in links)
    assert f"{URL}/raw/v{__version__}/docs/use/page.png" in links
    assert all((ROOT / re.split(f"/v{__version__}/|#", link)[1]).is_file() for link in links)
    assert not faults(sdist)

    monkeypatch.delenv(VARIABLE, raising=False)
    with tarfile.open(sdist) as archive:
        for name in ("PKG-INFO", "README.md"):
            member = archive.extractfile(f"{sdist.name.removesuffix('.tar.gz')}/{name}")
            assert member is not None
            (tmp_path / name).write_bytes(member.read())
    monkeypatch.chdir(tmp_path)
    made = dynamic_metadata({}, {"version": __version__})
    assert made == {"readme": {"content-type": "text/markdown", "text": text.decode()}, "urls": urls(message)}


def test_without_an_address_all_is_built_and_nothing_released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv(VARIABLE, raising=False)
    made = dynamic_metadata({}, {"version": __version__})
    assert made == {"readme": {"content-type": "text/markdown", "text": README}, "urls": {}}
    wheel = tmp_path / "gemma_mtp-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("gemma_mtp-1.dist-info/METADATA", f"Metadata-Version: 2.4\n\n{README}")
    check = [sys.executable, str(ROOT / "tools" / "project_address.py"), str(wheel)]
    told = subprocess.run(check, capture_output=True, text=True, check=False)
    assert told.returncode == 1 and f"{wheel.name}: it does not say where the project is" in told.stderr
    assert f"{wheel.name}: its README links to docs/explain/exactness.md" in told.stderr


def test_an_address_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for told in ("example.org/us/gemma-mtp", "https://example.org", "https://example.org/a b"):
        monkeypatch.setenv(VARIABLE, told)
        with pytest.raises(ValueError, match="must be the address"):
            address(ROOT)


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
    monkeypatch.setenv(VARIABLE, URL)
    name = backend.build_wheel(str(tmp_path), settings)
    assert not faults(tmp_path / name)
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
