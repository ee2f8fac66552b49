"""Reads data sets that people have: JSON lines, plain text, source files, and directories of them.

`read_examples` gives one `Example` for each line of a `.jsonl` file and for each other file. A line is an object with
exactly one of

    "text"      text as it stands: a document, or what a completion model shall go on from
    "prompt"    a user's request, which the chat template wraps where the checkpoint has one
    "messages"  a conversation of {"role", "content"} objects for the chat template; what a last turn of the
                assistant's says is left for the model to write. Content is text, or a list of text parts, which are
                joined as the server joins them

and, where the task is to be told apart in reports, "task" (or "category", or "source"). Other keys are ignored. Files
are read line by line, so a large one costs no memory. In a directory, hidden files and what is not UTF-8 text are
passed over; a file that was named must be text.

`Example.token_ids` tokenises one, through the chat template where it is a conversation, and checks the ids against the
target's vocabulary and length limit. `first_lines` cuts a long text to a prompt.

Everything that is wrong with the data raises `DataError`, one sentence that names the file and the line.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from gemma_mtp.chat.prompt import Conversation, Message, chat_text
from gemma_mtp.errors import DataError, TokenizerError
from gemma_mtp.text import check_text
from gemma_mtp.tokenizer import Tokenizer

Kind = Literal["text", "prompt", "messages"]
KINDS: tuple[Kind, ...] = ("text", "prompt", "messages")
#: keys that name an example's task, the first that is there; the last two are MT-Bench's and our own prompts'
TASK_KEYS = ("task", "category", "source")
#: of a file, that must read as text
SAMPLE_BYTES = 8192
JSON_LINES = ".jsonl"
MOST_CHARACTERS_A_TOKEN = 64
ROLES = ("system", "developer", "user", "assistant", "model", "tool")


@dataclass(frozen=True)
class Example:
    """One example: what it says, where it stands (`file` or `file:line`), and its task (default: the file's name)."""

    kind: Kind
    content: str | tuple[Message, ...]
    origin: str
    task: str

    def render(self, tokenizer: Tokenizer, **template_variables: Any) -> str:
        """The text to tokenise: a conversation or prompt through the chat template, up to where the model speaks.

        A prompt stands as it is where the checkpoint has no template. `template_variables` go to the template, such as
        `enable_thinking=True`. Raises DataError where the template is missing for messages or refuses them.
        """
        if not self._is_chat(tokenizer):
            assert isinstance(self.content, str)
            return self.content
        try:
            return chat_text(self.conversation(**template_variables), tokenizer)
        except TokenizerError as error:
            raise DataError(f"{self.origin} can not be rendered as a conversation: {error}") from None

    def token_ids(
        self,
        tokenizer: Tokenizer,
        *,
        vocab_size: int | None = None,
        max_tokens: int | None = None,
        **template_variables: Any,
    ) -> list[int]:
        """The rendered text's ids. Raises DataError for one outside the vocabulary and for more than `max_tokens`."""
        text = self.render(tokenizer, **template_variables)
        ids = tokenizer.encode(text, special=not self._is_chat(tokenizer))  # a template writes its own special tokens
        check_token_ids(ids, self.origin, vocab_size, max_tokens)
        return ids

    def _is_chat(self, tokenizer: Tokenizer) -> bool:
        """Whether it goes through the chat template."""
        return self.kind == "messages" or (self.kind == "prompt" and tokenizer.chat_template is not None)

    def conversation(self, **template_variables: Any) -> Conversation:
        """Returns a prompt, or messages up to where the model speaks, for the chat template."""
        if isinstance(self.content, str):
            return Conversation.of_user(self.content, variables=template_variables)
        answered = self.content[-1]["role"] in ("assistant", "model")
        return Conversation(self.content[:-1] if answered else self.content, variables=template_variables)


def check_token_ids(
    token_ids: Sequence[int], origin: str, vocab_size: int | None = None, max_tokens: int | None = None
) -> None:
    """Raise DataError where an example has no token, one outside the vocabulary, or more than `max_tokens`."""
    if not token_ids:
        raise DataError(f"{origin} has no tokens; leave it out.")
    if vocab_size is not None and max(token_ids) >= vocab_size:
        raise DataError(
            f"{origin} has token id {max(token_ids)}, but the target's ids end at {vocab_size - 1};"
            " the tokenizer is not this target's."
        )
    if max_tokens is not None and len(token_ids) > max_tokens:
        raise DataError(f"{origin} has {len(token_ids)} tokens, but at most {max_tokens} are taken; shorten it.")


def read_examples(paths: Path | Iterable[Path], pattern: str = "*") -> Iterator[Example]:
    """Examples of files and directories, in the order given, and by name inside a directory.

    `pattern` (such as "*.py") chooses files by name inside directories. Raises DataError, also where there is no
    example at all.
    """
    given = [paths] if isinstance(paths, Path) else list(paths)
    count = 0
    for path in given:
        for example in _read(path, pattern):
            count += 1
            yield example
    if count == 0:
        chosen = "" if pattern == "*" else f" of the pattern {pattern!r}"
        raise DataError(f"{', '.join(map(str, given))} has no text file{chosen}; give a file or directory that has.")


def _read(path: Path, pattern: str) -> Iterator[Example]:
    if path.is_dir():
        for inside in sorted(path.rglob("*")):
            relative = inside.relative_to(path)
            hidden = any(part.startswith(".") or part == "__pycache__" for part in relative.parts)
            if not hidden and fnmatch(inside.name, pattern) and inside.is_file() and _is_text(inside):
                yield from _read_file(inside, relative.as_posix())
    else:
        yield from _read_file(path, path.name)


def _read_file(path: Path, name: str) -> Iterator[Example]:
    if path.suffix == JSON_LINES:
        yield from _read_json_lines(path, name)
    else:
        text = "".join(_lines(path))
        if not text.strip():
            raise DataError(f"{path} is empty; leave it out, or give a file with text.")
        yield Example("text", text, str(path), name)


def _read_json_lines(path: Path, name: str) -> Iterator[Example]:
    count = 0
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            count += 1
            yield _parse(line, f"{path}:{number}", name)
    if count == 0:
        raise DataError(f"{path} is empty; leave it out, or give a file with text.")


def _lines(path: Path) -> Iterator[str]:
    """Lines of a UTF-8 file without its byte order mark; DataError where it can not be read."""
    number = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield line.decode("utf-8-sig" if number == 1 else "utf-8").replace("\r\n", "\n")
    except OSError as error:
        raise DataError(f"{path} can not be read: {error.strerror or error}.") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}:{number} is not UTF-8 text; convert the file, or leave it out.") from None


