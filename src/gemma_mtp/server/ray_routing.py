"""Which replica a request goes to: that of its conversation, where it can be, so that kept keys and values serve again.

A conversation's home is the replica of the highest hash of both (rendezvous hashing): every ingress process finds the
same one without asking another, and where a replica comes or goes only the conversations that it gains or had move.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

#: names a conversation in a header; fields of the body that do, the first one given
SESSION_HEADER = b"x-session-id"
SESSION_FIELDS = ("prompt_cache_key", "user")
#: of a prompt that tell its conversation: characters, or token ids
BEGINNING = 256


def conversation_of(headers: Iterable[tuple[bytes, bytes]], body: Any) -> str:
    """What requests of one conversation have in common, as a hash; "" where a request has none.

    A session's or a user's name where one is given; else the messages (or items of the input) to the first of the
    user's, or the first `BEGINNING` characters or token ids of the prompt (or input; of several prompts, of the first).
    """
    session = next((value.decode("latin-1") for name, value in headers if name == SESSION_HEADER and value), None)
    if session is not None:
        return _digest("session", session)
    if not isinstance(body, dict):
        return ""
    for field in SESSION_FIELDS:
        if isinstance(name := body.get(field), str) and name:
            return _digest(field, name)
    given = body.get("input")  # of /v1/responses
    if isinstance(messages := body.get("messages", given), list) and messages:
        roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
        first = roles.index("user") + 1 if "user" in roles else len(roles)
        return _digest("messages", messages[:first])
    prompt = body.get("prompt", given)
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        prompt = prompt[0]
    return _digest("prompt", prompt[:BEGINNING]) if isinstance(prompt, str | list) and prompt else ""


def _digest(kind: str, value: Any) -> str:
    return hashlib.blake2b(json.dumps([kind, value]).encode(), digest_size=16).hexdigest()


def home_of(conversation: str, replicas: Sequence[str]) -> str:
    """The replica that a conversation belongs to; replicas by their ids, in any order."""
    return max(replicas, key=lambda replica: hashlib.blake2b(f"{conversation}@{replica}".encode()).digest())


class ConversationRouter(RequestRouter):
    """Serve's router for engine replicas; a request's first argument has the attributes `conversation` and `replica`.

    A request goes to the replica that it must go to, where it names one that there is, however busy that is. Else
    it goes to its conversation's home, unless that has `room` requests or more while another replica has fewer, or
    takes no more. Then, and where there is no conversation, it goes to the less busy of two drawn at random.
    """

    #: seconds that a replica may take to say how busy it is; Serve's 0.1 passes over one whose process has work
    queue_len_response_deadline_s = 1.0

    def initialize_state(self, **kwargs: Any) -> None:
        """`room`: requests that a replica decodes together."""
        self._room: int = kwargs["room"]

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of replicas, to be tried in turn."""
        by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        conversation = ""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # wait before these ranks are tried once more
            request = pending_request.args[0]
            if request.replica in by_id:
                return [[by_id[request.replica]]]
            conversation = request.conversation
        if not conversation or not by_id:
            return [_two(candidate_replicas)]
        home = by_id.pop(home_of(conversation, sorted(by_id)))
        others = list(by_id.values())
        free = [replica for replica in others if self._load(replica.replica_id) < self._room]
        if self._load(home.replica_id) >= self._room and free:
            return [_two(free), [home], _two(others)]
        return [[home], _two(others)]

    def _load(self, replica_id: ReplicaID) -> int:
        """Requests at a replica, as last known; 0 where nothing is."""
        return self.replica_queue_len_cache.get(replica_id) or 0


def _two(replicas: list[RunningReplica]) -> list[RunningReplica]:
    return random.sample(replicas, min(2, len(replicas)))
