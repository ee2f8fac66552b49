"""Responses that are kept in memory, so that clients can retrieve them and go on with them. The oldest go first.

Where there are several servers, each has its own, and ids end in the name of the server that made them.
"""

from __future__ import annotations

import re
import secrets
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gemma_mtp.server.errors import ApiError
from gemma_mtp.server.responses_protocol import Item, ModelResponse
from gemma_mtp.server.service import Batch

PATH = "/v1/responses"
_ID = re.compile(r"(?:resp|rs|msg|fc)_[0-9a-f]{32}_([^/]+)")


def new_id(prefix: str, suffix: str) -> str:
    """An id that can not be guessed. `suffix`: "", or "_" and the name of the server."""
    return f"{prefix}_{secrets.token_hex(16)}{suffix}"


def server_of(path: str, body: Any) -> str:
    """The name of the server that has what a request is about, or goes on from; "" where it is about nothing kept."""
    if not path.startswith(PATH):
        return ""
    fields = body if isinstance(body, dict) else {}
    items = fields.get("input")
    given = [item for item in (items if isinstance(items, list) else ()) if isinstance(item, dict)]
    references = [item.get("id") for item in reversed(given) if item.get("type") == "item_reference"]
    for each in (path.removeprefix(PATH).partition("/")[2].partition("/")[0], fields.get("previous_response_id"),
                 *references):  # fmt: skip
        if isinstance(each, str) and (found := _ID.fullmatch(each)):
            return found[1]
    return ""


@dataclass
class Stored:
    """A response, the items that a later one goes on from, and its batch while it is in work.

    `given`: what the request brought; `made`: what the model wrote, by the id of each item.
    """

    response: ModelResponse
    given: Sequence[Item]
    made: dict[str, Item] = field(default_factory=dict)
    batch: Batch | None = None
    cancelled: bool = False
    size: int = 0


class ResponseStore:
    """At most so many responses, and so many characters in all."""

    def __init__(self, most: int, most_characters: int) -> None:
        self._most, self._most_characters = most, most_characters
        self._kept: OrderedDict[str, Stored] = OrderedDict()
        self._characters = 0

    def add(self, stored: Stored) -> None:
        """Keep a response from its beginning on."""
        stored.size = sum(len(item.model_dump_json()) for item in stored.given)
        self._kept[stored.response.id] = stored
        self._characters += stored.size
        self._shrink()

    def complete(self, stored: Stored, made: dict[str, Item]) -> None:
        """Note what the model wrote, if the response is still kept."""
        stored.made, stored.batch = made, None
        if self._kept.get(stored.response.id) is stored:
            more = sum(len(item.model_dump_json()) for item in made.values())
            stored.size += more
            self._characters += more
            self._shrink()

    def get(self, response_id: str, param: str | None = None) -> Stored:
        """Raises ApiError where it is not kept."""
        stored = self._kept.get(response_id)
        if stored is None:
            raise ApiError(404, "there is no such response; it was not stored, or is not kept any longer.", param=param)
        self._kept.move_to_end(response_id)
        return stored

    def delete(self, response_id: str) -> Stored:
        """Raises ApiError where it is not kept."""
        stored = self.get(response_id)
        self._drop(response_id)
        return stored

    def history(self, response_id: str | None) -> list[Item]:
        """All items up to the end of a response, the first ones first. Raises ApiError where one is not kept."""
        chain: list[Stored] = []
        while response_id is not None:
            chain.append(self.get(response_id, "previous_response_id"))
            response_id = chain[-1].response.previous_response_id
        if chain and chain[0].response.status == "in_progress":
            raise ApiError(400, "the previous response is still in work; wait for it.", param="previous_response_id")
        return [item for stored in reversed(chain) for item in (*stored.given, *stored.made.values())]

    def item(self, item_id: str) -> Item:
        """An item that the model wrote. Raises ApiError where it is not kept."""
        for stored in reversed(self._kept.values()):
            if item_id in stored.made:
                return stored.made[item_id]
        raise ApiError(404, "there is no such item; its response is not kept; send the item itself.", param="input")

    def _shrink(self) -> None:
        while self._kept and (len(self._kept) > self._most or self._characters > self._most_characters):
            self._drop(next(iter(self._kept)))

    def _drop(self, response_id: str) -> None:
        self._characters -= self._kept.pop(response_id).size
