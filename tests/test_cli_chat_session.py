"""`gemma-mtp chat` from a pipe: conversations, commands, files."""

import io
import json
import re
import signal
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from table_models import Quality, table_pair

from gemma_mtp.cli import chat_files, main
from gemma_mtp.cli import options as cli_options
from gemma_mtp.cli.chat_files import KEPT_LINES, InputHistory
from gemma_mtp.cli.chat_screen import Screen
from gemma_mtp.cli.chat_session import Answer, Session
from gemma_mtp.decoding.draft_length import DraftTokens
from gemma_mtp.decoding.params import SamplingParams
from gemma_mtp.engine.pair import Pair, load_pair
from gemma_mtp.errors import PromptError, TokenizerError

#: of every answer of the table's models that thinks
THOUGHT = "Two and two STOP is four"


@pytest.fixture(scope="module")
def pair() -> Pair:
    return table_pair()


@pytest.fixture
def talk(pair: Pair, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> "Talk":
    monkeypatch.setattr(cli_options.PairOptions, "load", lambda options: pair)
    return Talk(monkeypatch, capsys)


class Talk:
    """Runs `gemma-mtp chat` on lines of a pipe."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._patch, self._capture = monkeypatch, capsys

    def __call__(self, lines: str | bytes, *arguments: str) -> tuple[int, str, str]:
        """Returns exit code, standard output and standard error."""
        given = lines if isinstance(lines, bytes) else lines.encode()
        self._patch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given), "utf-8"))
        code = main(["chat", "--target", "none", *arguments])
        return code, *self._capture.readouterr()


def test_each_line_is_a_message_and_answers_are_all_of_the_output(talk: Talk) -> None:
    code, out, err = talk("TEXT\n\nTEXT\n", "--system", "a system message of some length")
    assert (code, out) == (0, "Hello, world.\nHello, world.\n")
    first, second = re.findall(r"(\d+) of (\d+) prompt tokens cached", err)
    assert first[0] == "0" and int(second[1]) > int(second[0]) > 0, "the second turn reads what is new"
    assert err.count("5 tokens, ") == 2 and "\x1b" not in out + err and "> " not in out
    assert talk("TEXT", "-q") == (0, "Hello, world.\n", "")
    assert talk("", "-q") == (0, "", "")


def test_ctrl_c_ends_a_chat_from_a_pipe(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a terminal it stops one answer; from a pipe it would have to be pressed for every message."""
    shown = Screen.show

    def interrupted(screen: Screen, answer: Answer, stopped: Callable[[], bool]) -> None:
        signal.raise_signal(signal.SIGINT)
        shown(screen, answer, stopped)

    monkeypatch.setattr(Screen, "show", interrupted)
    assert talk("TEXT\nTEXT\n") == (130, "", "")


def test_thoughts_are_no_part_of_the_output(talk: Talk) -> None:
    code, out, err = talk("THINK\n", "--thinking")
    assert (code, out) == (0, "The answer STOP is 4\n") and f"{THOUGHT}\n" in err
    assert talk("THINK\n", "--thinking", "-q") == (0, "The answer STOP is 4\n", "")
    assert talk("THINK\n", "-q", "--stop", "STOP")[1] == "The answer \n"


@pytest.mark.parametrize("quality", ["right", "wrong", "half"])
def test_a_drafted_conversation_is_the_plain_one(quality: Quality) -> None:
    """Over turns, dropped ones and repeated ones, every token and every message, greedy and drawn."""

    pair = table_pair(quality)

    def conversation(drafts: DraftTokens, temperature: float) -> tuple[list[list[int]], list[dict[str, str]]]:
        session = Session(pair, SamplingParams(max_tokens=16, temperature=temperature, seed=3), drafts, context=400)
        tokens = []
        for text in ("TEXT", "THINK", "hello there", "/drop", "TEXT TEXT", "/retry", "THINK"):
            if text == "/drop":
                assert session.drop() == 1
                continue
            if text == "/retry":
                session.take_back_answer()
                session.seed += 1
            else:
                session.say(text)
            session.thinking = not session.thinking
            answer = session.answer()
            pieces = list(answer.pieces())
            assert "".join(p.text for p in pieces if not p.thought) == session.messages[-1]["content"]
            assert (drafts == 0) == (answer.result.drafted == 0)
            tokens.append(answer.result.token_ids)
        assert [m["role"] for m in session.messages] == ["user", "assistant"] * 4
        return tokens, session.messages

    for temperature in (0.0, 0.9):
        assert conversation(3, temperature) == conversation(0, temperature)


def test_kinds_of_pieces_are_the_rounds_own(pair: Pair) -> None:
    session = Session(pair, SamplingParams(max_tokens=8), 2)
    session.say("TEXT")
    assert [(p.text, p.kind) for p in session.answer().pieces()] == [
        ("Hello", "first"), (", ", "draft"), ("world", "draft"), (".", "bonus"),
    ]  # fmt: skip


def test_drafts_are_marked_where_there_are_no_colours(talk: Talk) -> None:
    assert talk("TEXT\n/drafts\nTEXT\n", "-q", "--show-drafts", "-k", "2") == (
        0, "Hello, world{.}\nHello, world.\n", "Colours of drafts are off.\n",
    )  # fmt: skip


def test_retry_answers_again(talk: Talk) -> None:
    code, out, err = talk("TEXT\n/retry\n")
    assert (code, out) == (0, "Hello, world.\nHello, world.\n") and "Greedy decoding gives the same answer" in err
    code, out, err = talk("hello\n/retry\n/retry\n", "-t", "1", "-n", "12", "-q")
    assert code == 0 and len(set(out.splitlines())) == 3, "each with a seed of its own"
    assert talk("/retry\n") == (2, "", "error: there is nothing to answer again; send a message first.\n")


def test_edit_changes_the_last_message(talk: Talk, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    code, out, _ = talk(f"THINK\n/edit TEXT\n/save {file}\n", "-q")
    assert (code, out) == (0, "The answer STOP is 4\nHello, world.\n")
    assert json.loads(file.read_text()) == [
        {"role": "user", "content": "TEXT"}, {"role": "assistant", "content": "Hello, world."},
    ]  # fmt: skip
    assert talk("TEXT\n/edit\n", "-q")[::2] == (
        2, "error: /edit needs the new text where there is no terminal: /edit TEXT.\n",
    )  # fmt: skip
    assert "no message to edit" in talk("/edit TEXT\n", "-q")[2]


def test_system_think_and_reset_change_what_the_template_is_given(
    talk: Talk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered: list[str] = []
    original = Session.answer

    def recorded(session: Session) -> object:
        answer = original(session)
        rendered.append(session.tokenizer.decode(answer.result.prompt_token_ids, skip_special_tokens=False))
        return answer

    monkeypatch.setattr(Session, "answer", recorded)
    file = tmp_path / "talk.json"
    lines = f"/system Be brief.\nTEXT\n/think on\n/reset\nTEXT\n/system\n/think off\nTEXT\n/save {file}\n"
    assert talk(lines, "-q")[0] == 0
    assert "system\nBe brief." in rendered[0] and "<|think|>" not in rendered[0]
    assert "<|think|>" in rendered[1] and rendered[1].count("<|turn>user") == 1 and "Be brief" in rendered[1]
    assert "system" not in rendered[2] and rendered[2].count("<|turn>user") == 2
    assert talk(f"TEXT\n/save {file}\n", "-q", "--system", "Be kind.")[0] == 0
    assert json.loads(file.read_text())[0] == {"role": "system", "content": "Be kind."}
    assert talk("TEXT\n", "-q", "--load", str(file))[0] == 0
    assert "Be kind." in rendered[-1] and rendered[-1].count("<|turn>user") == 2


def test_a_saved_conversation_goes_on(talk: Talk, tmp_path: Path) -> None:
    file = tmp_path / "below" / "talk.json"
    assert talk(f"THINK\n/save {file}\n", "--thinking", "-q")[0] == 0
    saved = json.loads(file.read_text())
    assert saved[1] == {"role": "assistant", "content": "The answer STOP is 4", "reasoning_content": THOUGHT}
    assert talk(f"TEXT\n/save {file}\n", "-q", "--load", str(file))[0] == 0
    assert json.loads(file.read_text())[:2] == saved and len(json.loads(file.read_text())) == 4
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "TEXT"}]}))
    assert talk("/retry\n", "-q", "--load", str(file))[1] == "Hello, world.\n"


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[" * 100_000, "3", "[3]", '[{"role": "user"}]', '[{"role": "user", "content": 3}]',
        '[{"role": "assistant", "content": "x"}]', '[{"role": "tool", "content": "x"}]',
        '[{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]',
        '[{"role": "user", "content": "\\ud83d"}]', '[{"role": "user", "content": "a", "tool_calls": []}]', "null",
    ],
)  # fmt: skip
def test_what_is_no_conversation_is_refused(talk: Talk, tmp_path: Path, content: str) -> None:
    (tmp_path / "talk.json").write_text(content)
    code, out, err = talk("TEXT\n", "--load", str(tmp_path / "talk.json"))
    assert (code, out) == (2, "") and re.fullmatch(r"error: the conversation .*\.\n", err)


