"""Text to token ids and back, and a conversation to its text and ids, by a checkpoint's own files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as RawTokenizer

from gemma_mtp.chat import template as chat
from gemma_mtp.chat.marks import TurnMarks
from gemma_mtp.errors import TokenizerError
from gemma_mtp.tokenizer import files
from gemma_mtp.tokenizer.token_text import TextDecoder, TokenTexts


class Tokenizer:
    """A checkpoint's `tokenizer.json`, with what its other tokenizer files and chat templates add to it.

    `raw` is brought into the state that transformers uses it in. Raises TokenizerError for settings that are malformed.
    """

    def __init__(
        self, raw: RawTokenizer, settings: Mapping[str, Any], chat_template: chat.Templates | None = None
    ) -> None:
        self.raw = raw
        self.settings = settings
        self.chat_template = chat_template
        #: texts of special tokens by name, such as `bos_token`
        self.special_tokens = files.apply_settings(raw, settings)
        special = {token.content: i for i, token in raw.get_added_tokens_decoder().items() if token.special}
        self._special_ids = frozenset(special.values())
        #: special tokens that set parts of a model's turn apart, as far as there are some
        self.marks = TurnMarks.of(special)
        self._texts = TokenTexts(raw)

    @classmethod
    def from_dir(cls, directory: str | Path) -> Tokenizer:
        """Read a checkpoint directory's tokenizer files. Raises TokenizerError where one is missing or malformed."""
        directory = Path(directory)
        raw, settings = files.read_backend(directory), files.read_settings(directory)
        return cls(raw, settings, chat.read_templates(directory, settings))

    @property
    def vocab_size(self) -> int:
        size: int = self.raw.get_vocab_size(with_added_tokens=True)
        return size

    @property
    def template_variables(self) -> frozenset[str]:
        """Names that the chat template asks its caller for, such as `messages` and `enable_thinking`; none without."""
        return frozenset() if self.chat_template is None else chat.asked_for(chat.template_of(self.chat_template))

    def template_knows(self, name: str) -> bool:
        """Whether the chat template, that for tools where there is one, has such a name in it, such as `tool_calls`."""
        return self.chat_template is not None and name in chat.template_of(self.chat_template, with_tools=True)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of a text, as transformers encodes it; `special` adds what tokenizer.json puts around a text.

        One thing differs: where a text begins with the BOS token itself, a second one is not put before it.
        """
        ids: list[int] = self.raw.encode(text, add_special_tokens=special).ids
        bos = self.raw.token_to_id(self.special_tokens.get("bos_token", ""))
        return ids[1:] if special and bos is not None and ids[:2] == [bos, bos] else ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of tokens, which is what `stream` makes of them."""
        decoder = self.stream(skip_special_tokens)
        return decoder.push(token_ids) + decoder.flush()

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to a text in the midst of others, in UTF-8, which may be a part of a character."""
        piece = self._texts.piece(token_id) or b""
        return piece.encode() if isinstance(piece, str) else piece

    def stream(self, skip_special_tokens: bool = True) -> TextDecoder:
        """A decoder to feed token by token."""
        return TextDecoder(self._texts, self._special_ids if skip_special_tokens else frozenset())

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """Render a conversation with the checkpoint's template, as transformers does.

        Raises TokenizerError where the checkpoint has no template, or the template refuses the messages.
        """
        if self.chat_template is None:
            raise TokenizerError("the checkpoint has no chat template; add chat_template.jinja, or leave out --chat.")
        template = chat.template_of(self.chat_template, with_tools=tools is not None)
        known = {**self.special_tokens, **variables}
        return chat.render(template, messages, add_generation_prompt, tools, documents, known)

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """Token ids of a rendered conversation: a BOS token where the template writes one, and there alone.

        `variables`, `tools` and `documents` among them, are those of `apply_chat_template`; it raises the same errors.
        """
        return self.encode(self.apply_chat_template(messages, add_generation_prompt, **variables), special=False)
