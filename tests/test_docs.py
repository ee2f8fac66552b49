"""The docs stay true: help texts, commands, code blocks and links."""

import re
from pathlib import Path

import cli_docs
import pytest

from gemma_mtp.cli import application

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(path.relative_to(ROOT)) for path in PAGES]


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_cli_page_is_the_commands_own_help() -> None:
    assert cli_docs.DOCS.read_text(encoding="utf-8") == cli_docs.page(), "run `make docs`"


def test_help_leaves_it_to_the_terminal_where_lines_break() -> None:
    for command in application().registered_commands:
        assert command.help and "\n" not in command.help.replace("\n\n", ""), command.callback


def anchors(path: Path) -> set[str]:
    """What GitHub lets links to headings of a page end in."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ +(.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", [*PAGES, ROOT / "CHANGELOG.md"], ids=[*NAMES, "CHANGELOG.md"])
def test_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", path.read_text(encoding="utf-8")):
        if not link.startswith("https://"):
            page, _, anchor = link.partition("#")
            there = path.parent / page if page else path
            assert there.exists(), link
            assert not anchor or anchor in anchors(there), link


def test_the_index_names_every_page() -> None:
    index = ROOT / "docs" / "README.md"
    linked = {
        (index.parent / link).resolve() for link in re.findall(r"\]\(([^)#]+)", index.read_text(encoding="utf-8"))
    }
    assert set(PAGES) - linked == {index, ROOT / "README.md"}


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_make_targets_exist(path: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`?\bmake ([a-z]+)`", path.read_text(encoding="utf-8"))) <= targets


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_options_of_shown_commands_exist(path: Path) -> None:
    helps = cli_docs.page()
    for block in blocks(path, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("gemma-mtp"):
                command = line.split("#")[0]
                assert f"## gemma-mtp {command.split()[1]}\n" in helps, command
                for option in re.findall(r"(?<=\s)--[a-z-]+", command):
                    assert re.search(rf"{option}\s", helps), f"{option} in {line}"


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_python_examples_run(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Blocks of one page share their names, as a reader would type them one after the other."""
    names: dict[str, object] = {}
    for block in blocks(path, "python"):
        exec(compile(block, str(path), "exec"), names)
