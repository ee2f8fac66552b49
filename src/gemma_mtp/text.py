"""Text from outside: files, standard input, and what callers hand over.

A Python string may hold what is no text: half a surrogate pair, from `"\\ud83d"` in JSON or from bytes of the command
line that are not UTF-8. No tokenizer takes it and nothing can print it, so it is refused where it comes in.
"""

from __future__ import annotations

from pathlib import Path

from gemma_mtp.errors import GemmaMtpError


def is_text(text: str) -> bool:
    """Whether every character is a whole one, none half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_text(text: str, what: str, error_type: type[GemmaMtpError]) -> str:
    """The text as it is; an error of that type where it has half a surrogate pair. `what`: its name in the message."""
    if not is_text(text):
        raise error_type(f"{what} has half a surrogate pair or bytes that are not UTF-8, which is not text; remove it.")
    return text


def read_text(file: Path, what: str, error_type: type[GemmaMtpError]) -> str:
    """A UTF-8 file's text without its byte order mark; an error of that type where it can not be read."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise error_type(f"the {what} {file} can not be read: {error.strerror or error}.") from None
    except UnicodeDecodeError:
        raise error_type(f"the {what} {file} is not UTF-8 text; convert it.") from None
    except ValueError:  # a name with a null character
        raise error_type(f"the {what} {str(file)!r} can not be read: no file has such a name.") from None
