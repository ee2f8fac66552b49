"""How the command line starts and ends: what it imports before it works, and Ctrl-C at every moment."""

import dataclasses
import inspect
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from gemma_mtp.cli import application, main
from gemma_mtp.cli.generate import PromptOptions
from gemma_mtp.cli.option_groups import long_name
from gemma_mtp.files.replace import new_directory
from gemma_mtp.interrupts import ENDING, INTERRUPTED, interruptible

COMMANDS = [command.callback for command in application().registered_commands if command.callback is not None]
NAMES = [command.__name__.replace("_", "-") for command in COMMANDS]
#: what takes from a tenth of a second to some to import
HEAVY = ["torch", "numpy", "transformers", "tokenizers", "safetensors", "jinja2", "matplotlib", "httpx", "llguidance",
         "fastapi", "ray"]  # fmt: skip


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False,
                          env={**os.environ, **environment})  # fmt: skip


@pytest.mark.parametrize(
    "call",
    [
        "main(['--version'])", "main(['--help'])", "main([])", "main(['no-such-command'])",
        f"[main([name, '--help']) for name in {NAMES}]",
        f"[main([name, '--no-such-option']) for name in {NAMES}]",
        "[complete(f'gemma-mtp {words}') for words in ('', 'gen', 'generate --dr', 'train -')]",
    ],
)  # fmt: skip
def test_what_only_tells_imports_nothing_heavy(call: str) -> None:
    code = f"""
import contextlib, io, json, os, sys
from gemma_mtp.cli import main

def complete(words):
    os.environ |= {{"_GEMMA_MTP_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}}
    main([])

with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
    {call}
assert out.getvalue(), "nothing was told"
print(json.dumps([name for name in {HEAVY} if name in sys.modules]))
"""
    ran = python(code)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert json.loads(ran.stdout) == []


@pytest.mark.parametrize(
    ("call", "without"),
    [
        ("main(['--version'])", ["rich.console", "rich.progress", "pydantic"]),
        ("main(['train', '--help'])", ["rich.progress", "pydantic", "gemma_mtp.cli.serve"]),
        ("main(['-v', 'serve', '--help'])", ["rich.progress", "pydantic", "gemma_mtp.cli.train"]),
        ("complete('gemma-mtp train --dr')", ["rich.console", "rich.progress"]),
    ],
)
def test_help_does_without_what_it_can(call: str, without: list[str]) -> None:
    """Each takes 50 to 100 milliseconds."""
    ran = python(f"""
import os, sys
from gemma_mtp.cli import main

def complete(words):
    os.environ |= {{"_GEMMA_MTP_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}}
    main([])

{call}
print([name for name in {without} if name in sys.modules])
""")
    assert (ran.returncode, ran.stderr, ran.stdout.splitlines()[-1]) == (0, "", "[]")


def test_completion_names_options_of_a_command() -> None:
    code = "import sys; from gemma_mtp.cli import main; sys.exit(main([]))"
    words = {"_GEMMA_MTP_COMPLETE": "complete_bash", "COMP_WORDS": "gemma-mtp train --drafter", "COMP_CWORD": "2"}
    assert python(code, **words).stdout.split() == ["--drafter"]


