"""Where commands print: tables of any width, and streams of any kind."""

import io
from collections.abc import Callable

import pytest
from rich.console import Console
from rich.table import Table

from gemma_mtp.cli import acceptance_report, main
from gemma_mtp.cli.console import print_table

NUMBERS = [f"{i}.25" for i in range(9)]


def printed(width: int, show: Callable[[Console], object]) -> str:
    file = io.StringIO()
    show(Console(width=width, file=file, force_terminal=False))
    return file.getvalue()


def numbers(no_wrap: bool) -> Table:
    table = Table(box=None, pad_edge=False)
    for i in range(len(NUMBERS)):
        table.add_column(f"column {i}", justify="right", no_wrap=no_wrap)
    table.add_row(*NUMBERS)
    return table


@pytest.mark.parametrize("width", [20, 60, 200])
@pytest.mark.parametrize("no_wrap", [False, True])
def test_no_number_of_a_table_is_cut(width: int, no_wrap: bool) -> None:
    out = printed(width, lambda console: print_table(console, numbers(no_wrap)))
    assert "…" not in out and NUMBERS in [line.split() for line in out.splitlines()]


@pytest.mark.parametrize("label", ["greedy", "temperature 1, thinking off"])
@pytest.mark.parametrize("columns", [1, 5, 17])
def test_shares_of_many_drafts_fit_80_columns(label: str, columns: int) -> None:
    shares = [i / 100 for i in range(columns)]
    tables = acceptance_report._shares(range(columns), {label: shares})
    out = printed(80, lambda console: acceptance_report._section(console, "shares", tables))
    assert "…" not in out and max(map(len, out.splitlines())) <= 80
    rows = [line.removeprefix(label).split() for line in out.splitlines() if label in line]
    assert [float(share) for row in rows for share in row] == shares


@pytest.mark.parametrize("columns", ["0", "x"])
@pytest.mark.parametrize("call", ["recipe vllm", "plan --help"])
def test_a_terminal_of_unknown_width_is_printed_on(
    call: str, columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert main(call.split()) == 0
    assert len(capsys.readouterr().out.split()) > 50
