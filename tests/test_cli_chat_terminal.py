"""`gemma-mtp chat` on a terminal: with prompt_toolkit's editor, and without it."""

import importlib.util
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pty = pytest.importorskip("pty", reason="terminals are tested where there are pseudo-terminals")

#: what a loaded machine may take; only a test that fails waits so long
SECONDS = 60.0
TESTS = Path(__file__).parent
PROGRAM = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C comes as a signal
from table_models import table_pair
from gemma_mtp.cli import main, options
options.PairOptions.load = lambda self: table_pair()
sys.exit(main(["chat", "--target", "none", *sys.argv[1:]]))
"""
EDITOR = importlib.util.find_spec("prompt_toolkit") is not None
CTRL_C, CTRL_D, UP, ALT_ENTER = "\x03", "\x04", "\x1b[A", "\x1b\r"


class Terminal:
    """A chat in a pseudo-terminal: what is typed, and what is on the screen since it was last looked for."""

    def __init__(self, cache: Path, term: str, *arguments: str) -> None:
        self._master, slave = pty.openpty()
        environment = {
            **os.environ,
            "TERM": term,
            "GEMMA_MTP_CACHE": str(cache),
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        environment.pop("NO_COLOR", None)
        environment["PROMPT_TOOLKIT_NO_CPR"] = "1"  # nobody here answers where the cursor is
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *arguments],
            stdin=slave, stdout=slave, stderr=slave, cwd=TESTS, env=environment, start_new_session=True,
        )  # fmt: skip
        os.close(slave)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def expect(self, pattern: str) -> str:
        """Returns what came up to the end of the pattern's match, which is then forgotten."""
        end = time.monotonic() + SECONDS
        while not (found := re.search(pattern, self.seen, re.DOTALL)):
            assert time.monotonic() < end and self._read(), f"{pattern!r} did not come: {self.seen[-2000:]!r}"
        before, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return before

    def ends(self) -> int:
        while self._read():
            pass
        return self.process.wait(SECONDS)

    def _read(self) -> bool:
        if not select.select([self._master], [], [], SECONDS)[0]:
            return False
        try:
            data = os.read(self._master, 65536)
        except OSError:  # the other side is closed
            return False
        self.seen += data.decode(errors="replace")
        return bool(data)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        os.close(self._master)


@contextmanager
def terminal(cache: Path, term: str, *arguments: str) -> Iterator[Terminal]:
    opened = Terminal(cache, term, *arguments)
    try:
        yield opened
    finally:
        opened.close()


@pytest.mark.skipif(not EDITOR, reason="prompt_toolkit is not installed; pip install 'gemma-mtp[chat]'")
def test_a_conversation_in_the_editor(tmp_path: Path) -> None:
    file, history = tmp_path / "talk.json", tmp_path / "chat_history"
    history.write_text('"THINK"\n')  # of an earlier conversation
    with terminal(tmp_path, "xterm-256color", "--thinking", "-k", "2") as shown:
        shown.expect("Ctrl-D ends.*>")
        shown.type(UP + "\r")
        answer = shown.expect(r"tokens/s.*cached")
        assert "\x1b[2;3mTwo " in answer
        assert re.search(r"is four\x1b\[0m.*\r\n\r\n.*The answer ", answer, re.DOTALL), "the thought is apart"
        shown.expect(">")
        shown.type("/edit\r")
        shown.expect(">.*THINK")
        shown.type("\x15/think off" + ALT_ENTER + "TEXT\r")  # which is a message here, and has two lines
        shown.expect("Hello, world.*cached")
        shown.expect(">")
        shown.type("/drafts\r")
        shown.expect("drafts are on.*>")
        shown.type("/edit TEXT\r")
        assert "\x1b[32m" in shown.expect("drafts accepted"), "drafts are green"
        shown.expect(">")
        shown.type(f"/save {file}\r")
        shown.expect("Saved to .*>")
        shown.type("/reset\r")
        shown.expect("begins anew.*>")
        shown.type("LOOP\r")
        shown.expect("and round .*and round ")
        shown.type(CTRL_C)
        shown.expect("ended by a cancellation.*>")
        shown.type("/edit\r")
        shown.expect(">.*LOOP")
        shown.type(CTRL_D)  # which deletes a character where there is one
        shown.type(CTRL_C)
        assert shown.ends() == 130 and "Traceback" not in shown.seen
    assert [m["content"] for m in json.loads(file.read_text())][0::2] == ["TEXT"]
    kept = [json.loads(line) for line in history.read_text().splitlines()]
    assert kept[:2] == ["THINK", "/edit"] and "/think off\nTEXT" in kept


def test_a_conversation_on_a_dumb_terminal(tmp_path: Path) -> None:
    with terminal(tmp_path, "dumb") as shown:
        shown.expect("Ctrl-D ends.*> ")
        shown.type("first \\\n")
        shown.expect(r"\. ")
        shown.type("TEXT\n")
        assert "\x1b[" not in shown.expect("Hello, world.*cached.*> ")
        shown.type("/reset\n")
        shown.expect("begins anew.*> ")
        shown.type("LOOP\n")
        shown.expect("and round .*and round ")
        shown.type(CTRL_C)
        shown.expect("ended by a cancellation.*> ")
        shown.type(CTRL_D)
        assert shown.ends() == 0 and "Traceback" not in shown.seen
    kept = [json.loads(line) for line in (tmp_path / "chat_history").read_text().splitlines()]
    assert kept == ["first \nTEXT", "/reset", "LOOP"]
