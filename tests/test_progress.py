"""What is shown of long work: on terminals of any width, dumb ones, in pipes."""

import io
import re
import sys
import types

import pytest
from live_server import wait_for
from rich.console import Console

from gemma_mtp import progress
from gemma_mtp.progress import Display

TEXT = "step 120 loss 1.234 accepts 0.81 0.74 0.69 0.66 0.61 length 3.41 5210 tokens/s"


def console(monkeypatch: pytest.MonkeyPatch, terminal: bool, width: int = 80, dumb: bool = False) -> io.StringIO:
    monkeypatch.setenv("TERM", "dumb" if dumb else "xterm")
    stream = io.StringIO()
    made = {"file": stream, "force_terminal": terminal, "width": width}
    monkeypatch.setattr(progress, "Console", lambda **given: Console(**{**given, "stderr": False, **made}))
    return stream


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_a_terminal_of_any_width_has_bar_percentage_and_time_left_on_one_line(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    console(monkeypatch, terminal=True, width=width)
    display = Display("drafter", patience=3600)
    with display:
        display.show(TEXT, 0.25)
        assert display._made_bar is not None
        plain = Console(file=io.StringIO(), width=width, force_terminal=False)
        plain.print(display._made_bar[0].get_renderable())
    lines = plain.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(lines) == 1 and len(lines[0]) <= width
    assert re.search(r"drafter +[━╸╺ -]+ +25% +--:-- ", lines[0]), lines[0]
    assert ("tokens/s" in lines[0]) == (width == 200)


def test_a_bar_comes_after_its_patience_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = console(monkeypatch, terminal=True)
    with Display("loading", patience=0.0) as display:
        wait_for(lambda: "loading" in stream.getvalue())
        display.show("9 GB", 0.5)
    stream = console(monkeypatch, terminal=True)
    with Display("loading", patience=3600) as display:
        display.show("9 GB", 0.5)
    assert stream.getvalue() == ""


@pytest.mark.parametrize("dumb", [False, True])
def test_a_pipe_and_a_dumb_terminal_get_a_line_now_and_then(dumb: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = console(monkeypatch, terminal=dumb, dumb=dumb)
    monkeypatch.setattr(progress, "LINE_SECONDS", 3600.0)
    with Display("drafter") as display:
        for step in range(100):
            display.show(f"step {step}", step / 100)
    assert stream.getvalue() == ""
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    display = Display("drafter", patience=3600)
    with display:
        display.show("step 1", 4.36)
        display.show("step 2")
    assert stream.getvalue().splitlines() == ["drafter 100% step 1", "drafter step 2"]


def test_a_pipe_hears_of_work_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = console(monkeypatch, terminal=False)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.01)
    with Display("loading", patience=0.0):
        wait_for(lambda: stream.getvalue().count("loading\n") >= 2)


def test_bytes_are_shown_in_the_unit_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = console(monkeypatch, terminal=False)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    with Display("quantising", patience=3600) as display:
        display.show_bytes(3_200_000_000, 64_000_000_000)
        display.show_bytes(500_000, 2_000_000)
        display.show_bytes(0, 0)
    with progress.loading() as told:
        told("drafter", 10_000_000, 40_000_000)
    assert stream.getvalue().splitlines() == [
        "quantising 5% 3.2 of 64.0 GB", "quantising 25% 0.5 of 2.0 MB", "quantising 0.0 of 0.0 MB",
        "loading the drafter 25% 10.0 of 40.0 MB",
    ]  # fmt: skip


def test_a_notebook_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through IPython's display, which shows them under the cell; nothing is redrawn there."""
    shown: list[str] = []
    module = types.ModuleType("IPython.display")
    module.display = lambda made: shown.append(made._repr_mimebundle_([], [])["text/plain"])  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    monkeypatch.setattr(progress, "Console", lambda **given: Console(**{**given, "force_jupyter": True}))
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    with Display("loading", patience=3600) as display:
        assert display._made_bar is None
        display.show("9 GB", 0.25)
        display.say("a line")
    assert shown == ["loading 25% 9 GB\n", "a line\n"]


def test_a_quiet_display_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = console(monkeypatch, terminal=False)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    with Display("drafter", 0.0, quiet=True) as display:
        display.show("step 1", 0.5)
        display.say("a line")
    assert stream.getvalue() == ""
