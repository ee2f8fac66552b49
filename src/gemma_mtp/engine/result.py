"""What a generation returns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from gemma_mtp.chat.marks import Region
from gemma_mtp.chat.turn import Thought, TurnReader
from gemma_mtp.tokenizer import Tokenizer
from gemma_mtp.tokenizer.output_text import OutputText

FinishReason = Literal["stop", "length", "cancelled"]
#: how an output token came about: by the prefill, as an accepted draft, or as the target's own token after a refused
#: draft, after accepted ones, or where none was made
TokenKind = Literal["first", "draft", "correction", "bonus", "plain"]


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of an output token and of the likeliest tokens in its place, (token id, log-probability)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class PromptLogprob(TokenLogprob):
    """The same of a prompt's token. `rank`: its place among all tokens, 1 for the likeliest."""

    rank: int


class RoundStats(NamedTuple):
    """One round: draft tokens proposed, draft tokens accepted, and tokens committed to the output.

    `committed` is `accepted` + 1 (a correction if a draft was refused, else a bonus token), or fewer where a stop
    condition cut the round.
    """

    drafted: int
    accepted: int
    committed: int


def token_kinds(round_: RoundStats, first: bool) -> list[TokenKind]:
    """How a round's tokens came about: accepted drafts, then the target's own token unless the output ended before.

    `first`: of the prefill.
    """
    own: TokenKind = "correction" if round_.accepted < round_.drafted else "bonus" if round_.drafted else "plain"
    drafts: list[TokenKind] = ["draft"] * min(round_.accepted, round_.committed)
    return [*drafts, "first" if first else own][: round_.committed]


@dataclass
class GenerationResult:
    """The output of one prompt.

    `rounds[0]` is the prefill, which commits the first token; `rounds[1:]` are the decode rounds. A stop token is part
    of `token_ids`; a stop string, one of `stop`, is not part of `text`. Nor are thoughts and calls, where `begin` says
    which part of the model's turn the prompt leaves off in; None: all is text.
    """

    prompt_token_ids: list[int]
    draft_tokens: int | Literal["auto"]
    verification: str
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason = "length"
    ended: bool = False  # by a stop condition or its length: no token follows
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[PromptLogprob] | None = None  # of the prompt's tokens after its first
    rounds: list[RoundStats] = field(default_factory=list)
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    tokenizer: Tokenizer | None = field(default=None, repr=False, compare=False)
    stop: Sequence[str] = field(default=(), repr=False, compare=False)
    begin: Region | None = field(default=None, repr=False, compare=False)

    @property
    def text(self) -> str | None:
        """What is certain of the tokens' text, decoded when it is asked for; None without a tokenizer."""
        if (reader := self.text_reader()) is None:
            return None
        ended = self.ended  # before looking at the tokens, of which the last come before it
        return reader.push(self.token_ids, last=ended)

    def text_reader(self) -> OutputText | None:
        """Makes text of the tokens as they come; None without a tokenizer."""
        if self.tokenizer is None or self.begin is None:
            return None if self.tokenizer is None else OutputText(self.tokenizer, self.stop)
        return OutputText(self.tokenizer, self.stop, self.tokenizer.marks, self.begin)

    def turn_reader(self, tools: Collection[str] = ()) -> TurnReader:
        """Reads the tokens as the parts of a turn. `tools`: names of those that may be called."""
        assert self.tokenizer is not None, "parts are told apart by a tokenizer's marks"
        return TurnReader(self.tokenizer, self.stop, self.begin or "text", tools)

    @property
    def thought(self) -> str | None:
        """What is certain of the text of thoughts; None where all is text."""
        if self.begin is None:
            return None
        ended = self.ended
        events = self.turn_reader().push(self.token_ids, last=ended)
        return "".join(event.text for event in events if isinstance(event, Thought))

    @property
    def decode_rounds(self) -> list[RoundStats]:
        return self.rounds[1:]

    @property
    def drafted(self) -> int:
        return sum(r.drafted for r in self.decode_rounds)

    @property
    def accepted(self) -> int:
        return sum(r.accepted for r in self.decode_rounds)

    @property
    def rounds_by_drafts(self) -> dict[int, int]:
        """Number of drafts -> in how many decode rounds that many were made, in ascending order."""
        return dict(sorted(Counter(r.drafted for r in self.decode_rounds).items()))

    @property
    def accepted_by_position(self) -> list[float]:
        """For each draft position, the share of rounds in which it was accepted given that those before it were."""
        shares = []
        for position in range(max((r.drafted for r in self.decode_rounds), default=0)):
            reached = [r for r in self.decode_rounds if r.drafted > position and r.accepted >= position]
            kept = sum(r.accepted > position for r in reached)
            shares.append(kept / len(reached) if reached else 0.0)
        return shares

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens committed per decode round, the target's own included; 0 where there was no decode round."""
        rounds = self.decode_rounds
        return sum(r.committed for r in rounds) / len(rounds) if rounds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Decode speed: the tokens after the first, over the time spent in decode rounds."""
        return sum(r.committed for r in self.decode_rounds) / self.decode_seconds if self.decode_seconds else 0.0