@pytest.mark.parametrize("number", ENDING)
def test_what_a_signal_ends_leaves_nothing_half_written(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(arguments: list[str]) -> int:
        with new_directory(tmp_path / "out") as directory:
            (directory / "half").touch()
            signal.raise_signal(number)
        return 0

    monkeypatch.setattr("gemma_mtp.cli._run", run)
    given = [signal.signal(each, signal.SIG_DFL) for each in ENDING]  # nohup has it ignored
    try:
        assert main([]) == 128 + number
        assert not any(tmp_path.iterdir())
        assert [signal.getsignal(each) for each in ENDING] == [signal.SIG_DFL] * len(ENDING)
    finally:
        for each, handler in zip(ENDING, given, strict=True):
            signal.signal(each, handler)


def test_an_ignored_hang_up_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under nohup."""
    monkeypatch.setattr("gemma_mtp.cli._run", lambda _: signal.raise_signal(signal.SIGHUP) or 0)  # type: ignore[func-returns-value]
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert main([]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


#: interrupts the process when a module is looked for, or when Python ends: its name, and the command's arguments
INTERRUPT = """
import atexit, importlib.abc, os, runpy, signal, sys

class Interrupt(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == where:
            os.kill(os.getpid(), signal.SIGINT)

where = sys.argv[1]
if where == "the end":
    atexit.register(os.kill, os.getpid(), signal.SIGINT)
else:
    sys.meta_path.insert(0, Interrupt())
sys.argv = ["gemma-mtp", *sys.argv[2:]]
runpy.run_module("gemma_mtp", run_name="__main__")
"""


@pytest.mark.parametrize(
    "where",
    ["gemma_mtp.cli", "typer", "gemma_mtp.cli.generate_run", "torch", "torch._C", "the end",
     *(pytest.param(name, marks=pytest.mark.slow)
       for name in ("gemma_mtp.cli.generate", "numpy", "torch.nn.functional", "tokenizers", "gemma_mtp._native",
                    "gemma_mtp.engine.engine"))],
)  # fmt: skip
def test_ctrl_c_at_any_moment_ends_with_130_and_no_traceback(where: str) -> None:
    ran = python(INTERRUPT, where, "generate", "x", "-n", "4", "-q")
    assert (ran.returncode, ran.stderr) == (INTERRUPTED, "")


def test_ctrl_c_in_a_place_that_can_not_hand_it_on(capsys: pytest.CaptureFixture[str]) -> None:
    class Interrupted:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(10):
                pass  # Python calls handlers between statements

    def drop() -> None:
        Interrupted()
        time.sleep(60)

    before = signal.getsignal(signal.SIGINT)  # ignored in what a shell runs in the background
    with pytest.raises(KeyboardInterrupt), interruptible() as interrupted:  # noqa: PT012
        assert not interrupted()
        drop()
    assert capsys.readouterr().err == ""
    assert signal.getsignal(signal.SIGINT) is before


def test_an_error_that_a_library_makes_of_ctrl_c_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def library(arguments: list[str]) -> int:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(1000):
                pass
        except KeyboardInterrupt:
            raise ImportError("could not be initialised") from None
        return 0

    monkeypatch.setattr("gemma_mtp.cli._run", library)
    assert main([]) == INTERRUPTED


def options() -> list[tuple[str, dataclasses.Field[Any]]]:
    """Every command's options that need another one."""
    found = []
    for name, command in zip(NAMES, COMMANDS, strict=True):
        for kind in get_type_hints(inspect.unwrap(command)).values():
            if dataclasses.is_dataclass(kind):
                found += [(name, f) for f in dataclasses.fields(kind) if f.metadata.get("needs")]
    return found


@pytest.mark.parametrize(("command", "option"), options(), ids=lambda value: getattr(value, "name", value))
def test_an_option_without_the_one_it_needs_is_refused(
    command: str, option: dataclasses.Field[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    flag = option.type == "bool"
    required = ["--target", "t", "--out", "o", "--data", "d"] if command == "train" else []
    assert main([command, *required, long_name(option), *([] if flag else ["7"])]) == 2
    out, err = capsys.readouterr()
    message = f"{long_name(option)} has no effect without {option.metadata['needs']}; give both, or leave it out."
    assert (out, err) == ("", f"error: {message}\n")


def test_what_needs_another_option_is_declared_so() -> None:
    needed = {long_name(option) for _, option in options()}
    assert {"--system", "--logprobs", "--repeats", "--records", "--max-in-flight", "--hidden", "--patience"} <= needed
    declared = {(name, option.name) for name, option in options()}
    for name, command in zip(NAMES, COMMANDS, strict=True):
        for parameter in inspect.signature(command, eval_str=True).parameters.values():
            text = parameter.annotation.__metadata__[0].help or ""
            assert not text.startswith("With --") or (name, parameter.name) in declared, parameter.name


def test_flags_show_no_type(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], *([name] for name in NAMES)):
        assert main([*arguments, "--help"]) == 0
        assert "<bool>" not in capsys.readouterr().out


@pytest.fixture
def nobody_reads(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Standard output is a pipe whose reader has left, as `head` does."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", 1, "utf-8") as stdout:  # closed as at Python's end: what is left is written nowhere
        monkeypatch.setattr("sys.stdout", stdout)
        yield


@pytest.mark.usefixtures("nobody_reads")
@pytest.mark.parametrize(
    "call", ["--help", "plan --help", "--version", "recipe vllm", "recipe vllm --json", "chat"], ids=str
)
def test_a_reader_may_leave(call: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("gemma_mtp.cli.chat_run.chat", lambda **_: print("an answer\n" * 9999))
    assert (main(call.split()), capfd.readouterr().err) == (0, "")


@pytest.mark.parametrize(("call", "code"), [("recipe vllm", 0), ("--help", 0), ("recipe none", 2), ("generate", 2)])
def test_closed_streams_are_as_the_null_device(
    call: str, code: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def generate(source: PromptOptions, **_: object) -> None:
        print(f"given {source.given!r}", file=sys.stderr)
        raise SystemExit(2 if source.given == "" else 0)

    monkeypatch.setattr("gemma_mtp.cli.generate_run.generate", generate)
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(f"sys.{name}", None)
    assert main(call.split()) == code
    assert capfd.readouterr() == ("", "")


def test_a_full_standard_error_changes_no_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("/dev/full").open("w", 1, "utf-8") as full, monkeypatch.context() as patched:
        patched.setattr("sys.stderr", full)
        assert main(["recipe", "none"]) == 2
