"""Text that is none, and values of wrong types: a sentence and exit code 2, a typed error, or 400."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from live_server import Live, serving
from models import agreeing_pair, save_pair
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models as word_models

from gemma_mtp.cli import main
from gemma_mtp.cli.console import console
from gemma_mtp.datasets import read_examples
from gemma_mtp.decoding.params import SamplingParams
from gemma_mtp.engine.engine import Engine
from gemma_mtp.engine.pair import Pair, bundled_directory, load_pair
from gemma_mtp.engine.request import Request
from gemma_mtp.errors import DataError, GemmaMtpError, PromptError, SamplingError, TokenizerError
from gemma_mtp.server.settings import read_keys
from gemma_mtp.text import check_text, is_text, read_text
from gemma_mtp.tokenizer import Tokenizer

HALF = "abc \ud83d def"
LATIN, BOM = b"caf\xe9", b"\xef\xbb\xbf"
PROMPT = "def add(a, b):\n    return"


def one_sentence(error: GemmaMtpError) -> None:
    assert "\n" not in str(error) and str(error).endswith(".") and is_text(str(error))


def refused(capsys: pytest.CaptureFixture[str], arguments: Sequence[str]) -> str:
    assert main(list(arguments)) == 2
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(r"error: [^\n]*\.\n", err), err
    return err


# ---- the functions themselves ----


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(), max_size=20))
def test_text_is_what_can_be_encoded(text: str) -> None:
    assert is_text(text) == (not any("\ud800" <= character <= "\udfff" for character in text))


def test_files_are_read_without_their_mark_and_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "marked").write_bytes(BOM + "é\n".encode())
    (tmp_path / "latin").write_bytes(LATIN)
    assert read_text(tmp_path / "marked", "file", DataError) == "é\n"
    for name, message in (("latin", "is not UTF-8 text"), ("absent", "can not be read: No such"),
                          ("a\0b", "no file has such a name"), (".", "can not be read: Is a directory")):  # fmt: skip
        with pytest.raises(DataError, match=message) as error:
            read_text(tmp_path / name, "file", DataError)
        one_sentence(error.value)


# ---- Python ----

WRONG_PROMPTS = [3, 3.5, None, True, b"abc", bytearray(b"abc"), {"a": 1}, {5: 6}, object(), Path("x"), torch.tensor(3),
                 ["a"], [1.5], [None], [True], [[5]], [10**400], [-1], torch.tensor([[5]])]  # fmt: skip


@pytest.mark.parametrize("prompt", WRONG_PROMPTS, ids=lambda prompt: f"{prompt!r}".split(" at ")[0])
def test_a_prompt_of_a_wrong_type_is_a_prompt_error(pair: Pair, prompt: Any) -> None:
    for ask in (pair.generate, pair.stream, pair.encode):
        with pytest.raises(PromptError) as error:
            ask(prompt)
        one_sentence(error.value)


def test_half_a_surrogate_pair_is_refused_in_python(pair: Pair) -> None:
    for text in (HALF, "\udfff", os.fsdecode(LATIN)):
        with pytest.raises(PromptError, match="half a surrogate pair") as error:
            pair.generate(text)
        one_sentence(error.value)
    with pytest.raises(SamplingError, match="a stop string is "):
        SamplingParams(stop=[HALF])


@pytest.mark.parametrize(
    "values",
    [{"params": 3}, {"params": 0}, {"params": {}}, {"params": "greedy"}, {"draft_tokens": True}, {"draft_tokens": 2.0},
     {"draft_tokens": None}, {"draft_tokens": [4]}, {"verification": None}, {"verification": ["exact"]}],
    ids=str,
)  # fmt: skip
def test_arguments_of_wrong_types_are_sampling_errors(pair: Pair, values: dict[str, Any]) -> None:
    with pytest.raises(SamplingError) as error:
        pair.generate("x", **values)
    one_sentence(error.value)


@pytest.mark.parametrize(
    "values", [{"target": 3}, {"drafter": 3}, {"quantize": 8}, {"device": None}, {"dtype": 3}, {"dtype": []}], ids=str
)
def test_loading_by_wrong_types_is_a_typed_error(values: dict[str, Any]) -> None:
    with pytest.raises(GemmaMtpError) as error:
        load_pair(**values)
    one_sentence(error.value)


def test_a_priority_that_can_not_be_compared_leaves_the_queue_as_it_is(pair: Pair) -> None:
    engine = Engine(pair)
    ids = pair.encode("x")
    engine.submit(Request(ids))
    for priority in ("high", None, 1.5):
        with pytest.raises(SamplingError, match="priority is"):
            engine.submit(Request(ids, priority=priority))  # type: ignore[arg-type]
    engine.submit(Request(ids))


# ---- templates ----

BROKEN_TEMPLATES = {
    "type": "{{ 1 + 'a' }}", "zero": "{{ 1 // 0 }}", "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "overflow": "{{ 10.0 ** 400 }}", "range": "{% for i in range(10 ** 9) %}x{% endfor %}",
    "value": "{{ [1].index(2) }}", "key": "{{ {}.pop('a') }}", "attribute": "{{ messages[0].content.nothing.more }}",
    "sandbox": "{{ ''.__class__.mro() }}", "format": "{{ '%d' % 'a' }}", "encode": "{{ 'é'.encode('ascii') }}",
    "json": "{{ namespace() | tojson }}", "date": "{{ strftime_now(3) }}", "no callable": "{{ messages() }}",
    "raise": "{{ raise_exception('no\\nway.') }}", "syntax": "{% if %}", "argument": "{{ 'a'.zfill('x') }}",
    "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "half": "{{ '\\ud83d' }}",
}  # fmt: skip


@pytest.mark.parametrize("template", BROKEN_TEMPLATES.values(), ids=list(BROKEN_TEMPLATES))
def test_whatever_a_template_raises_is_one_sentence(pair: Pair, template: str) -> None:
    assert pair.tokenizer is not None
    tokenizer = Tokenizer(pair.tokenizer.raw, {}, template)
    pair = Pair(pair.backend.with_drafter(None), tokenizer, pair.generation)
    with pytest.raises((TokenizerError, PromptError)) as error:
        pair.generate(tokenizer.apply_chat_template([{"role": "user", "content": "x"}]))
    one_sentence(error.value)


# ---- data sets ----

HALF_LINES = [
    {"text": HALF}, {"prompt": HALF}, {"messages": [{"role": "user", "content": HALF}]}, {"text": "x", "task": HALF},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": HALF}]}]},
    {"messages": [{"role": "user", "content": "x", "name": HALF}]},
]  # fmt: skip


@pytest.mark.parametrize("entry", HALF_LINES, ids=json.dumps)
def test_half_a_surrogate_pair_in_data_is_named(entry: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(f'{{"text": "good \\ud83d\\ude00"}}\n{json.dumps(entry)}\n', encoding="utf-8")
    with pytest.raises(DataError, match="half a surrogate pair") as error:
        list(read_examples(file))
    assert str(error.value).startswith(f"{file}:2 ")
    one_sentence(error.value)


def error_of(file: Path) -> DataError | None:
    try:
        list(read_examples(file))
    except DataError as error:
        return error
    return None


@pytest.mark.parametrize("line", ['{"text": ' + "9" * 5000 + "}", '{"text": @}', '{"text": "x", "task": @}'])
def test_a_line_that_python_can_not_read_is_named(line: str, tmp_path: Path) -> None:
    """At every depth about the interpreter's limit, which is met while the line is read, or later."""
    file, errors = tmp_path / "a.jsonl", []
    for depth in range(900, 1020, 9):
        file.write_text(line.replace("@", "[" * depth + "]" * depth), encoding="utf-8")
        errors.append(error_of(file))
    assert errors[-1] is not None
    for error in errors:
        if error is not None:
            assert str(error).startswith(f"{file}:1 ")
            one_sentence(error)


