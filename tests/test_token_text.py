"""The text of tokens: pieces that join to the whole, the library's own text, stop strings inside runs of bytes."""

import functools
from collections.abc import Iterator

import pytest
from byte_fallback import FIRST_BYTE, OPEN, gemma_like
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models

from gemma_mtp.engine.pair import bundled_directory
from gemma_mtp.errors import TokenizerError
from gemma_mtp.tokenizer import Tokenizer
from gemma_mtp.tokenizer.output_text import OutputText
from gemma_mtp.tokenizer.token_text import TokenTexts

REPLACE, FUSE, BYTES = decoders.Replace("▁", " "), decoders.Fuse(), decoders.ByteFallback()
DECODERS = {
    "gemma": decoders.Sequence([REPLACE, BYTES, FUSE]),
    "no fuse": decoders.Sequence([REPLACE, BYTES]),
    "stripped": decoders.Sequence([REPLACE, BYTES, FUSE, decoders.Strip(" ", 2, 0)]),
    "stripped twice": decoders.Sequence([BYTES, FUSE, decoders.Strip("▁", 1, 0), decoders.Strip("h", 3, 0)]),
    "nested": decoders.Sequence([decoders.Sequence([REPLACE]), decoders.Sequence([BYTES, decoders.Sequence([FUSE])])]),
    "spaces": decoders.Metaspace("▁", "always"),
    "no first space": decoders.Metaspace("▁", "never"),
    "words": decoders.WordPiece("▁", True),
    "each stripped": decoders.Strip("▁", 1, 0),
    "none": None,
}
SCRIPTS = ["hello ok", "ᚠᚢᚦᚨᚱᚲᚷᚹ", "👩‍👩‍👧‍👦🏳️‍🌈", "कि्षु", "ﷺﷻ", "é日本", "\u200d\ufe0f", "𐌰𐌱𐌲", "\ufffd", "  "]
TEXTS = st.lists(st.sampled_from(SCRIPTS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=9)).map("".join)
IDS = st.lists(
    st.integers(FIRST_BYTE, FIRST_BYTE + 255) | st.integers(0, len(gemma_like().get_vocab()) + 2)
    | st.sampled_from([FIRST_BYTE + byte for byte in (0xE1, 0x9A, 0xA0, 0xF0, 0xED, 0xA0, 0xC0, 0x20)]),
    max_size=40,
)  # fmt: skip
MANY = settings(max_examples=60)


@functools.cache
def tokenizer(name: str) -> Tokenizer:
    if name == "bytes":
        return Tokenizer.from_dir(bundled_directory() / "target")
    raw = gemma_like()
    raw.decoder = DECODERS[name]
    return Tokenizer(raw, {})


def ids_of(text: str, name: str = "gemma") -> list[int]:
    return tokenizer(name).encode(text, special=False)


def cut(ids: list[int], data: st.DataObject) -> Iterator[list[int]]:
    while ids:
        step = data.draw(st.integers(1, 5))
        yield ids[:step]
        ids = ids[step:]


@pytest.mark.parametrize("name", [*DECODERS, "bytes"])
@given(TEXTS, st.booleans())
@MANY
def test_valid_text_is_the_librarys(name: str, text: str, skip: bool) -> None:
    ours, ids = tokenizer(name), ids_of(text, name)
    assert ours.decode(ids, skip) == ours.raw.decode(ids, skip_special_tokens=skip)
    if name in ("gemma", "bytes"):
        assert ours.decode(ids, skip_special_tokens=False) == text.replace("▁", " " if name == "gemma" else "▁")


@pytest.mark.parametrize("name", [*DECODERS, "bytes"])
@given(IDS, st.booleans(), st.data())
@MANY
def test_pieces_join_to_the_whole(name: str, ids: list[int], skip: bool, data: st.DataObject) -> None:
    """Any tokens, cut anywhere: broken characters, special tokens and unknown ids inside runs, too."""
    ours = tokenizer(name)
    decoder = ours.stream(skip)
    whole = "".join([decoder.push(part) for part in cut(ids, data)]) + decoder.flush()
    assert whole == ours.decode(ids, skip) == expected(ours, ids, skip)


def expected(ours: Tokenizer, ids: list[int], skip: bool) -> str:
    """What the library says of the runs' bytes made valid, with U+FFFD for what is not: slow and obvious."""
    by_bytes = {FIRST_BYTE + byte: byte for byte in range(256)}
    special = set(ours._special_ids) if skip else set()
    ids = [i for i in ids if i not in special and ours.raw.id_to_token(i) is not None]
    if ours.raw.decoder is None or b"ByteFallback" not in ours.raw.decoder.__getstate__():
        return ours.raw.decode(ids, skip_special_tokens=skip)
    mended: list[int | str] = []
    run = b""
    for token in [*ids, None]:
        if token in by_bytes:
            run += bytes([by_bytes[token]])
            continue
        mended += mend(run)
        run = b""
        mended += [] if token is None else [token]
    words = [each if isinstance(each, str) else str(ours.raw.id_to_token(each)) for each in mended]
    numbers = {word: i for i, word in enumerate(dict.fromkeys(words))}
    raw = RawTokenizer(models.WordLevel(numbers))
    raw.decoder = ours.raw.decoder
    return raw.decode([numbers[word] for word in words])


