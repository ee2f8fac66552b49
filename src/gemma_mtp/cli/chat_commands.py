"""What can be typed beside messages: lines that begin with a slash."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gemma_mtp.cli import chat_files
from gemma_mtp.cli.chat_screen import Screen
from gemma_mtp.cli.chat_session import Session
from gemma_mtp.errors import PromptError, TokenizerError

HELP = """\
/retry            answer the last message again
/edit [TEXT]      change the last message, and send it again
/system [TEXT]    set the system message; without TEXT there is none
/think on|off     let the model think first, or not
/drafts           colour tokens: accepted drafts, corrections, bonus tokens
/drop [N]         leave out the N oldest turns (1)
/reset            begin anew; the system message stays
/save FILE        write the conversation as JSON; --load FILE goes on with it
/help             this list
/quit             end; so does Ctrl-D
//...             a message that begins with a slash
Alt-Enter, or a backslash at the end without prompt_toolkit, begins a line.
Ctrl-C stops an answer, which stays as far as it came; at the prompt it ends the chat."""


class QuitError(Exception):
    """The conversation is over."""


@dataclass
class Commands:
    """Runs commands on a session. A result that is true: the last message is to be answered now.

    `edited` gives what becomes of a message that is to be edited, or None where that is given up.
    """

    session: Session
    screen: Screen
    edited: Callable[[str], str | None]

    def run(self, line: str) -> bool:
        """Run one. Raises PromptError and TokenizerError for what can not be done, QuitError at the end."""
        name, _, rest = line[1:].strip().partition(" ")
        alone: dict[str, Callable[[], bool | None]] = {
            "retry": self._retry, "drafts": self._drafts, "reset": self._reset, "help": self._help, "quit": self._quit,
        }  # fmt: skip
        followed: dict[str, Callable[[str], bool | None]] = {
            "edit": self._edit, "system": self._system, "think": self._think, "drop": self._drop, "save": self._save,
        }  # fmt: skip
        if name in followed:
            return bool(followed[name](rest.strip()))
        if name not in alone:
            raise PromptError(f"there is no command /{name}; /help lists them, and // begins a message with a slash.")
        if rest:
            raise PromptError(f"/{name} is followed by nothing; // begins a message with a slash.")
        return bool(alone[name]())

    def _retry(self) -> bool:
        if self.session.last_message is None:
            raise PromptError("there is nothing to answer again; send a message first.")
        if not self.session.waiting:
            if self.session.greedy:
                self.screen.tell("Greedy decoding gives the same answer again; --temperature 0.7 gives others.")
            self.session.take_back_answer()
            self.session.seed += 1
        return True

    def _edit(self, rest: str) -> bool:
        last = self.session.last_message
        if last is None:
            raise PromptError("there is no message to edit; send one first.")
        text = rest or self.edited(last)
        if text is None or not text.strip():
            return False
        self.session.take_back_answer()
        self.session.say(text)
        return True

    def _system(self, rest: str) -> None:
        self.session.system = rest or None
        self.screen.tell("The system message is set." if rest else "There is no system message.")

    def _think(self, rest: str) -> None:
        if rest not in ("on", "off"):
            raise PromptError("/think is followed by on or off.")
        if rest == "on" and not self.session.can_think:
            raise TokenizerError("/think needs a chat template with a switch for it, and the target's has none.")
        self.session.thinking = rest == "on"
        self.screen.tell(f"Thinking is {rest}.")

    def _drafts(self) -> None:
        self.screen.drafts = not self.screen.drafts
        self.screen.tell(f"Colours of drafts are {'on' if self.screen.drafts else 'off'}.")

    def _drop(self, rest: str) -> None:
        if rest and not (rest.isascii() and rest.isdigit() and 0 < len(rest) < 10 and int(rest)):
            raise PromptError("/drop is followed by a number of turns, 1 or more, or by nothing for one.")
        dropped = self.session.drop(int(rest or 1))
        if not dropped:
            raise PromptError("there is no older turn to leave out; /reset begins anew.")
        self.screen.tell(f"Left out the oldest {'turn' if dropped == 1 else f'{dropped} turns'}.")

    def _reset(self) -> None:
        self.session.messages.clear()
        self.screen.tell("The conversation begins anew.")

    def _save(self, rest: str) -> None:
        if not rest:
            raise PromptError("/save is followed by the name of a file.")
        chat_files.save(Path(rest), self.session.system, self.session.messages)
        self.screen.tell(f"Saved to {rest}.")

    def _help(self) -> None:
        self.screen.tell(HELP)

    def _quit(self) -> None:
        raise QuitError
