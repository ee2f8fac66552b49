"""From a conversation to the prompt that a model goes on from: the one way for commands, data sets and the server."""

from __future__ import annotations

from gemma_mtp.chat.conversation import Conversation
from gemma_mtp.errors import TokenizerError
from gemma_mtp.text import check_text
from gemma_mtp.tokenizer import Tokenizer

#: names that chat templates give to the switch for thinking text, Gemma's first
THINKING_VARIABLES = ("enable_thinking", "thinking")


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
