"""Whatever a user types: the command line ends with a stated code and no traceback."""

import contextlib
import inspect
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from models import agreeing_pair, letters, save_pair

from gemma_mtp.cli import acceptance_run, application, bench_serve_run, main
from gemma_mtp.engine.thread import EngineThread
from gemma_mtp.errors import ServerError
from gemma_mtp.server import run as server_run
from gemma_mtp.training import run as training_run

COMMANDS = {
    command.callback.__name__.replace("_", "-"): command.callback
    for command in application().registered_commands
    if command.callback is not None
}
#: what `main` says of its exit codes
CODES = {0, 1, 2, 3, 4}
#: half a surrogate pair is how Python hands on bytes of the command line that are not UTF-8
STRANGE = ["", " ", "\udcff", "a\udc80b", "\ud83d", "\x00", "é", "🙂", "[bold]", "{", "-", "--", "%s", "..", "x" * 300]
NUMBERS = [
    "0",
    "1",
    "2",
    "3",
    "-1",
    "-0.0",
    "0.5",
    "1e400",
    "nan",
    "inf",
    "-inf",
    "9" * 30,
    "1,2",
    "1-3",
    "3-1",
    "²",
    "0x1",
]
WORDS = [
    "auto",
    "exact",
    "block",
    "cpu",
    "cuda",
    "cuda:99",
    "meta",
    "int8",
    "target=int4",
    "float32",
    "float99",
    "on",
    "both",
]
#: so many threads are started indeed
LEFT_OUT = {"--threads"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with a small pair, and files of many kinds; the commands run there."""
    root = tmp_path_factory.mktemp("fuzz")
    save_pair(root, *agreeing_pair(3))
    letters(root / "target")
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    (root / "target" / "chat_template.jinja").write_text(template)
    files = {"empty": b"", "latin": b"caf\xe9", "zeros": b"\0" * 64, "text": b"AB AB AB", "bom": b"\xef\xbb\xbfAB",
             "bad.jsonl": b'{"text": 3}\n', "good.jsonl": b'{"text": "ABABABAB"}\n',
             "half.jsonl": b'{"text": "\\ud83d"}', "deep.json": b"[" * 100_000,
             "schema.json": b'{"type": "integer"}', "schema2.json": b'{"type": 7}'}  # fmt: skip
    for name, content in files.items():
        (root / name).write_bytes(content)
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(root):
        patch.setattr(server_run, "run", lambda *_: None)
        patch.setattr(EngineThread, "warm_up", lambda self: None)
        patch.setattr(training_run, "run_training", lambda *_: None)
        patch.setattr(bench_serve_run, "own_server", stopped)
        patch.setattr(acceptance_run, "acceptance", lambda **_: None)
        yield root


def stopped(*_: Any) -> Any:
    raise ServerError("no server is started here.")


PATHS = ["target", "drafter", "target/config.json", "empty", "latin", "zeros", "text", "bom", "bad.jsonl", "good.jsonl",
         "half.jsonl", "deep.json", "schema.json", "schema2.json", "absent", ".", "/", "/proc/self/mem", "/dev/null",
         "text/below", "a.png", "absent/a.png"]  # fmt: skip
VALUES = st.sampled_from([*STRANGE, *NUMBERS, *WORDS, *PATHS]) | st.text(st.characters(), max_size=6)


def names_of(command: str) -> list[str]:
    found = []
    for parameter in inspect.signature(COMMANDS[command], eval_str=True).parameters.values():
        told = parameter.annotation.__metadata__[0]
        found += [name for name in (told.default, *(told.param_decls or ())) if str(name).startswith("-")]
    return [name for name in found if name not in LEFT_OUT]


@st.composite
def arguments(draw: st.DrawFn, command: str) -> list[str]:
    """Options of the command with values of all kinds, in any order."""
    base = {
        "generate": ["--target", "target", "-n", "3"], "acceptance": ["--target", "target", "--drafter", "drafter"],
        "chat": ["--target", "target", "-n", "3"], "serve": ["--target", "target", "--port", "0"],
        "train": ["--target", "target", "--out", "out", "--data", "text"],
    }.get(command, [])  # fmt: skip
    # the bundled pair's answers are as long as its context
    drawn: list[str] = list(base) if draw(st.integers(0, 3)) or command == "chat" else []
    for _ in range(draw(st.integers(0, 4))):
        drawn += draw(st.tuples(st.sampled_from(names_of(command)), VALUES) | st.tuples(VALUES))
    return drawn


def ends_well(arguments: list[str], stdin: bytes = b"") -> None:
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.TextIOWrapper(io.BytesIO(), "utf-8")
    with (
        pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    ):  # fmt: skip
        patch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin), "utf-8"))
        code = main(arguments)
    for stream in (out, err):
        stream.flush()
    told = err.buffer.getvalue().decode() if arguments else "Usage"
    assert code in CODES and "Traceback" not in told
    assert code != 2 or re.search(
        r"^error: .*(\.|: gemma-mtp [^\n]*)$|╭─ Error|Usage", told, re.MULTILINE | re.DOTALL
    ), told


@pytest.mark.parametrize("command", COMMANDS)
def test_any_arguments(command: str, place: Path) -> None:
    @settings(max_examples=8, suppress_health_check=list(HealthCheck))
    @given(arguments(command))
    def check(drawn: list[str]) -> None:
        ends_well([command, *drawn], b"AB")

    check()


@settings(max_examples=20)
@given(st.lists(VALUES, max_size=3))
@example(["\udcff"])
def test_any_command(place: Path, drawn: list[str]) -> None:
    ends_well(drawn)


@settings(max_examples=20)
@given(st.binary(max_size=40))
@example(b"\xff")
@example(b"AB\0")
@example(b"\xed\xa0\x80")
def test_any_standard_input(place: Path, given: bytes) -> None:
    ends_well(["generate", "--target", "target", "-n", "3", "-q"], given)