def mend(run: bytes) -> list[int | str]:
    """The tokens of a run's valid characters, and a replacement character for each other byte."""
    found: list[int | str] = []
    at = 0
    while at < len(run):
        for length in range(1, 5):
            try:
                run[at : at + length].decode()
            except UnicodeDecodeError:
                continue
            found += [FIRST_BYTE + byte for byte in run[at : at + length]] if at + length <= len(run) else []
            at += length
            break
        else:
            found.append("\ufffd")
            at += 1
    return found


def test_every_byte_of_broken_utf8_is_replaced_and_its_neighbours_stay() -> None:
    """The library gives up the whole run where one byte of it is invalid."""
    rune, broken = ids_of("ᚠ"), FIRST_BYTE + 0xE1
    ours = tokenizer("gemma")
    assert ours.decode([*rune, broken]) == "ᚠ\ufffd"
    assert ours.raw.decode([*rune, broken]) == "\ufffd" * 4
    assert ours.decode([*rune[:2], *rune]) == "\ufffd\ufffdᚠ"
    assert ours.decode([broken] * 3) == ours.raw.decode([broken] * 3) == "\ufffd" * 3


def test_a_character_comes_with_its_last_byte() -> None:
    text = "aᚠᚢᚦ👩‍👩‍👧b"
    ids, decoder = ids_of(text), tokenizer("gemma").stream()
    pieces = [decoder.push([token_id]) for token_id in ids]
    assert [piece for piece in pieces if piece] == list(text)
    assert decoder.flush() == ""
    assert decoder.push([ids_of("ᚠ")[0], OPEN, *ids_of("ᚠ")[1:]]) == "ᚠ", "a token without text is not in the run"


def test_the_work_grows_with_the_tokens() -> None:
    """The library's decoder is asked about each of the vocabulary's tokens once, whatever the length of a run."""
    asked = []

    class Counting:
        decoder = tokenizer("gemma").raw.decoder

        def id_to_token(self, token_id: int) -> str | None:
            asked.append(token_id)
            return tokenizer("gemma").raw.id_to_token(token_id)

    ours = tokenizer("gemma")
    texts = TokenTexts(Counting())  # type: ignore[arg-type]
    ids = ids_of("ᚠᚢᚦᚨᚱᚲᚷᚹ" * 1000)
    decoder = Tokenizer.stream(ours)
    decoder._texts = texts
    assert "".join([decoder.push([token_id]) for token_id in ids]) == "ᚠᚢᚦᚨᚱᚲᚷᚹ" * 1000
    assert len(ids) == 24_000
    assert len(asked) == len(set(ids)) + 1, "each once, and the first once more"


@pytest.mark.parametrize("name", ["gemma", "stripped", "bytes"])
@given(TEXTS, st.data())
@settings(max_examples=100)
def test_a_stop_string_is_found_at_the_same_token_however_tokens_come(
    name: str, text: str, data: st.DataObject
) -> None:
    ours, ids = tokenizer(name), ids_of(text, name)
    text = ours.decode(ids)
    start = data.draw(st.integers(0, len(text)))
    stop = text[start : start + data.draw(st.integers(1, 3))]
    one_by_one, ended, found = OutputText(ours, [stop] if stop else []), len(ids), []
    for count, token_id in enumerate(ids, start=1):
        found.append(one_by_one.push([token_id], last=count == len(ids)))
        if one_by_one.stopped:
            ended = count
            break
    in_parts, parts = OutputText(ours, [stop] if stop else []), list(cut(ids[:ended], data))
    given = [in_parts.push(part, last=i == len(parts)) for i, part in enumerate(parts, start=1)]
    assert "".join(found) == "".join(given) == (text[: text.find(stop)] if stop else text)
    assert one_by_one.stopped == in_parts.stopped == bool(stop)
    if stop:
        assert stop in ours.decode(ids[:ended])
        assert stop not in ours.stream().push(ids[: ended - 1]), "no token before it completes the stop string"


@pytest.mark.parametrize(
    ("decoder", "wrong"),
    [
        (decoders.Sequence([BYTES, FUSE, REPLACE]), "Replace"), (decoders.Sequence([BYTES, REPLACE]), "Replace"),
        (decoders.Sequence([BYTES, FUSE, decoders.Strip(" ", 0, 1)]), "Strip"), (decoders.Strip("▁", 1, 1), "Strip"),
        (decoders.Sequence([BYTES, decoders.Strip(" ", 1, 0)]), "Strip"), (decoders.BPEDecoder("x"), "BPEDecoder"),
        (decoders.Sequence([REPLACE, decoders.CTC("<pad>")]), "CTC"),
    ],
)  # fmt: skip
def test_decoders_that_need_the_whole_are_refused(decoder: decoders.Decoder, wrong: str) -> None:
    raw = gemma_like()
    raw.decoder = decoder
    with pytest.raises(TokenizerError, match=f"of which {wrong} there can not be decoded token by token"):
        Tokenizer(raw, {})
