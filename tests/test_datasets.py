"""Reading data sets: what becomes an example, and one sentence naming file and line for all that can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_mtp.datasets import Example, check_token_ids, first_lines, read_examples
from gemma_mtp.engine.pair import bundled_directory
from gemma_mtp.errors import DataError
from gemma_mtp.tokenizer import Tokenizer

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_dir(bundled_directory() / "target")


def lines(path: Path, *entries: object) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return path


def test_every_kind_of_line_is_read_with_its_place_and_task(tmp_path: Path) -> None:
    file = lines(
        tmp_path / "a.jsonl",
        {"text": "x = 1"}, {"prompt": "Why?", "category": "doubt"}, {"messages": TALK, "task": 7, "source": "s"},
    )  # fmt: skip
    assert list(read_examples(file)) == [
        Example("text", "x = 1", f"{file}:1", "a.jsonl"),
        Example("prompt", "Why?", f"{file}:2", "doubt"),
        Example("messages", tuple(TALK), f"{file}:3", "7"),
    ]


def test_a_directory_is_read_by_name_without_what_is_hidden_binary_or_not_asked_for(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b.py").write_text("b\n", encoding="utf-8")
    (tmp_path / "sub" / "a.py").write_bytes("\ufeffé\r\nz\n".encode())
    (tmp_path / ".git" / "c.py").write_text("hidden", encoding="utf-8")
    (tmp_path / "d.py").write_bytes(b"\x00\x01\x02")
    (tmp_path / "latin.py").write_bytes(b"caf\xe9 au lait")
    (tmp_path / "empty.py").write_text("", encoding="utf-8")
    (tmp_path / "long.md").write_bytes(b"x" * 8191 + "é".encode())  # the sample ends inside a character
    assert [(e.task, e.content) for e in read_examples(tmp_path, "*.py")] == [("b.py", "b\n"), ("sub/a.py", "é\nz\n")]
    assert [e.task for e in read_examples(tmp_path)] == ["b.py", "long.md", "sub/a.py"]


def test_blank_lines_count_but_are_no_examples(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('\n{"text": "x"}\n   \n{"text": "y"}', encoding="utf-8")
    assert [e.origin.rsplit(":", 1)[1] for e in read_examples(file)] == ["2", "4"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("[1]", "is a JSON list"),
        ("{}", "must have exactly one of text, prompt and messages, but has nothing"),
        ('{"content": "x"}', "but has content"),
        ('{"text": "x", "prompt": "y"}', "but has text and prompt"),
        ('{"text": 3}', "has text = 3"),
        ('{"prompt": " "}', 'has prompt = " "'),
        ('{"messages": "x"}', 'has messages = "x"'),
        ('{"messages": []}', "has messages = []"),
        ('{"messages": ["x"]}', 'has message 1 = "x"'),
        ('{"messages": [{"role": "user", "content": "x"}, {"role": "robot", "content": "x"}]}', "has message 2"),
        ('{"messages": [{"role": "user"}]}', "has message 1"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "assistant's message only"),
    ],
)
def test_a_bad_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "good"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(DataError) as error:
        list(read_examples(file))
    assert str(error.value).startswith(f"{file}:2 ") and message in str(error.value)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_bad_files_are_named(tmp_path: Path) -> None:
    empty, latin = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.write_text(" \n", encoding="utf-8")
    latin.write_bytes(b"a\ncaf\xe9\n")
    (blank := tmp_path / "blank.jsonl").write_text("\n", encoding="utf-8")
    (nothing := tmp_path / "nothing").mkdir()
    for path, message in (
        (tmp_path / "absent.txt", "absent.txt can not be read: No such file"),
        (empty, "empty.txt is empty"),
        (blank, "blank.jsonl is empty"),
        (latin, "latin.txt:2 is not UTF-8 text"),
        (nothing, "nothing has no text file"),
    ):
        with pytest.raises(DataError, match=message):
            list(read_examples(path))
    with pytest.raises(DataError, match=r"of the pattern '\*\.rs'"):
        list(read_examples(tmp_path, "*.rs"))


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
                        st.sampled_from(["text", "prompt", "messages", "role", "content", "task"]), inner, max_size=3),
                    max_leaves=8))  # fmt: skip
def test_any_json_is_an_example_or_a_data_error(tmp_path_factory: pytest.TempPathFactory, entry: object) -> None:
    file = lines(tmp_path_factory.getbasetemp() / "any.jsonl", entry)
    try:
        (example,) = read_examples(file)
    except DataError as error:
        named = str(error)
    else:
        named = example.origin
    assert named.startswith(f"{file}:1")


def test_conversations_go_through_the_template_up_to_the_models_turn(tokenizer: Tokenizer) -> None:
    asked = Example("messages", tuple(TALK[:1]), "a:1", "a")
    answered = Example("messages", tuple(TALK), "a:1", "a")
    prompt = Example("prompt", "Hi", "a:1", "a")
    expected = tokenizer.apply_chat_template(TALK[:1])
    assert asked.render(tokenizer) == answered.render(tokenizer) == prompt.render(tokenizer) == expected
    assert asked.token_ids(tokenizer) == tokenizer.encode(expected)
    bare = Tokenizer(tokenizer.raw, tokenizer.settings)
    assert prompt.render(bare) == "Hi"
    with pytest.raises(DataError, match=r"a:1 can not be rendered as a conversation: .*no chat template"):
        asked.render(bare)
    thinking = Tokenizer(tokenizer.raw, tokenizer.settings, "{{ 'think' if enable_thinking else 'act' }}")
    assert [asked.render(thinking, enable_thinking=on) for on in (True, False)] == ["think", "act"]


def test_token_ids_are_held_against_the_target(tokenizer: Tokenizer) -> None:
    example = Example("text", "x = 1\n" * 50, "a.py", "a.py")
    ids = example.token_ids(tokenizer)
    assert example.token_ids(tokenizer, vocab_size=max(ids) + 1, max_tokens=len(ids)) == ids
    with pytest.raises(DataError, match=rf"a.py has token id {max(ids)}, but the target's ids end at {max(ids) - 1}"):
        example.token_ids(tokenizer, vocab_size=max(ids))
    with pytest.raises(DataError, match=rf"a.py has {len(ids)} tokens, but at most {len(ids) - 1} are taken"):
        example.token_ids(tokenizer, max_tokens=len(ids) - 1)
    with pytest.raises(DataError, match=r"a\.py has no tokens"):
        check_token_ids([], "a.py")


def test_a_prompt_is_the_first_whole_lines_that_fit(tokenizer: Tokenizer) -> None:
    text = "".join(f"value_{i} = function({i})\n" for i in range(400))
    for limit in (20, 100, 256):
        cut = first_lines(text, tokenizer, limit)
        assert text.startswith(cut + "\n")
        following = text[len(cut) + 1 :].split("\n", 1)[0]
        assert len(tokenizer.encode(cut)) <= limit < len(tokenizer.encode(f"{cut}\n{following}\n")) + 1
    short = "x = 1\n\n"
    assert first_lines(short, tokenizer, 256) == short
    long_line = "word " * 500
    cut = first_lines(long_line, tokenizer, 50)
    assert long_line.startswith(cut) and 40 <= len(tokenizer.encode(cut)) <= 51
