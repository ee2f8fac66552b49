"""Write docs/use/cli.md from the commands' own help texts: `python tools/cli_docs.py`. A test holds the two equal."""

from __future__ import annotations

import contextlib
import functools
import io
import os
from pathlib import Path
from unittest import mock

from typer.main import get_command_name

from gemma_mtp.cli import application, main

#: so that the page does not depend on the terminal
TERMINAL = {"TERMINAL_WIDTH": "100", "COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}

DOCS = Path(__file__).parents[1] / "docs" / "use" / "cli.md"
INTRODUCTION = """# The command line

Written by `make docs` from the commands' own help; do not edit.

| exit code | |
|---|---|
| 0 | done |
| 1 | `generate --compare` or `identity` found different outputs, or `inspect` a pair that does not fit |
| 1 | `doctor` found something wrong, or more of `bench-serve`'s requests failed than may |
| 2 | bad input: one sentence on standard error says what to do |
| 3 | `train` did not export, because the drafter is worse than the one it started from |
| 4 | the length limit cut an output of `generate` before the schema or expression was fulfilled |
| 130 | interrupted |

`python -m gemma_mtp` is the same as `gemma-mtp`.
"""


@functools.cache
def page() -> str:
    """The page's text: every command's help, without trailing blanks."""
    callbacks = [command.callback for command in application().registered_commands if command.callback is not None]
    commands = [get_command_name(callback.__name__) for callback in callbacks]
    parts = [INTRODUCTION]
    for command in commands:
        text = io.StringIO()
        with mock.patch.dict(os.environ, TERMINAL), contextlib.redirect_stdout(text):
            main([command, "--help"])
        lines = [line.rstrip() for line in text.getvalue().strip().splitlines()]
        parts.append("\n".join([f"## gemma-mtp {command}", "", "```text", *lines, "```", ""]))
    return "\n".join(parts)


if __name__ == "__main__":
    DOCS.write_text(page(), encoding="utf-8")
