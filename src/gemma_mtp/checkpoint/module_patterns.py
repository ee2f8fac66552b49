"""Which of an adapter's patterns a module's name matches first, decided in bounded time.

PEFT matches by Python's `re`, which can take longer than anyone waits for a pattern such as `(a+)+b`, and can not be
stopped within a process. So patterns that repeat or choose are matched by a process of their own, which has a second.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Collection, Sequence

from gemma_mtp.errors import CheckpointError

#: processor time of all patterns together: some hundred modules take the hundredth part of it
LIMIT_SECONDS = 1.0
#: time until the process is given up, whatever else the machine does meanwhile
PATIENCE_SECONDS = 30.0
#: letters and dots: matching takes no more steps than a name has characters
_PLAIN = re.compile(r"(?:\w|\\?\.)*")
_MATCHER = r"""
import json, re, signal, sys
limit, patterns, modules = json.load(sys.stdin)
if hasattr(signal, "setitimer"):
    signal.setitimer(signal.ITIMER_VIRTUAL, limit)
for pattern in patterns:
    print(json.dumps([name for name in modules if re.match(pattern, name)]), flush=True)
"""


def wrapped(key: str) -> str:
    """Returns the pattern that PEFT makes of an adapter's: of the end of a name, from a dot on."""
    return rf"(.*\.)?({key})$"


def first_matches(keys: Sequence[str], modules: Collection[str]) -> dict[str, str]:
    """Returns the first pattern that the end of a module's name matches, as PEFT decides, by the names that match one.

    Raises CheckpointError naming a pattern that takes too long.
    """
    names = list(modules)
    plain = [key for key in keys if _PLAIN.fullmatch(key)]
    matched = {key: [name for name in names if re.match(wrapped(key), name)] for key in plain}
    others = [key for key in keys if key not in matched]
    if others:
        matched |= _in_a_process(others, names)
    found: dict[str, str] = {}
    for key in keys:
        for name in matched[key]:
            found.setdefault(name, key)
    return found


def _in_a_process(keys: list[str], names: list[str]) -> dict[str, list[str]]:
    command, given = (
        [sys.executable, "-I", "-S", "-c", _MATCHER],
        json.dumps([LIMIT_SECONDS, [*map(wrapped, keys)], names]),
    )
    try:
        done = subprocess.run(command, input=given.encode(), capture_output=True, timeout=PATIENCE_SECONDS, check=False)
        answers = done.stdout.decode().splitlines()
    except subprocess.TimeoutExpired as error:
        answers = (error.stdout or b"").decode().splitlines()
    except OSError as error:
        raise CheckpointError(f"the adapter's patterns can not be matched, as no process starts: {error}.") from None
    if len(answers) < len(keys):
        raise CheckpointError(
            f"the adapter's pattern {keys[len(answers)][:80]!r} takes more than {LIMIT_SECONDS:g} s to match; write it"
            " without repetitions inside of repetitions."
        )
    return {key: json.loads(answer) for key, answer in zip(keys, answers, strict=True)}
