"""The package's shape: which part may import which, file by file, and what importing it costs."""

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import gemma_mtp

PACKAGE = Path(gemma_mtp.__file__).parent
#: a part may import those on lower levels, and its own; nothing imports upwards
LEVELS = {
    "errors": 0, "interrupts": 0, "units": 0, "progress": 0, "cpu_clock": 0, "freed_memory": 0, "huge_pages": 0,
    "_native": 0, "files": 0, "json_files": 0, "locate": 0, "hub": 1,
    "families": 0, "text": 1, "chat": 1, "config": 1, "weight_types": 1, "tokenizer": 1, "ops": 1, "weights": 1,
    "datasets": 2, "model": 2, "kv": 2, "decoding": 2, "sizes": 2,
    "checkpoint": 3, "backend": 3, "interop": 4,
    "engine": 4, "measure": 5, "recipes": 6, "training": 6, "server": 7, "cli": 8,
}  # fmt: skip


@functools.cache
def nodes_of(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def imports(path: Path) -> Iterator[str]:
    """Modules of the package that a file imports, those imported in functions and for types alone too."""
    for node in nodes_of(path):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "gemma_mtp":
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if module_file(whole) else str(node.module)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "gemma_mtp")


def module_file(name: str) -> Path | None:
    path = PACKAGE.joinpath(*name.split(".")[1:])
    return next((found for found in (path.with_suffix(".py"), path / "__init__.py") if found.is_file()), None)


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(path for path in PACKAGE.rglob("*.py") if part_of(path) not in ("__init__", "__main__", "bundled"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    part = part_of(path)
    assert part in LEVELS, f"say on which level {part} is"
    for imported in {name.split(".")[1] for name in imports(path) if "." in name} - {part, "__version__", "_native"}:
        assert LEVELS[imported] < LEVELS[part] or (LEVELS[imported], LEVELS[part]) in SAME, f"{part} imports {imported}"


#: parts of one level that import each other in one direction only, which the test of circles holds
SAME = {(level, level) for level in (0, 1, 2)}


def test_no_files_import_each_other_in_a_circle() -> None:
    graph = {path: {found for name in imports(path) if (found := module_file(name))} - {path} for path in FILES}
    graph = {path: {found for found in needed if found != PACKAGE / "__init__.py"} for path, needed in graph.items()}
    assert list(TopologicalSorter(graph).static_order())
    first, second = FILES[:2]
    with pytest.raises(CycleError):
        list(TopologicalSorter({**graph, first: {second}, second: {first}}).static_order())


def test_the_rule_sees_a_wrong_import(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.py"
    wrong.write_text("from gemma_mtp.engine.pair import Pair\nimport gemma_mtp.cli\nfrom gemma_mtp import checkpoint\n")
    assert list(imports(wrong)) == ["gemma_mtp.engine.pair", "gemma_mtp.cli", "gemma_mtp.checkpoint"]


@pytest.mark.parametrize(
    "name", ["kv.blocks", "engine.scheduler", "engine.settings", "engine.pool_size", "measure.plan"]
)
def test_who_counts_knows_no_tensors(name: str) -> None:
    """Bookkeeping is integers: none of these, nor what they import of ours, imports torch."""
    seen, left = set[str](), [f"gemma_mtp.{name}"]
    while left:
        module = left.pop()
        path = module_file(module)
        if module in seen or path is None:
            continue
        seen.add(module)
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\b(import|from) torch\b", text), f"{module} imports torch"
        left += [found for found in imports(path) if found.count(".")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_are_written_by_one_helper(path: Path) -> None:
    """`files.replace`, which honours the umask. What makes temporary files of its own makes them private (0600)."""
    names = {alias.name for node in nodes_of(path) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in nodes_of(path) if isinstance(node, ast.ImportFrom)}
    assert not {name.split(".")[0] for name in names} & {"tempfile", "safetensors"}


def test_public_names_are_there() -> None:
    assert all(getattr(gemma_mtp, name) is not None for name in gemma_mtp.__all__)
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        _ = gemma_mtp.absent


def test_the_package_needs_no_test_dependency() -> None:
    """Generating works where what only tests and extras need can not be imported."""
    code = (
        "import sys\n"
        "for name in ('transformers', 'scipy', 'hypothesis', 'pytest', 'fastapi', 'uvicorn', 'llguidance',\n"
        "             'safetensors'):\n"
        "    sys.modules[name] = None\n"
        "from gemma_mtp import progress\n"
        "progress.LINE_SECONDS = 3600.0\n"  # which a busy machine would show
        "from gemma_mtp.cli import main\n"
        "sys.exit(main(['generate', 'import', '-n', '4', '-q']))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, gemma_mtp; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