def _is_text(path: Path) -> bool:
    """Whether a file's beginning reads as text: UTF-8 without null bytes."""
    try:
        with path.open("rb") as file:
            head = file.read(SAMPLE_BYTES)
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        return (
            error.start >= len(head) - 4 and len(head) == SAMPLE_BYTES and b"\0" not in head
        )  # cut inside a character
    except OSError as error:
        raise DataError(f"{path} can not be read: {error.strerror or error}.") from None
    return b"\0" not in head and bool(head.strip())


def _parse(line: str, origin: str, name: str) -> Example:
    try:
        return _example(json.loads(line), origin, name, may_be_halves="\\u" in line)
    except ValueError as error:  # also a number too long
        raise DataError(f"{origin} is not valid JSON ({error}); each line must be one JSON object.") from None
    except RecursionError:
        raise DataError(f"{origin} is not valid JSON that we read (nested too deeply); flatten it.") from None


def _example(entry: object, origin: str, name: str, may_be_halves: bool) -> Example:
    """`may_be_halves`: of surrogate pairs, which only an escape can write."""
    if not isinstance(entry, dict):
        found = type(entry).__name__
        raise DataError(f'{origin} is a JSON {found}, but an object such as {{"text": "…"}} is expected.')
    kinds = [kind for kind in KINDS if kind in entry]
    if len(kinds) != 1:
        found = " and ".join(kinds) or ", ".join(map(str, entry)) or "nothing"
        raise DataError(f"{origin} must have exactly one of text, prompt and messages, but has {found}.")
    kind = kinds[0]
    content = _messages(entry[kind], origin) if kind == "messages" else _text(entry[kind], kind, origin)
    task = next((entry[key] for key in TASK_KEYS if entry.get(key) is not None), name)
    if may_be_halves:
        used = [entry[kind], *(entry.get(key) for key in TASK_KEYS)]
        check_text(json.dumps(used, ensure_ascii=False), origin, DataError)
    return Example(kind, content, origin, str(task))


def _text(value: object, kind: Kind, origin: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{origin} has {kind} = {_shown(value)}, but text that is not empty is expected.")
    return value


def _messages(value: object, origin: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{origin} has messages = {_shown(value)}, but a list of messages is expected.")
    for i, message in enumerate(value, start=1):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES or not isinstance(message.get("content"), str | list):
            raise DataError(
                f"{origin} has message {i} = {_shown(message)}, but an object with content and a role"
                f" ({', '.join(ROLES)}) is expected."
            )
        content = message["content"]
        if not isinstance(content, str) and not (content and all(map(_is_text_part, content))):
            raise DataError(
                f"{origin} has message {i} with content = {_shown(content)}, but text, or a list of parts such as"
                ' {"type": "text", "text": "…"}, is expected.'
            )
    if value[-1]["role"] in ("assistant", "model") and len(value) == 1:
        raise DataError(f"{origin} has the assistant's message only; put the user's before it.")
    return tuple(Conversation(value).messages)


def _is_text_part(part: object) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _shown(value: object, limit: int = 60) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def first_lines(text: str, tokenizer: Tokenizer, max_tokens: int) -> str:
    """A prompt from a text's beginning, as far as `max_tokens` tokens (BOS included) reach; short texts are kept whole.

    Whole lines, without the last newline, so that the model writes it and what follows; part of the first line where
    not even that fits.
    """
    sample = text[: MOST_CHARACTERS_A_TOKEN * max_tokens]  # tokenising a long text for its beginning would be slow
    encoding = tokenizer.raw.encode(sample, add_special_tokens=False)
    kept = max_tokens - len(tokenizer.encode(""))
    if len(encoding.ids) <= kept:
        return sample
    end = encoding.offsets[kept][0]
    return text[: max(0, text.rfind("\n", 0, end))].rstrip("\n") or text[:end]
