"""From a conversation to the prompt that a model goes on from: the one way for commands, data sets and the server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gemma_mtp.errors import TokenizerError
from gemma_mtp.text import check_text
from gemma_mtp.tokenizer import Tokenizer

#: names that chat templates give to the switch for thinking text, Gemma's first
THINKING_VARIABLES = ("enable_thinking", "thinking")

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Conversation:
    """What a chat template makes a prompt of.

    messages     objects with a role and a content: text, a list of text parts, or nothing. They are kept with the
                 content as one text, and a developer's as the system's, which is the name that templates know
    begin_turn   whether the prompt ends where the model's turn begins
    variables    further names that the template knows, such as enable_thinking=True, tools and documents
    """

    messages: Sequence[Message]
    begin_turn: bool = True
    variables: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "messages", tuple(map(_for_template, self.messages)))

    @staticmethod
    def of_user(prompt: str, system: str | None = None, variables: Mapping[str, Any] | None = None) -> Conversation:
        """Returns a conversation that a user begins, after the system's message if there is one."""
        before = [{"role": "system", "content": system}] if system else []
        return Conversation([*before, {"role": "user", "content": prompt}], variables=variables or {})


def _for_template(message: Message) -> dict[str, Any]:
    role, content = message["role"], message.get("content")
    text = (content or "") if content is None or isinstance(content, str) else "".join(part["text"] for part in content)
    return {**message, "role": "system" if role == "developer" else role, "content": text}


def chat_text(conversation: Conversation, tokenizer: Tokenizer) -> str:
    """Returns the prompt as text. The template has written the special tokens, so that encoding adds none.

    Raises TokenizerError where the checkpoint has no template, where the template refuses the messages, and where it
    makes something of them that is no text.
    """
    text = tokenizer.apply_chat_template(conversation.messages, conversation.begin_turn, **conversation.variables)
    return check_text(text, "what the chat template makes of them", TokenizerError)


def chat_ids(conversation: Conversation, tokenizer: Tokenizer) -> list[int]:
    """Returns the prompt as token ids. Raises the same errors as `chat_text`."""
    return tokenizer.encode(chat_text(conversation, tokenizer), special=False)


def thinking_variable(tokenizer: Tokenizer) -> str | None:
    """Returns the name of the chat template's switch for thinking text, if it has one."""
    return next((name for name in THINKING_VARIABLES if name in tokenizer.template_variables), None)
