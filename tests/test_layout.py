"""The package's shape: which part may import which, and what importing it costs."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import gemma_mtp

PACKAGE = Path(gemma_mtp.__file__).parent
#: a part may import those on lower levels, and its own; leaves may be imported by all and import no other part
LEVELS = {"ops": 0, "model": 1, "decoding": 2, "engine": 3, "measure": 4, "training": 5, "server": 6, "cli": 7}
LEAVES = {
    "_native", "errors", "text", "conversation", "config", "config_fields", "config_values", "rope_config",
    "generation_config", "tensor_names",
    "json_files", "cpu_clock", "kv_cache", "pairing", "weight_types", "datasets",
}  # fmt: skip
#: parts that hold checkpoints, which the engine and all above it may import
CHECKPOINTS = {"checkpoint", "weight_files"}
LEAVES |= {"tokenizer", "tokenizer_files", "token_text", "output_text", "chat_template"}
#: what a leaf needs beside other leaves
ALLOWED = {
    ("kv_cache", "ops"), ("checkpoint", "model"), ("checkpoint", "ops"), ("checkpoint", "weight_files"),
    ("weight_files", "ops"), ("quantised_copy", "checkpoint"), ("cli", "quantised_copy"),
}  # fmt: skip


def imports(path: Path) -> Iterator[str]:
    """Parts of the package a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for module in modules:
            parts = module.split(".")
            if parts[0] == "gemma_mtp" and len(parts) > 1:
                yield parts[1]


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(path for path in PACKAGE.rglob("*.py") if part_of(path) not in ("__init__", "__main__", "bundled"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    part = part_of(path)
    for imported in set(imports(path)) - {part, "__version__"} - LEAVES:
        if (part, imported) in ALLOWED or (imported in CHECKPOINTS and LEVELS.get(part, 0) >= LEVELS["engine"]):
            continue
        assert part in LEVELS, f"{part} is a leaf and must not import {imported}"
        assert LEVELS[imported] < LEVELS[part], f"{part} must not import {imported}"


def test_the_rule_sees_a_wrong_import(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.py"
    wrong.write_text("from gemma_mtp.engine.pair import Pair\nimport gemma_mtp.cli\n")
    assert list(imports(wrong)) == ["engine", "cli"]


def test_public_names_are_there() -> None:
    assert all(getattr(gemma_mtp, name) is not None for name in gemma_mtp.__all__)
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        _ = gemma_mtp.absent


def test_the_package_needs_no_test_dependency() -> None:
    """Generating works where what only tests and extras need can not be imported."""
    code = (
        "import sys\n"
        "for name in ('transformers', 'scipy', 'hypothesis', 'pytest', 'fastapi', 'uvicorn', 'llguidance'):\n"
        "    sys.modules[name] = None\n"
        "from gemma_mtp.cli import main\n"
        "sys.exit(main(['generate', 'import', '-n', '4', '-q']))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, gemma_mtp; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=300, check=False).returncode == 0
