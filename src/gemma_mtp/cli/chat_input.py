"""Where messages come from: a terminal with an editor, a terminal without one, or a pipe."""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import Any, Protocol

from gemma_mtp.cli.chat_files import InputHistory
from gemma_mtp.errors import PromptError

PROMPT, MORE = "> ", ". "


class Source(Protocol):
    """Reads one input after the other."""

    #: whether somebody sits at it, who is shown prompts and can correct what failed
    interactive: bool

    def read(self, default: str = "") -> str | None:
        """The next input, or None at the end. `default` is to be edited. Raises KeyboardInterrupt for Ctrl-C."""


def source() -> Source:
    """The best that is there: prompt_toolkit's editor needs the package and a terminal that can redraw a line."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return Pipe()
    if os.environ.get("TERM", "dumb") == "dumb" or importlib.util.find_spec("prompt_toolkit") is None:
        return Lines(InputHistory())
    return Editor(InputHistory())


class Pipe:
    """A message a line, without prompts. Empty lines are none."""

    interactive = False

    def read(self, default: str = "") -> str | None:
        if default:
            raise PromptError("/edit needs the new text where there is no terminal: /edit TEXT.")
        line = sys.stdin.buffer.readline()  # as bytes, so that a line that is no text does not take others with it
        try:
            return line.decode(sys.stdin.encoding).removeprefix("\ufeff").rstrip("\r\n") if line else None
        except UnicodeDecodeError as error:
            raise PromptError(f"a line of standard input is not {error.encoding} text; convert it.") from None


class Lines:
    """Python's own input, edited with readline where Python has it. A backslash at a line's end takes another line."""

    interactive = True

    def __init__(self, history: InputHistory) -> None:
        self._history, self._readline = history, _readline()
        for text in history.lines:
            if self._readline is not None:
                self._readline.add_history(text.replace("\n", " "))

    def read(self, default: str = "") -> str | None:
        lines = [self._line(PROMPT, default.replace("\n", " "))]
        while lines[-1] is not None and lines[-1].endswith("\\"):
            lines.append(self._line(MORE))
        if lines[0] is None:
            return None
        text = "\n".join([*((line or "").removesuffix("\\") for line in lines[:-1]), lines[-1] or ""])
        self._history.add(text)
        return text

    def _line(self, prompt: str, default: str = "") -> str | None:
        if self._readline is not None:
            self._readline.set_startup_hook(lambda: self._readline.insert_text(default))
        try:
            return input(prompt)
        except EOFError:
            print()
            return None
        except UnicodeDecodeError:
            return "\udcff"  # refused with a sentence, as other text that is none
        finally:
            if self._readline is not None:
                self._readline.set_startup_hook(None)


def _readline() -> Any:
    try:
        import readline
    except ImportError:  # as on Windows
        return None
    return readline


class Editor:
    """prompt_toolkit's: Enter sends, Alt-Enter (Escape, Enter) begins a line, the arrows find what was typed before."""

    interactive = True

    def __init__(self, history: InputHistory) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import InMemoryHistory
        from prompt_toolkit.key_binding import KeyBindings

        keys = KeyBindings()
        keys.add("enter")(lambda event: event.current_buffer.validate_and_handle())
        keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
        self._history = history
        self._session: Any = PromptSession(
            history=InMemoryHistory(history.lines), multiline=True, key_bindings=keys, prompt_continuation=MORE,
            enable_open_in_editor=True, reserve_space_for_menu=0,
        )  # fmt: skip

    def read(self, default: str = "") -> str | None:
        try:
            text = str(self._session.prompt(PROMPT, default=default))
        except EOFError:
            return None
        self._history.add(text)
        return text