def test_what_can_not_be_saved_is_refused(talk: Talk, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for name in (str(tmp_path), f"{tmp_path}/file/below.json", "/proc/none/x.json", "a\0b", ""):
        code, out, err = talk(f"TEXT\n/save {name}\nTEXT\n", "-q")
        assert (code, out) == (2, "Hello, world.\n" * 2) and re.fullmatch(r"error: [^\n]*\.\n", err)


def test_a_conversation_that_is_too_long_says_what_to_do(talk: Talk) -> None:
    code, out, err = talk("TEXT\nTEXT\nTEXT\n/drop\n/retry\n/drop 9\nTEXT\n", "--context", "60")
    assert code == 2 and out == "Hello, world.\n" * 4
    assert "/drop" in err and "at most 59 leave room for an answer" in err and "Left out the oldest turn." in err
    code, out, err = talk("LOOP\n", "--context", "60", "-q")
    assert code == 0 and "The context is full: /drop leaves out the oldest turn, /reset begins anew." in err
    assert "no older turn" in talk("TEXT\n/drop\n")[2]
    assert "--context is 1" in talk("TEXT\n", "--context", "1")[2]


def test_a_refused_message_waits_and_the_next_takes_its_place(pair: Pair) -> None:
    session = Session(pair, SamplingParams(), context=40)
    session.say("x" * 100)
    with pytest.raises(PromptError, match="/reset"):
        session.answer()
    assert session.waiting
    session.say("TEXT")
    list(session.answer().pieces())
    assert [m["content"] for m in session.messages] == ["TEXT", "Hello, world."]


def test_an_answer_that_is_stopped_stays_as_far_as_it_came(pair: Pair) -> None:
    session = Session(pair, SamplingParams(max_tokens=1000), 0)
    session.say("TEXT")
    answer = session.answer()
    said = list(answer.pieces(lambda: len(answer.result.token_ids) >= 2))
    assert answer.result.finish_reason == "cancelled"
    kept = session.messages[-1]["content"]
    assert kept == "".join(piece.text for piece in said) == "Hello, "
    session.say("TEXT")
    assert "".join(p.text for p in session.answer().pieces()) == "Hello, world.", "and the next is whole"


def test_models_without_conversations_say_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], talk: Talk
) -> None:
    bundled = load_pair()
    monkeypatch.setattr(cli_options.PairOptions, "load", lambda options: bundled)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b""), "utf-8"))
    assert main(["chat"]) == 0
    assert capsys.readouterr().err.startswith(
        "The bundled pair completes Python and is not trained for conversations: "
    )
    assert bundled.tokenizer is not None
    bundled.tokenizer.chat_template = None
    code, out, err = talk("TEXT\n")
    assert (code, out) == (2, "") and "with a chat template, and this one has none; give --target" in err


