"""What is shown of long work: on terminals of any width, dumb ones, in pipes."""

import io
import itertools
import logging
import re
import sys
import types

import pytest
from live_server import wait_for
from rich.console import Console

from gemma_mtp import progress
from gemma_mtp.cli.console import LogLines
from gemma_mtp.progress import Display

TEXT = "step 120 loss 1.234 accepts 0.81 0.74 0.69 0.66 0.61 length 3.41 5210 tokens/s"


def console(monkeypatch: pytest.MonkeyPatch, terminal: bool, width: int = 80, dumb: bool = False) -> io.StringIO:
    monkeypatch.setenv("TERM", "dumb" if dumb else "xterm")
    stream = io.StringIO()
    made = {"file": stream, "force_terminal": terminal, "width": width}
    monkeypatch.setattr(progress, "Console", lambda **given: Console(**{**given, "stderr": False, **made}))
    return stream


def lines_at_once(monkeypatch: pytest.MonkeyPatch, seconds: float = 0.0) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", seconds)
    monkeypatch.setattr(progress, "SAME_SECONDS", seconds)


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
    lines_at_once(monkeypatch, 3600.0)
    with Display("drafter") as display:
        for step in range(100):
            display.show(f"step {step}", step / 100)
    assert stream.getvalue() == ""
    lines_at_once(monkeypatch)
    display = Display("drafter", patience=3600)
    with display:
        display.show("step 1", 4.36)
        display.show("step 2")
    assert stream.getvalue().splitlines() == ["drafter 100% step 1", "drafter step 2"]


def test_a_pipe_hears_of_work_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = console(monkeypatch, terminal=False)
    lines_at_once(monkeypatch, 0.01)
    with Display("loading", patience=0.0):
        wait_for(lambda: stream.getvalue().count("loading\n") >= 2)


def test_a_pipe_gets_a_line_where_there_is_something_new_or_long_was_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a load that takes half an hour and says something ten times a second, and of work that says nothing."""
    now, told = [0.0], []
    monkeypatch.setattr("gemma_mtp.progress.time.monotonic", lambda: now[0])
    stream = console(monkeypatch, terminal=False)
    display = Display("loading")
    for tick in range(18_000):
        now[0] = tick / 10
        before = stream.tell()
        display.show_bytes(tick, 18_000)
        if stream.tell() > before:
            told.append(now[0])
    assert 19 <= len(told) <= 31 and min(b - a for a, b in itertools.pairwise(told)) >= 10
    before = stream.tell()
    for _ in range(600):
        now[0] += 1
        display._line_if_due()
    assert 9 <= stream.getvalue()[before:].count("\n") <= 11


@pytest.mark.parametrize("terminal", [False, True])
def test_a_stage_inside_another_is_shown_in_its_place(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = console(monkeypatch, terminal=terminal)
    lines_at_once(monkeypatch, 0.01)
    with Display("generating", patience=0.0) as outer:
        wait_for(lambda: "generating" in stream.getvalue())
        with progress.loading() as told:
            inner = Display._entered[-1]
            told("target", 1, 4)
            wait_for(lambda: "loading the target" in stream.getvalue())
            begin = stream.tell()
            outer.show("not now", 0.5)
            outer.say("a line")
            for _ in range(3):
                outer._line_if_due()
            bars = [display._made_bar and display._made_bar[0].live.is_started for display in (outer, inner)]
            assert bars == ([False, True] if terminal else [None, None])
            assert "not now" not in stream.getvalue()[begin:] and "generating" not in stream.getvalue()[begin:]
        begin = stream.tell()
        wait_for(lambda: "generating" in stream.getvalue()[begin:])
    assert not Display._entered and "a line" in stream.getvalue()


def test_what_is_said_or_logged_meanwhile_stands_above_the_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would come into the bar's own line, if it were written past what draws that."""
    stream, logger = console(monkeypatch, terminal=True), logging.getLogger("gemma_mtp.test")
    monkeypatch.setattr(logger, "handlers", [LogLines()])
    monkeypatch.setattr(logger, "propagate", False)
    with Display("loading", patience=0.0):
        wait_for(lambda: "loading" in stream.getvalue())
        logger.warning("a warning")
        progress.say("a line")
    assert re.search(r"\r(\x1b\[\d?[A-Z])*a warning\n", stream.getvalue())
    assert re.search(r"\r(\x1b\[\d?[A-Z])*a line\n", stream.getvalue())
    logger.warning("a warning after")
    assert capsys.readouterr().err == "a warning after\n"


def test_what_is_printed_to_a_file_meanwhile_goes_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rich would send it to the terminal that has the bar."""
    stream = console(monkeypatch, terminal=True)
    with Display("generating", patience=0.0):
        wait_for(lambda: "generating" in stream.getvalue())
        print("the output")
    assert capsys.readouterr().out == "the output\n" and "the output" not in stream.getvalue()


def test_bytes_are_shown_in_the_unit_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = console(monkeypatch, terminal=False)
    lines_at_once(monkeypatch)
    with Display("quantising", patience=3600) as display:
        display.show_bytes(3_200_000_000, 64_000_000_000)
        display.show_bytes(500_000, 2_000_000)
        display.show_bytes(0, 0)
    with progress.loading() as told:
        told("drafter", 10_000_000, 40_000_000)
    assert stream.getvalue().splitlines() == [
        "quantising 5% 3.2 of 64.0 GB", "quantising 25% 0.5 of 2.0 MB", "quantising 0 of 0 B",
        "loading the drafter 25% 10.0 of 40.0 MB",
    ]  # fmt: skip


def test_a_notebook_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through IPython's display, which shows them under the cell; nothing is redrawn there."""
    shown: list[str] = []
    module = types.ModuleType("IPython.display")
    module.display = lambda made: shown.append(made._repr_mimebundle_([], [])["text/plain"])  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    monkeypatch.setattr(progress, "Console", lambda **given: Console(**{**given, "force_jupyter": True}))
    lines_at_once(monkeypatch)
    with Display("loading", patience=3600) as display:
        assert display._made_bar is None
        display.show("9 GB", 0.25)
        display.say("a line")
    assert shown == ["loading 25% 9 GB\n", "a line\n"]


def test_a_quiet_display_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = console(monkeypatch, terminal=False)
    lines_at_once(monkeypatch)
    with Display("drafter", 0.0, quiet=True) as display:
        display.show("step 1", 0.5)
        display.say("a line")
    assert stream.getvalue() == ""
