"""Conversations as files, JSON lists of messages, and the history of what was typed."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from gemma_mtp.chat.template import REASONING
from gemma_mtp.engine.cost_cache import cache_directory
from gemma_mtp.errors import PromptError
from gemma_mtp.json_files import write_json
from gemma_mtp.text import is_text, read_text

#: what was typed last is kept, and no more of it
KEPT_LINES = 1000

log = logging.getLogger(__name__)


def save(path: Path, system: str | None, messages: list[dict[str, Any]]) -> None:
    """Write a conversation, whole or not at all. Raises CheckpointError, PromptError for what is no file's name."""
    before = [] if system is None else [{"role": "system", "content": system}]
    if "\0" in str(path) or not is_text(str(path)):
        raise PromptError(f"no file can be named {str(path)!r}; give another name.")
    if path.is_dir():
        raise PromptError(f"{path} is a directory; give the name of a file.")
    write_json(path, [*before, *messages])


def load(path: Path) -> tuple[str | None, list[dict[str, Any]]]:
    """Returns the system's message and the others of a file. Raises PromptError where it holds no conversation."""
    text = read_text(path, "conversation", PromptError)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PromptError(
            f"the conversation {path} is not valid JSON ({error}); give a file that /save wrote."
        ) from None
    messages = content.get("messages") if isinstance(content, dict) else content
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise PromptError(
            f"the conversation {path} must be a list of objects with a role and a content, both text; give a file that"
            " /save wrote."
        )
    system = str(messages[0]["content"]) if messages and messages[0]["role"] == "system" else None
    turns = messages if system is None else messages[1:]
    if any(message["role"] != ("user", "assistant")[i % 2] for i, message in enumerate(turns)):
        raise PromptError(
            f"the conversation {path} must have messages of user and assistant in turn, after at most one of system;"
            " remove the others."
        )
    return system, turns


def _is_message(message: object) -> bool:
    """A role and a content of text, and perhaps a thought: a field of anything else would be left out silently."""
    if not isinstance(message, dict) or not {"role", "content"} <= set(message) <= {"role", "content", *REASONING}:
        return False
    return all(isinstance(value, str) and is_text(value) for value in message.values())


class InputHistory:
    """What was typed, kept in the cache directory for the next conversation: one JSON string a line, for the user
    alone. A file that can not be read or written stops nothing: what is typed is then known until the end only."""

    def __init__(self, directory: Path | None = None) -> None:
        directory = directory or cache_directory()
        self._path = None if directory is None else directory / "chat_history"
        self.lines = self._read()

    def add(self, text: str) -> None:
        """Append what was typed, unless it is nothing, no text, or what was typed last."""
        if not text.strip() or not is_text(text) or self.lines[-1:] == [text]:
            return
        self.lines.append(text)
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            cut = len(self.lines) > 2 * KEPT_LINES
            self.lines = self.lines[-KEPT_LINES:] if cut else self.lines
            flags = os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if cut else os.O_APPEND)
            with os.fdopen(os.open(self._path, flags, 0o600), "w", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in (self.lines if cut else [text]))
        except OSError as error:
            log.info("%s can not be written: %s", self._path, error)

    def _read(self) -> list[str]:
        try:
            lines = [] if self._path is None else self._path.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            log.info("%s can not be read: %s", self._path, error)
            return []
        return [text for line in lines if (text := _string(line)) is not None]


def _string(line: str) -> str | None:
    """A line's text; None for one that a broken write left."""
    try:
        text = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return text if isinstance(text, str) and is_text(text) else None
