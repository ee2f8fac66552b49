"""Ways to decode that are measured beside each other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

#: least length of a side's turn: on a machine that others use, shorter ones differ more
TURN_SECONDS = 0.5


@dataclass
class Side:
    """One way to decode: prompt token ids in, output token ids out."""

    name: str
    run: Callable[[list[int]], list[int]]
    speeds: list[float] = field(default_factory=list)
    outputs: list[list[int]] = field(default_factory=list)
    #: the same without prefill, where the side tells its decode seconds
    decode_speeds: list[float] = field(default_factory=list)
    #: decode rounds' tokens and seconds, added up by `run` within one turn
    decoded: tuple[int, float] = (0, 0.0)
    #: of every round played: drafts proposed, tokens committed
    rounds: list[tuple[int, int]] = field(default_factory=list)
    #: the weight bytes of a target's step and of a draft step; None where they are not ours to count
    step_bytes: tuple[int, int] | None = None

    @property
    def speed(self) -> float:
        """Tokens a second, median over the repetitions."""
        return statistics.median(self.speeds)

    @property
    def acceptance_length(self) -> float | None:
        """Tokens committed a round."""
        return statistics.fmean(committed for _, committed in self.rounds) if self.rounds else None

    @property
    def drafts(self) -> float | None:
        """Drafts a round."""
        return statistics.fmean(drafted for drafted, _ in self.rounds) if self.rounds else None

    def ratio_to(self, other: Side) -> float:
        """Of the speeds: the median of the repetitions' ratios, whose two sides were measured within seconds."""
        return statistics.median(ours / theirs for ours, theirs in zip(self.speeds, other.speeds, strict=True))

    def decode_ratio_to(self, other: Side) -> float | None:
        """The same of the decode speeds."""
        if not self.decode_speeds or not other.decode_speeds:
            return None
        pairs = zip(self.decode_speeds, other.decode_speeds, strict=True)
        return statistics.median(ours / theirs for ours, theirs in pairs)

    def floor(self, bandwidth: float) -> float | None:
        """Tokens a second if rounds took as long as reading their weights once does, at that many bytes a second."""
        if self.step_bytes is None or self.acceptance_length is None or self.drafts is None:
            return None
        target, draft = self.step_bytes
        return bandwidth * self.acceptance_length / (target + self.drafts * draft)


def measure(
    sides: Sequence[Side], prompts: Sequence[list[int]], repeats: int, each_time: Callable[[], object] = lambda: None
) -> None:
    """A warm-up of each side, then `repeats` rounds over all sides, beginning with another one each time.

    `each_time` is called once before every round.
    """
    for side in sides:
        side.run(prompts[0])
        side.rounds.clear()
    for repeat in range(repeats):
        each_time()
        for side in [*sides[repeat % len(sides) :], *sides[: repeat % len(sides)]]:
            side.decoded = 0, 0.0
            side.speeds.append(_speed(side, prompts))
            tokens, seconds = side.decoded
            if seconds:
                side.decode_speeds.append(tokens / seconds)


def _speed(side: Side, prompts: Sequence[list[int]]) -> float:
    """Tokens a second over all prompts, which are decoded again until `TURN_SECONDS` are over."""
    tokens, started = 0, time.perf_counter()
    while True:
        side.outputs = [side.run(prompt) for prompt in prompts]
        tokens += sum(map(len, side.outputs))
        seconds = time.perf_counter() - started
        if seconds >= TURN_SECONDS:
            return tokens / seconds
