"""Ways to decode that are measured beside each other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass
class Side:
    """One way to decode: prompt token ids in, output token ids out."""

    name: str
    run: Callable[[list[int]], list[int]]
    speeds: list[float] = field(default_factory=list)
    outputs: list[list[int]] = field(default_factory=list)
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

    def floor(self, bandwidth: float) -> float | None:
        """Tokens a second if rounds took as long as reading their weights once does, at that many bytes a second."""
        if self.step_bytes is None or self.acceptance_length is None or self.drafts is None:
            return None
        target, draft = self.step_bytes
        return bandwidth * self.acceptance_length / (target + self.drafts * draft)


def measure(sides: Sequence[Side], prompts: Sequence[list[int]], repeats: int) -> None:
    """A warm-up of each side, then `repeats` rounds over all sides, beginning with another one each time."""
    for side in sides:
        side.run(prompts[0])
        side.rounds.clear()
    for repeat in range(repeats):
        for side in [*sides[repeat % len(sides) :], *sides[: repeat % len(sides)]]:
            started = time.perf_counter()
            outputs = [side.run(prompt) for prompt in prompts]
            seconds = time.perf_counter() - started
            side.speeds.append(sum(map(len, outputs)) / seconds)
            side.outputs = outputs
