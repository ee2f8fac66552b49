"""What each token adds to a text, by a tokenizer's decoder, and the text of tokens that come one after the other.

The `tokenizers` library decodes a whole list at once. Here every token is decoded by itself, once, and a text is put
together from these pieces: in linear time, and the same whether its tokens come together or one by one.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Final

from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders

from gemma_mtp.errors import TokenizerError

#: decoder parts that look at one token at a time, and at whether it is the first
_ONE_TOKEN = {"Replace", "Strip", "Metaspace", "WordPiece"}
#: decoder parts that make bytes of tokens
_BYTES = {"ByteLevel", "ByteFallback"}
#: how a token of byte fallback is written; the library reads the digits as Rust does, a plus sign included
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f+][0-9A-Fa-f])>")
#: a token that stands before another one where that must not be the first
_BEFORE = "a"
_EACH_BYTE: Final = "gemma_mtp.replace_each_byte"


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(_EACH_BYTE, _replace_each_byte)


class TokenTexts:
    """The pieces of a tokenizer's tokens: text, or bytes of which several tokens may make one character.

    Valid UTF-8 becomes the text that the library makes of it. Of invalid bytes, with a byte-level decoder, too. With
    byte fallback each byte that belongs to no character becomes U+FFFD, and the characters around it stay; the library
    gives up all characters of a run of byte tokens that has one invalid byte, so that no text of a run would be certain
    before its last byte. Raises TokenizerError for a decoder that has parts which are not known to work token by token.
    """

    def __init__(self, raw: RawTokenizer) -> None:
        self._raw = raw
        before, self._bytes, after = _split(_parts(raw))
        self._before = None if raw.decoder is None else _decoder(before)
        self._alphabet = _byte_alphabet() if self._bytes == "ByteLevel" else {}
        #: what is done with invalid bytes
        self.errors: str = "replace" if self._bytes == "ByteLevel" else _EACH_BYTE
        #: characters that a text's beginning loses, each so many times at most
        self.strips: tuple[tuple[str, int], ...] = tuple((part["content"], part["start"]) for part in after)
        self._known: dict[int, str | bytes | None] = {}

    def piece(self, token_id: int, first: bool = False) -> str | bytes | None:
        """What a token adds where it comes first, or after others; None for an id that is no token's."""
        if first:
            return self._made(token_id, True)
        if token_id not in self._known:
            self._known[token_id] = self._made(token_id, False)
        return self._known[token_id]

    def _made(self, token_id: int, first: bool) -> str | bytes | None:
        token = self._raw.id_to_token(token_id)
        if token is None:
            return None
        if self._before is None:  # tokens without a decoder are words
            return token if first else f" {token}"
        text: str = self._before.decode([token]) if first else self._after_another(token)
        if self._bytes == "ByteLevel":
            known = [self._alphabet.get(character) for character in text]
            return text.encode() if None in known else bytes(byte for byte in known if byte is not None)
        if self._bytes == "ByteFallback" and (match := _BYTE_TOKEN.fullmatch(text)):
            return bytes([int(match[1], 16)])
        return text

    def _after_another(self, token: str) -> str:
        assert self._before is not None
        together: str = self._before.decode([_BEFORE, token])
        return together[len(self._before.decode([_BEFORE])) :]


class TextDecoder:
    """Turns tokens into text as they come: a character as soon as its last byte is there, and never half of one.

    The pieces joined are the text of all tokens, however they are cut. Tokens of `skipped` have no text.
    """

    def __init__(self, texts: TokenTexts, skipped: Collection[int] = frozenset()) -> None:
        self._texts = texts
        self._skipped = skipped
        self._utf8 = codecs.getincrementaldecoder("utf-8")(texts.errors)
        self._in_bytes = False
        self._first = True
        self._strips_left = list(texts.strips)

    def push(self, token_ids: Iterable[int]) -> str:
        """Text that became certain with these tokens."""
        made: list[str] = []
        for token_id in token_ids:
            piece = None if token_id in self._skipped else self._texts.piece(token_id, self._first)
            if piece is None:
                continue
            self._first = False
            if isinstance(piece, bytes):
                self._in_bytes = True
                made.append(self._utf8.decode(piece))
            else:
                made += (self._end_of_bytes(), piece) if self._in_bytes else (piece,)
        return self._stripped("".join(made))

    def flush(self) -> str:
        """Text still held back, when no more tokens come: what stands for a broken character."""
        return self._stripped(self._end_of_bytes())

    def _end_of_bytes(self) -> str:
        self._in_bytes = False
        return self._utf8.decode(b"", final=True)

    def _stripped(self, text: str) -> str:
        """The text without characters that its beginning loses, as many as are still to be lost."""
        for i, (content, left) in enumerate(self._strips_left if text else ()):
            while left and text.startswith(content):
                text, left = text[len(content) :], left - 1
            self._strips_left[i] = content, 0 if text else left
        return text


def _parts(raw: RawTokenizer) -> list[Mapping[str, Any]]:
    """The parts of a tokenizer's decoder, in their order, as tokenizer.json has them."""
    if raw.decoder is None:
        return []
    return list(_flat(json.loads(raw.decoder.__getstate__())))


def _flat(part: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    if part["type"] != "Sequence":
        return [part]
    return [inner for each in part["decoders"] for inner in _flat(each)]


def _split(
    parts: list[Mapping[str, Any]],
) -> tuple[list[Mapping[str, Any]], str | None, list[Mapping[str, Any]]]:
    """Parts for one token at a time, the part that makes bytes, and parts that strip the beginning of the whole text.

    Raises TokenizerError where a decoder has another shape.
    """
    # a Strip that takes from the end needs the end; of one token's text, the library's own fails where both ends meet
    end = next((i for i, part in enumerate(parts) if part["type"] not in _ONE_TOKEN or part.get("stop")), len(parts))
    before, rest = parts[:end], parts[end:]
    kind = rest.pop(0)["type"] if rest and rest[0]["type"] in _BYTES else None
    joined = kind == "ByteLevel"
    after = []
    for part in rest:
        if part["type"] == "Fuse":
            joined = True
        elif joined and part["type"] == "Strip" and not part["stop"]:
            after.append(part)
        else:
            raise TokenizerError(
                f"tokenizer.json's decoder is {' > '.join(part['type'] for part in parts)}, of which"
                f" {part['type']} there can not be decoded token by token; use the tokenizer.json that came with the"
                " model."
            )
    return before, kind, after


def _decoder(parts: list[Mapping[str, Any]]) -> Any:
    """The library's own decoder of these parts alone."""
    decoder = decoders.Sequence([])
    decoder.__setstate__(json.dumps({"type": "Sequence", "decoders": parts}).encode())
    return decoder


def _byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level token stands for: itself, or one of 256 on where not printable."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {**{chr(byte): byte for byte in printable}, **{chr(256 + i): byte for i, byte in enumerate(others)}}