def test_a_byte_order_mark_begins_no_line(tmp_path: Path) -> None:
    (file := tmp_path / "a.jsonl").write_bytes(BOM + b'{"text": "x"}\n{"text": "y"}\n')
    assert [example.content for example in read_examples(file)] == ["x", "y"]


# ---- the command line ----


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (file := tmp_path / "prompt").write_bytes(BOM + PROMPT.encode())
    assert main(["generate", "-n", "8", "--json", "--file", str(file)]) == 0
    content = json.loads(capsys.readouterr().out)
    assert main(["generate", "-n", "8", "--json", PROMPT]) == 0
    assert content["prompt_token_ids"] == json.loads(capsys.readouterr().out)["prompt_token_ids"]
    (schema := tmp_path / "schema").write_bytes(BOM + b'{"type": "boolean"}')
    assert main(["generate", "-n", "8", "-q", PROMPT, "--json-schema", str(schema)]) == 0
    assert capsys.readouterr().out.strip() in ("true", "false")


def test_a_byte_order_mark_is_no_part_of_standard_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], pair: Pair
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(BOM + PROMPT.encode()), "utf-8"))
    assert main(["generate", "-n", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt_token_ids"] == pair.encode(PROMPT)


def test_text_that_is_none_is_refused_by_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    half, latin = os.fsdecode(LATIN), tmp_path / "latin"
    latin.write_bytes(LATIN)
    (escaped := tmp_path / "escaped").write_text('{"const": "\\ud83d"}', encoding="utf-8")
    (data := tmp_path / "a.jsonl").write_text(json.dumps({"text": HALF}), encoding="utf-8")
    short = ["-n", "4"]
    assert "the prompt has half" in refused(capsys, ["generate", half, *short])
    assert "--system has half" in refused(capsys, ["generate", "x", "--chat", "--system", half, *short])
    assert "a stop string is" in refused(capsys, ["generate", "x", "--stop", half, *short])
    assert "regular expression has half" in refused(capsys, ["generate", "x", "--regex", half, *short])
    assert "is not UTF-8 text" in refused(capsys, ["generate", "--file", str(latin), *short])
    assert "is not UTF-8 text" in refused(capsys, ["generate", "x", "--json-schema", str(latin), *short])
    assert "JSON schema has half" in refused(capsys, ["generate", "x", "--json-schema", str(escaped), *short])
    assert f"{data}:1 has half" in refused(capsys, ["acceptance", str(data), *short])
    assert "latin:1 is not UTF-8" in refused(capsys, ["acceptance", str(latin), *short])
    assert "--token-ids is" in refused(capsys, ["generate", "--token-ids", half])
    assert "can not be read" in refused(capsys, ["generate", "--file", str(tmp_path / half)])
    assert "the model's name has half" in refused(capsys, ["serve", "--port", "0", "--model-name", half])
    assert "is not UTF-8" in refused(capsys, ["serve", "--port", "0", "--api-key-file", str(latin)])
    assert "--api-key has" in refused(capsys, ["bench-serve", "--url", "http://127.0.0.1:9", "--api-key", "é"])


@pytest.mark.parametrize(
    ("encoding", "errors"), [("utf-8", "strict"), ("utf-8", "surrogateescape"), ("ascii", "strict")]
)
def test_standard_input_that_is_no_text(
    encoding: str, errors: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(LATIN), encoding, errors))
    assert refused(capsys, ["generate", "-n", "4"]).startswith("error: standard input ")


def test_bytes_that_are_no_text_on_the_command_line_of_a_process() -> None:
    for arguments, stdin, said in ((["generate", LATIN], b"", b"the prompt has half"),
                                   (["generate"], LATIN, b"standard input ")):  # fmt: skip
        ran = subprocess.run([sys.executable, "-m", "gemma_mtp", *arguments], input=stdin, capture_output=True,
                             timeout=300, check=False, env={**os.environ, "PYTHONIOENCODING": "ascii"})  # fmt: skip
        assert (ran.returncode, ran.stdout) == (2, b"")
        assert ran.stderr.startswith(b"error: " + said) and ran.stderr.count(b"\n") == 1


@pytest.fixture(scope="module")
def umlauts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A pair whose every token is a letter that ASCII does not have."""
    root = tmp_path_factory.mktemp("umläuts")
    save_pair(root, *agreeing_pair(3))
    raw = RawTokenizer(word_models.WordLevel({chr(0xC0 + i): i for i in range(61)}, unk_token="À"))
    raw.save(str(root / "target" / "tokenizer.json"))
    return ["--target", str(root / "target"), "--drafter", str(root / "drafter"), "-n", "6"]


def printed(monkeypatch: pytest.MonkeyPatch, encoding: str, arguments: list[str], code: int = 0) -> tuple[bytes, bytes]:
    """What a command writes to streams of that encoding."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    assert main(arguments) == code
    for stream in streams:
        stream.flush()
    out, err = (stream.buffer.getvalue() for stream in streams)
    return out, err


@pytest.mark.parametrize("option", ["--ignore-eos", "--show-drafts", "--compare"])
def test_ascii_output_has_escapes_for_what_it_can_not_print(
    umlauts: list[str], option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["generate", "À", *umlauts, option]
    plain, _ = printed(monkeypatch, "utf-8", arguments)
    escaped, err = printed(monkeypatch, "ascii", arguments)
    letters = re.findall(r"[À-ü]", plain.decode())[:6]
    assert len(letters) == 6 and escaped.isascii() and err.isascii()
    found = [match.decode() for match in re.findall(rb"\\x[0-9a-f]{2}", escaped)[:6]]
    assert found == [f"\\x{ord(letter):x}" for letter in letters]


def test_other_commands_print_on_ascii_too(umlauts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments in (["inspect", umlauts[1]], ["--help"], ["generate", "--help"], ["inspect", "--json", umlauts[1]]):
        out, _ = printed(monkeypatch, "ascii", arguments)
        assert out.isascii() and out
    _, err = printed(monkeypatch, "ascii", ["inspect", "/absent/é"], 2)
    assert err.isascii() and err.count(b"\n") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["inspect", str(bundled_directory() / "target")]) == 2
        assert capsys.readouterr().err == "error: the output: No space left on device.\n"


def test_brackets_and_colons_in_text_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    console().print("a[/b] [red]c :smile: [/]", soft_wrap=True)
    assert capsys.readouterr().out == "a[/b] [red]c :smile: [/]\n"


def test_a_path_with_brackets_is_printed_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = tmp_path / "a[" / "b]"
    save_pair(odd, *agreeing_pair(3))
    assert main(["inspect", str(odd / "target")]) == 0
    assert "a[/b]/target" in capsys.readouterr().out.replace("\n", "")


# ---- the server's settings ----


def test_keys_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (file := tmp_path / "keys").write_bytes(BOM + b"secret\n")
    assert read_keys(file, "") == ("secret",)
    with pytest.raises(GemmaMtpError, match="GEMMA_MTP_API_KEYS has half"):
        read_keys(None, os.fsdecode(LATIN))
    assert check_text("é", "x", DataError) == "é"


# ---- the server ----

TEMPLATE = "{% set said = messages[0].content %}" + "".join(
    f"{{% if said == '{name}' %}}{template}{{% endif %}}"
    for name, template in BROKEN_TEMPLATES.items() if name not in ("syntax", "deep")
) + "{{ said }}"  # fmt: skip


@pytest.fixture(scope="module")
def live(pair: Pair) -> Iterator[Live]:
    assert pair.tokenizer is not None
    tokenizer = Tokenizer(pair.tokenizer.raw, pair.tokenizer.settings, TEMPLATE)
    with serving(Pair(pair.backend.with_drafter(None), tokenizer, pair.generation)) as live:
        yield live
        assert live.post("/v1/completions", {"prompt": "import", "max_tokens": 2}).status_code == 200


@pytest.mark.parametrize("name", [name for name in BROKEN_TEMPLATES if name not in ("syntax", "deep")])
def test_whatever_a_template_raises_is_a_bad_request(live: Live, name: str) -> None:
    for path in ("/v1/chat/completions", "/tokenize"):
        answer = live.post(path, {"messages": [{"role": "user", "content": name}]})
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert error["param"] == "messages" and error["message"].endswith(".") and "\n" not in error["message"]


GOOD: dict[str, Any] = {"prompt": "x", "max_tokens": 1}
WITH_HALVES: list[dict[str, Any]] = [
    {"prompt": HALF}, {"prompt": ["x", HALF]}, {"stop": HALF}, {"stop": ["a", HALF]}, {"regex": HALF}, {"model": HALF},
    {"verification": HALF}, {"logit_bias": {HALF: 1}}, {HALF: 1}, {"unknown": [{"a": HALF}]},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"const": HALF}}}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"properties": {HALF: {}}}}}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "description": HALF, "schema": {}}}},
]  # fmt: skip