def test_thinking_needs_a_switch(monkeypatch: pytest.MonkeyPatch, talk: Talk) -> None:
    plain = table_pair(template="{% for m in messages %}{{ m['content'] }}{% endfor %}")
    monkeypatch.setattr(cli_options.PairOptions, "load", lambda options: plain)
    assert "switch" in talk("x\n", "--thinking")[2] and "switch" in talk("/think on\n")[2]
    assert plain.tokenizer is not None
    plain.tokenizer.chat_template = None
    with pytest.raises(TokenizerError, match="chat template"):
        Session(plain, SamplingParams())


COMMANDS = ("retry", "edit", "system", "think", "drafts", "drop", "reset", "save", "help", "quit")
REST = st.sampled_from(["", "on", "off", "TEXT", "1", "-1", "9" * 30, "²", "/proc/none", "x\0y", "/", "\udcff", "  "])
LINES = st.one_of(
    st.builds("/{} {}".format, st.sampled_from(COMMANDS), REST | st.text(max_size=4)),
    st.sampled_from(["TEXT", "THINK", "//x", "/", "/ help", "LOOP"]),
    st.text(max_size=6),
)


def test_any_lines(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """What is typed ends with 0 or 2, one sentence for each thing that is refused, and no traceback."""
    talk = Talk(monkeypatch, capsys)
    monkeypatch.setattr(cli_options.PairOptions, "load", lambda options: pair)
    monkeypatch.chdir(tmp_path)

    @settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(LINES, max_size=6))
    @example(["/think on", "THINK", "/retry", "/edit TEXT", "/save a.json", "/reset", "/drop"])
    def check(lines: list[str]) -> None:
        given = "\n".join(lines).encode("utf-8", "surrogatepass")
        code, _, err = talk(given, "-n", "3", "-q", "--context", "80")
        assert code in (0, 2) and "Traceback" not in err
        assert (code == 2) == ("error: " in err)

    check()


