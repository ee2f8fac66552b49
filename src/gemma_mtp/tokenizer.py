"""Text to token ids and back: encoding, incremental decoding, stop strings, and the checkpoint's chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as RawTokenizer

from gemma_mtp.errors import TokenizerError

#: what an incomplete UTF-8 sequence decodes to
REPLACEMENT = "\ufffd"
#: tokens of context a piece of text is decoded with, at least: decoders look at most one token back (leading spaces,
#: bytes); and when it is cut to that again
CONTEXT_TOKENS, LONGEST_CONTEXT = 4, 12


class Tokenizer:
    """A checkpoint's `tokenizer.json`, with what `tokenizer_config.json` and `chat_template.jinja` add to it."""

    def __init__(self, raw: RawTokenizer, settings: Mapping[str, Any], chat_template: str | None = None) -> None:
        self.raw = raw
        self.settings = settings
        self.chat_template = chat_template
        self.bos_token = _token_text(settings.get("bos_token"))
        self.eos_token = _token_text(settings.get("eos_token"))

    @classmethod
    def from_dir(cls, directory: str | Path) -> Tokenizer:
        """Read a checkpoint directory's tokenizer files. Raises TokenizerError where one is missing or malformed."""
        path = Path(directory) / "tokenizer.json"
        if not path.is_file():
            raise TokenizerError(f"{directory} has no tokenizer.json; add the tokenizer's files, or use token ids.")
        try:
            raw = RawTokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception
            raise TokenizerError(f"{path} is not a readable tokenizer file ({error}); copy it again.") from None
        settings = _read_settings(Path(directory) / "tokenizer_config.json")
        template_file = Path(directory) / "chat_template.jinja"
        template = template_file.read_text(encoding="utf-8") if template_file.is_file() else None
        return cls(raw, settings, template or _named_template(settings.get("chat_template")))

    @property
    def vocab_size(self) -> int:
        size: int = self.raw.get_vocab_size(with_added_tokens=True)
        return size

    @property
    def template_variables(self) -> frozenset[str]:
        """Names that the chat template asks its caller for, such as `messages` and `enable_thinking`; none without."""
        if self.chat_template is None:
            return frozenset()
        try:
            return frozenset(jinja2.meta.find_undeclared_variables(_environment().parse(self.chat_template)))
        except (jinja2.TemplateError, RecursionError) as error:
            raise TokenizerError(f"the checkpoint's chat template is not valid Jinja: {error}.") from None

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, beginning with the BOS token once where the tokenizer's files ask for it."""
        ids: list[int] = self.raw.encode(text).ids
        bos = None if self.bos_token is None else self.raw.token_to_id(self.bos_token)
        if bos is None:
            return ids
        if self.settings.get("add_bos_token") and ids[:1] != [bos]:
            return [bos, *ids]
        # a rendered chat template already begins with the BOS text
        return ids[1:] if ids[:2] == [bos, bos] else ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        text: str = self.raw.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def stream(self) -> TextDecoder:
        """A decoder to feed token by token."""
        return TextDecoder(self)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """Render a conversation with the checkpoint's template, as transformers does.

        Raises TokenizerError where the checkpoint has no template, or the template refuses the messages.
        """
        if self.chat_template is None:
            raise TokenizerError("the checkpoint has no chat template; add chat_template.jinja, or leave out --chat.")
        special = {"bos_token": self.bos_token or "", "eos_token": self.eos_token or ""}
        try:
            return _environment().from_string(self.chat_template).render(
                messages=messages, add_generation_prompt=add_generation_prompt, **{**special, **variables}
            )  # fmt: skip
        except MemoryError:
            raise
        except Exception as error:  # whatever an expression of the template raises
            said = " ".join(f"{error}".split()).rstrip(".") or type(error).__name__
            raise TokenizerError(f"the checkpoint's chat template can not render these messages: {said}.") from None


class TextDecoder:
    """Turns tokens into text as they come, and never gives out half a character.

    Each piece is decoded with a few tokens of context before it, so that the cost of a token does not grow with the
    text; pieces joined are the decoding of all tokens. (The method of vLLM and text-generation-inference.)
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decode = tokenizer.raw.decode  # without special tokens
        self._ids: list[int] = []  # context, then what is not given out yet
        self._context = ""  # the text of the context

    def push(self, token_ids: Sequence[int]) -> str:
        """Text that became certain with these tokens."""
        self._ids.extend(token_ids)
        text = self._decode(self._ids)
        if len(text) > len(self._context) and not text.endswith(REPLACEMENT):
            piece = text[len(self._context) :]
            if len(self._ids) > LONGEST_CONTEXT:
                self._ids = self._ids[-CONTEXT_TOKENS:]
                text = self._decode(self._ids)
            self._context = text
            return piece
        if len(token_ids) <= 1:
            return ""
        del self._ids[-len(token_ids) :]  # the last ones are half a character: give out what comes before it
        return "".join([self.push([token_id]) for token_id in token_ids])

    def flush(self) -> str:
        """Text still held back, when no more tokens come: the replacement character of a broken sequence."""
        text = self._decode(self._ids)
        piece = text[len(self._context) :]
        self._context = text
        return piece


class StopMatcher:
    """Finds the first stop string in text that comes in pieces; holds back what may be the beginning of one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop = tuple(stop)
        self.stopped = False
        self._held = ""

    def push(self, text: str) -> str:
        """Text that is certain to come before any stop string; nothing more once one was found."""
        if not self.stop:
            return text
        if self.stopped:
            return ""
        self._held += text
        # the match that is complete first, so that the result does not depend on how the text is cut into pieces
        found = [(at + len(stop), at) for stop in self.stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._give(min(found)[1])
        return self._give(len(self._held) - self._possible_beginning())

    def flush(self) -> str:
        """What is held back, when no more text comes."""
        return "" if self.stopped else self._give(len(self._held))

    def _possible_beginning(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max((len(stop) - 1 for stop in self.stop), default=0)
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self.stop):
                return length
        return 0

    def _give(self, length: int) -> str:
        given, self._held = self._held[:length], self._held[length:]
        return given


class OutputText:
    """The text of one output, from its tokens as they come: what is certain of it, up to a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._decoder = tokenizer.stream()
        self._matcher = StopMatcher(stop)

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found, which ends the output."""
        return self._matcher.stopped

    def push(self, token_ids: Sequence[int], last: bool = False) -> str:
        """Text that became certain with these tokens. With the last ones also what was held back: half characters and
        possible beginnings of stop strings."""
        text = self._matcher.push(self._decoder.push(token_ids))
        return text + self._matcher.push(self._decoder.flush()) + self._matcher.flush() if last else text


def _read_settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path} is not valid JSON ({error}); copy it again.") from None
    if not isinstance(settings, dict):
        raise TokenizerError(f"{path} must hold a JSON object, but holds a {type(settings).__name__}.")
    return settings


def _token_text(entry: object) -> str | None:
    """A special token's text; older files store an object with its `content`."""
    content = entry.get("content") if isinstance(entry, dict) else entry
    return content if isinstance(content, str) else None


def _named_template(entry: object) -> str | None:
    """The template in tokenizer_config.json: one string, or a list of named ones of which "default" is taken."""
    if isinstance(entry, list):
        named = {item.get("name"): item.get("template") for item in entry if isinstance(item, dict)}
        entry = named.get("default")
    return entry if isinstance(entry, str) else None


def _environment() -> ImmutableSandboxedEnvironment:
    """The environment transformers renders chat templates in (utils/chat_template_utils.py): sandboxed, trimmed."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
