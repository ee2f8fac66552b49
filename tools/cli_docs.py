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

Exit codes: 0 done; 1 a comparison failed (`generate --compare` found different outputs under `exact` verification,
`inspect` a pair that does not fit, `identity` outputs that differ), or more of `bench-serve`'s requests than its limit;
2 bad input, with one sentence on standard error that says what to do; 3 `train`'s gate refused the drafter; 4 the limit
cut an output of `generate` before the schema or expression that it was to fulfil; 130 interrupted.
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