@pytest.mark.parametrize("given", [b"\xff\nTEXT\n", b"TEXT\n\xed\xa0\x80\n", b"\xef\xbb\xbfTEXT\r\n\xff"])
def test_a_line_that_is_no_text_costs_no_other(talk: Talk, given: bytes) -> None:
    code, out, err = talk(given, "-q")
    assert (code, out) == (2, "Hello, world.\n") and err.endswith("convert it.\n") and err.count("error: ") == 1


def test_history_is_kept_for_its_owner_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history = InputHistory(tmp_path / "cache")
    for text in ("one", "two\nlines", "two\nlines", "drei €"):
        history.add(text)
    file = tmp_path / "cache" / "chat_history"
    assert InputHistory(tmp_path / "cache").lines == ["one", "two\nlines", "drei €"]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.write_text('"whole"\n{"broken\n3\n"\\ud83d"\n')
    history = InputHistory(tmp_path / "cache")
    assert history.lines == ["whole"]
    for i in range(2 * KEPT_LINES):
        history.add(str(i))
    assert len(InputHistory(tmp_path / "cache").lines) <= 2 * KEPT_LINES and history.lines[-1] == "1999"
    (tmp_path / "file").write_text("x")
    unwritable = InputHistory(tmp_path / "file")
    unwritable.add("kept")
    assert unwritable.lines == ["kept"]
    monkeypatch.setattr(chat_files, "cache_directory", lambda: None)
    InputHistory().add("nowhere")
