"""Encoding, incremental decoding and chat templates, against transformers' own."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from gemma_mtp.engine.pair import bundled_directory
from gemma_mtp.errors import TokenizerError
from gemma_mtp.tokenizer import Tokenizer
from gemma_mtp.tokenizer.output_text import StopMatcher

DIRECTORY = bundled_directory() / "target"
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.sampled_from(
    [
        "",
        " ",
        "naïve café",
        "日本語のテキスト",
        "🙂👩‍👩‍👧‍👦",
        "def f(x):\n\treturn  x\r\n",
        "<|turn>user\nhi<turn|>",
        "<bos><bos>x",
    ]
)
CONVERSATION = [
    {"role": "system", "content": "Answer in one line."},
    {"role": "user", "content": "  What is <|turn> 2 + 2?  "},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And é?"},
]


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return Tokenizer.from_dir(DIRECTORY)


@pytest.fixture(scope="module")
def theirs() -> AutoTokenizer:
    return AutoTokenizer.from_pretrained(DIRECTORY)


@given(TEXTS)
@settings(max_examples=300)
def test_encode_and_decode_are_transformers(ours: Tokenizer, theirs: AutoTokenizer, text: str) -> None:
    ids = ours.encode(text)
    if not text.startswith("<bos>"):  # ours never doubles a BOS that a rendered template already wrote
        assert ids == theirs(text)["input_ids"]
        assert ids[0] == 2
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@given(st.lists(st.integers(0, 4095), max_size=40), st.data())
@settings(max_examples=300)
def test_pieces_join_to_the_whole(ours: Tokenizer, ids: list[int], data: st.DataObject) -> None:
    """Any tokens, cut anywhere: broken characters too."""
    decoder, pieces, at = ours.stream(), [], 0
    while at < len(ids):
        step = data.draw(st.integers(1, 5))
        pieces.append(decoder.push(ids[at : at + step]))
        at += step
    pieces.append(decoder.flush())
    assert "".join(pieces) == ours.decode(ids)


def test_no_piece_ends_within_a_character(ours: Tokenizer) -> None:
    text = "a🙂b日本é"
    decoder = ours.stream()
    pieces = [decoder.push([token_id]) for token_id in ours.encode(text)]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert "" in pieces, "the test needs a character of several tokens"
    assert decoder.flush() == ""


@pytest.mark.parametrize("prompt", [True, False])
def test_chat_template_is_transformers(ours: Tokenizer, theirs: AutoTokenizer, prompt: bool) -> None:
    rendered = ours.apply_chat_template(CONVERSATION, add_generation_prompt=prompt)
    assert rendered == theirs.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=prompt)
    expected = theirs.apply_chat_template(CONVERSATION, add_generation_prompt=prompt)
    assert ours.encode(rendered) == expected["input_ids"]


def test_templates_with_loop_controls_json_and_refusals(ours: Tokenizer, theirs: AutoTokenizer) -> None:
    template = (
        "{% for m in messages %}\n    {% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}\n"
        "{%- if loop.index > 2 %}{% break %}{% endif %}{{ {'é': m.content} | tojson }}{% endfor %}{{ extra }}"
    )
    custom = Tokenizer(ours.raw, ours.settings, template)
    theirs_rendered = theirs.apply_chat_template(CONVERSATION, tokenize=False, chat_template=template, extra="!")
    assert custom.apply_chat_template(CONVERSATION, extra="!") == theirs_rendered
    with pytest.raises(TokenizerError, match="can not render these messages: no tools"):
        custom.apply_chat_template([{"role": "tool", "content": ""}])
    unsafe = Tokenizer(ours.raw, ours.settings, "{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(TokenizerError, match="unsafe"):
        unsafe.apply_chat_template(CONVERSATION)


def test_template_sources(tmp_path: Path, ours: Tokenizer) -> None:
    ours.raw.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="no chat template"):
        Tokenizer.from_dir(tmp_path).apply_chat_template(CONVERSATION)
    named = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert Tokenizer.from_dir(tmp_path).apply_chat_template(CONVERSATION) == "d"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert Tokenizer.from_dir(tmp_path).apply_chat_template(CONVERSATION) == "file"


def test_bad_files(tmp_path: Path, ours: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        Tokenizer.from_dir(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="not a readable tokenizer file"):
        Tokenizer.from_dir(tmp_path)
    ours.raw.save(str(tmp_path / "tokenizer.json"))
    for content, message in (("{", "is not valid JSON"), ("[]", "must hold a JSON object")):
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(TokenizerError, match=message):
            Tokenizer.from_dir(tmp_path)


def first_stop(text: str, stops: list[str]) -> str:
    """Reference: cut at the stop string whose last character comes first; the longest of those."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))]
    return text


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
@settings(max_examples=500)
def test_stop_strings_in_any_pieces(text: str, stops: list[str], data: st.DataObject) -> None:
    matcher, given_out, at = StopMatcher(stops), "", 0
    expected = first_stop(text, stops)
    while at < len(text):
        step = data.draw(st.integers(1, 4))
        given_out += matcher.push(text[at : at + step])
        at += step
        assert expected.startswith(given_out), "nothing of a stop string was given out"
    assert matcher.stopped == (expected != text or any(text.endswith(stop) for stop in stops))
    assert given_out + matcher.flush() == expected


def test_template_variables_are_what_the_template_asks_for(ours: Tokenizer) -> None:
    raw = ours.raw
    template = "{% set x = 1 %}{{ bos_token }}{% if enable_thinking %}{{ x }}{% endif %}{{ messages }}"
    assert Tokenizer(raw, {}, template).template_variables == {"bos_token", "enable_thinking", "messages"}
    assert Tokenizer(raw, {}).template_variables == frozenset()
    with pytest.raises(TokenizerError, match="not valid Jinja"):
        _ = Tokenizer(raw, {}, "{% if %}").template_variables
