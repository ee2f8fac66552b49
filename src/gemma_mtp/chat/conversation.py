"""A conversation as chat templates take it, whoever sent it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

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
