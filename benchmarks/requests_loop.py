"""What a peer's process does: answer decoding requests from standard input, one JSON object a line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any


def answer_requests(about: dict[str, Any], generate: Callable[..., dict[str, Any]]) -> None:
    """Say what this process is, then answer {"prompt": [ids], "max_tokens": n, "draft_tokens": k} until the end.

    `generate` takes these by name and returns {"tokens": [ids], "rounds": [[drafted, committed], ...]}; a program that
    does not tell its rounds returns none.
    """
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        print(json.dumps(generate(**json.loads(line))), flush=True)