@pytest.mark.parametrize("fields", WITH_HALVES, ids=str)
def test_half_a_surrogate_pair_is_a_bad_request_in_any_field(live: Live, fields: dict[str, Any]) -> None:
    body = json.dumps({**GOOD, **fields}).encode()
    answer = live.client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")


@pytest.mark.parametrize("content", [HALF, [{"type": "text", "text": HALF}]], ids=["text", "part"])
def test_half_a_surrogate_pair_is_a_bad_request_in_a_conversation(live: Live, content: Any) -> None:
    for path in ("/v1/chat/completions", "/tokenize"):
        body = json.dumps({"messages": [{"role": "user", "content": content}]}).encode()
        answer = live.client.post(path, content=body, headers={"Content-Type": "application/json"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")


PARTS = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo "}]
TALK = [{"role": "developer", "content": PARTS}, {"role": "user", "content": PARTS},
        {"role": "assistant", "content": "x"}, {"role": "user", "content": "é"}]  # fmt: skip


def test_data_sets_make_the_prompt_that_the_server_makes(live: Live, tmp_path: Path) -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    tokenizer = Tokenizer(live.service.tokenizer.raw, live.service.tokenizer.settings, template)
    (file := tmp_path / "a.jsonl").write_text(json.dumps({"messages": TALK}), encoding="utf-8")
    (example,) = read_examples(file)
    assert example.render(tokenizer) == "<system>hello <user>hello <assistant>x<user>é"
    previous, live.service.tokenizer.chat_template = live.service.tokenizer.chat_template, template
    try:
        answer = live.post("/tokenize", {"messages": TALK})
    finally:
        live.service.tokenizer.chat_template = previous
    assert answer.json()["tokens"] == example.token_ids(tokenizer)


@pytest.mark.parametrize(
    "content", [[], ["x"], [{"type": "text"}], [{"type": "text", "text": 3}], [{"text": "x"}], [{"type": "image_url"}]],
    ids=str,
)  # fmt: skip
def test_content_that_the_server_refuses_is_refused_in_data(content: Any, live: Live, tmp_path: Path) -> None:
    message = {"role": "user", "content": content}
    (file := tmp_path / "a.jsonl").write_text(json.dumps({"messages": [message]}), encoding="utf-8")
    with pytest.raises(DataError, match="has message 1 with content") as error:
        list(read_examples(file))
    one_sentence(error.value)
    assert live.post("/tokenize", {"messages": [message]}).status_code == 400
