"""What a load's requests say: prompts, lengths and sampling, each a pure function of the seed and its number."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gemma_mtp.datasets import Example


@dataclass(frozen=True)
class Ask:
    """What one request sends: a path such as /v1/completions and the body, without what asks for streaming."""

    path: str
    body: Mapping[str, Any]


@dataclass(frozen=True)
class RequestMix:
    """Requests on a data set's examples: texts to /v1/completions, prompts and messages to /v1/chat/completions.

    output_tokens   least and most tokens asked for; each length between is as likely
    settings        further fields of every body: sampling parameters and extensions
    prefix          text that all prompts begin with
    fresh           put a line of its own between the prefix and the prompt, so that a server that keeps prompts' keys
                    and values finds no more than the prefix again
    """

    examples: Sequence[Example]
    model: str
    output_tokens: tuple[int, int]
    settings: Mapping[str, Any] = field(default_factory=dict)
    prefix: str = ""
    fresh: bool = True
    seed: int = 0

    def ask(self, run: int, number: int, **extensions: Any) -> Ask:
        """The request of a number. In every run it has the same prompt and length, and a line of the run's own."""
        example = self._example(number)
        low, high = self.output_tokens
        length = int(np.random.default_rng([self.seed, number]).integers(low, high, endpoint=True))
        before = self.prefix + (self._line(run, number) if self.fresh else "")
        body = {"model": self.model, "max_tokens": length, "seed": self.seed + number, **self.settings, **extensions}
        if example.kind == "text":
            return Ask("/v1/completions", {**body, "prompt": f"{before}{example.content}"})
        first, *rest = example.conversation().messages
        return Ask("/v1/chat/completions", {**body, "messages": [_begun(first, before), *rest]})

    def _example(self, number: int) -> Example:
        """Every example once, in an order drawn anew for each pass through the data."""
        which, place = divmod(number, len(self.examples))
        order = np.random.default_rng([self.seed, which]).permutation(len(self.examples))
        return self.examples[order[place]]

    def _line(self, run: int, number: int) -> str:
        return f"# {hashlib.sha256(f'{self.seed} {run} {number}'.encode()).hexdigest()[:8]}\n"


def _begun(message: Mapping[str, Any], before: str) -> Mapping[str, Any]:
    """The message with that text before its own."""
    return {**message, "content": f"{before}{message['content']}"}
