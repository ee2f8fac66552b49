"""Messages of a conversation as chat templates take them, whoever sent them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Message = Mapping[str, Any]


def for_template(message: Message) -> dict[str, Any]:
    """The message with its content as one text: its text parts joined, or none at all. A developer is the system, which
    is the name that templates know."""
    role, content = message["role"], message.get("content")
    text = (content or "") if content is None or isinstance(content, str) else "".join(part["text"] for part in content)
    return {**message, "role": "system" if role == "developer" else role, "content": text}
