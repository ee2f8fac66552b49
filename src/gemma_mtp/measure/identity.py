"""Whether a server says the same with drafting on and off: outputs compared as text, prompt by prompt.

Two outputs are identical where their text and the reason they ended are. A side is repeatable for a prompt where all
its outputs are the first one's. Where the sides part, the margin is what the plain side's log-probabilities say between
the token it chose and the other side's: small where rounding may decide, large where something is wrong.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Output:
    """One answer. `drafts`: draft tokens made for it, None where the server does not say; `error`: what failed."""

    text: str = ""
    finish_reason: str | None = None
    prompt_tokens: int = 0
    drafts: int | None = None
    error: str | None = None

    def same(self, other: Output) -> bool:
        return (self.text, self.finish_reason) == (other.text, other.finish_reason)


@dataclass(frozen=True)
class ScoredToken:
    """A token of an answer that was asked for with log-probabilities, and the likeliest ones in its place."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Parting:
    """Where a drafted output leaves the plain one: the character, and, as far as log-probabilities are given, the
    token, both tokens' texts and the margin between them in nats.

    `reproduced`: whether the plain side said the same up to there when it was asked for log-probabilities.
    """

    character: int
    token: int | None = None
    plain_token: str | None = None
    drafted_token: str | None = None
    margin: float | None = None
    reproduced: bool | None = None


@dataclass(frozen=True)
class Compared:
    """A prompt at one concurrency: the outputs of both sides in the order of repetitions."""

    prompt: str
    clients: int
    plain: tuple[Output, ...]
    drafted: tuple[Output, ...]
    parting: Parting | None = None

    @property
    def failed(self) -> list[str]:
        return [output.error for output in (*self.plain, *self.drafted) if output.error is not None]

    @property
    def identical(self) -> bool:
        return self.first_difference is None

    @property
    def first_difference(self) -> tuple[Output, Output] | None:
        """The first repetition whose outputs differ."""
        pairs = zip(self.plain, self.drafted, strict=True)
        return next(((plain, drafted) for plain, drafted in pairs if not plain.same(drafted)), None)

    @property
    def prompt_tokens(self) -> int:
        return max(output.prompt_tokens for output in (*self.plain, *self.drafted))

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "identical": self.identical, "prompt_tokens": self.prompt_tokens}


@dataclass(frozen=True)
class Group:
    """Shares over the prompts of one concurrency and length, those left out that failed."""

    clients: int
    shortest: int
    longest: int
    prompts: int
    identical: int
    plain_repeatable: int
    drafted_repeatable: int
    failed: int


def parting_character(plain: str, drafted: str) -> int:
    """Returns the first character that differs; where one text begins the other, its length."""
    pairs = enumerate(zip(plain, drafted, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(plain), len(drafted)))


def parting(plain: str, drafted: str, scored: Sequence[ScoredToken] | None) -> Parting:
    """Returns where two different texts part; `scored` is a plain answer to the same prompt, None without one.

    The other side's token is the likeliest of those in that place that its text goes on with: where several do, the
    margin is the least that it can be.
    """
    character = parting_character(plain, drafted)
    if scored is None:
        return Parting(character)
    ends = list(itertools.accumulate(len(token.text) for token in scored))
    again = "".join(token.text for token in scored)
    index = next((i for i, end in enumerate(ends) if end > character), None)
    if index is None or again[: ends[index]] != plain[: ends[index]]:
        return Parting(character, reproduced=False)
    own, start = scored[index], ends[index] - len(scored[index].text)
    rest = drafted[start:]
    others = [(logprob, text) for text, logprob in own.top if text and text != own.text and rest.startswith(text)]
    if not others:
        return Parting(character, index, own.text, reproduced=True)
    logprob, text = max(others)
    return Parting(character, index, own.text, text, own.logprob - logprob, True)


def repeatable(outputs: Sequence[Output]) -> bool:
    return all(output.same(outputs[0]) for output in outputs)


def groups(compared: Sequence[Compared]) -> list[Group]:
    """Returns shares by concurrency and by prompts' lengths in tokens: 1, 2 to 3, 4 to 7, and so on."""
    keyed: dict[tuple[int, int], list[Compared]] = {}
    for one in compared:
        keyed.setdefault((one.clients, max(one.prompt_tokens, 1).bit_length() - 1), []).append(one)
    return [_group(clients, power, own) for (clients, power), own in sorted(keyed.items())]


def _group(clients: int, power: int, own: Sequence[Compared]) -> Group:
    whole = [one for one in own if not one.failed]
    return Group(
        clients, 2**power, 2 ** (power + 1) - 1, len(whole), sum(one.identical for one in whole),
        sum(repeatable(one.plain) for one in whole), sum(repeatable(one.drafted) for one in whole),
        len(own) - len(whole),
    )  # fmt: skip


def drafts_made(compared: Sequence[Compared], side: str) -> int | None:
    """Returns the draft tokens of a side ("plain" or "drafted"), None where the server does not report them."""
    counts = [output.drafts for one in compared for output in getattr(one, side) if output.error is None]
    known = [count for count in counts if count is not None]
    return sum(known) if known else None
