"""Acceptance of a pair, measured by decoding prompts in the engine: never taken from a training log.

Everything follows from one histogram: in how many rounds were 0, 1, ... K drafts accepted. A round that the token limit
left room for fewer than K drafts is left out; one that a stop token ended counts with the drafts up to it.

Two lengths are in use in the field, and both are given: the **acceptance length** counts the target's own token of
every round (the correction or bonus token; 1 to K + 1; vLLM's `mean_acceptance_length`, SGLang's `spec_accept_length`),
the **accepted drafts** do not (0 to K; the index of vLLM's `acceptance_histogram` and SGLang's
`spec_correct_drafts_histogram`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from gemma_mtp.datasets import Example, first_lines
from gemma_mtp.decoding.params import SamplingParams
from gemma_mtp.decoding.verify import Verification
from gemma_mtp.engine.pair import Pair
from gemma_mtp.engine.result import GenerationResult
from gemma_mtp.errors import SamplingError, TokenizerError
from gemma_mtp.measure.defaults import PROMPT_TOKENS

#: what acceptance is measured with unless something else is said: greedy, past any end of text, so that every prompt
#: counts alike
GREEDY = SamplingParams(max_tokens=128, ignore_eos=True)
RESAMPLES = 10_000
#: is told how many prompts are done, and of how many
OnPrompt = Callable[[int, int], object]


def nobody(done: int, of: int) -> None:
    """An `OnPrompt` for work that nobody watches."""


@dataclass(frozen=True)
class Prompt:
    """What a pair goes on from: text, or token ids. `name` tells it from the others, `task` groups it."""

    name: str
    content: str | Sequence[int]
    task: str = ""


def prompts_of(
    pair: Pair, examples: Iterable[Example], prompt_tokens: int = PROMPT_TOKENS, **template_variables: Any
) -> list[Prompt]:
    """Examples of a data set as prompts for this pair. Texts are cut to their first lines of `prompt_tokens` tokens;
    prompts and conversations are taken whole, through the chat template.

    Raises TokenizerError without a tokenizer, DataError for an example the pair can not take.
    """
    if pair.tokenizer is None:
        raise TokenizerError("a data set needs a tokenizer, and the target's directory has no tokenizer.json; add it.")
    tokenizer, config, prompts = pair.tokenizer, pair.target.config, []
    for example in examples:
        if example.kind == "text":
            example = replace(example, content=first_lines(str(example.content), tokenizer, prompt_tokens))
        ids = example.token_ids(
            tokenizer,
            vocab_size=config.vocab_size,
            max_tokens=config.max_position_embeddings - 1,
            **template_variables,
        )
        prompts.append(Prompt(example.origin, ids, example.task))
    return prompts


@dataclass(frozen=True)
class Acceptance:
    """`histogram[n]`: rounds in which exactly n of K drafts were accepted, [K + 1]. `a + b` pools two."""

    histogram: tuple[int, ...]

    def __add__(self, other: Acceptance) -> Acceptance:
        return Acceptance(tuple(a + b for a, b in zip(self.histogram, other.histogram, strict=True)))

    @staticmethod
    def of(results: Iterable[GenerationResult], draft_tokens: int) -> Acceptance:
        """From the decode rounds of generations that were asked for `draft_tokens` drafts a round."""
        counts = [0] * (draft_tokens + 1)
        for result in results:
            for round_ in result.decode_rounds:
                if round_.drafted == draft_tokens:
                    counts[round_.accepted] += 1
        return Acceptance(tuple(counts))

    @property
    def draft_tokens(self) -> int:
        return len(self.histogram) - 1

    @property
    def rounds(self) -> int:
        return sum(self.histogram)

    @property
    def accepted(self) -> int:
        """Drafts accepted, the target's own tokens not counted."""
        return sum(n * rounds for n, rounds in enumerate(self.histogram))

    @property
    def reached(self) -> tuple[int, ...]:
        """[K + 1]: rounds in which at least n drafts were accepted."""
        return tuple(sum(self.histogram[n:]) for n in range(len(self.histogram)))

    @property
    def by_position(self) -> list[float]:
        """[K]: conditional acceptance, the share of rounds that accepted draft i among those that did draft i - 1."""
        return [_ratio(self.reached[i + 1], self.reached[i]) for i in range(self.draft_tokens)]

    @property
    def joint_by_position(self) -> list[float]:
        """[K]: joint acceptance, the share of all rounds that accepted drafts 1 to i."""
        return [_ratio(self.reached[i + 1], self.rounds) for i in range(self.draft_tokens)]

    @property
    def mean_length(self) -> float:
        """Mean acceptance length, with the target's own token: 1 + accepted drafts / rounds; 0 without a round."""
        return 1 + self.mean_accepted if self.rounds else 0.0

    @property
    def mean_accepted(self) -> float:
        """Mean accepted drafts a round, without the target's own token."""
        return _ratio(self.accepted, self.rounds)

    def to_dict(self) -> dict[str, Any]:
        """For JSON. Names are vLLM's (`metrics.speculative_decoding`) where it has one; the rest are ours."""
        return {
            "num_spec_tokens": self.draft_tokens,
            "num_spec_steps": self.rounds,
            "num_draft_tokens": self.rounds * self.draft_tokens,
            "num_accepted_draft_tokens": self.accepted,
            "draft_acceptance_rate": _ratio(self.accepted, self.rounds * self.draft_tokens),
            "mean_acceptance_length": self.mean_length,
            "mean_accepted_drafts": self.mean_accepted,
            "acceptance_histogram": {str(n): rounds for n, rounds in enumerate(self.histogram)},
            "acceptance_length_histogram": {str(n + 1): rounds for n, rounds in enumerate(self.histogram)},
            "conditional_acceptance_by_position": self.by_position,
            "joint_acceptance_by_position": self.joint_by_position,
        }


@dataclass(frozen=True)
class PromptAcceptance:
    """One prompt's rounds. `tokens` counts all output tokens, those of rounds that were left out too."""

    name: str
    task: str
    prompt_tokens: int
    tokens: int
    acceptance: Acceptance


@dataclass(frozen=True)
class AcceptanceReport:
    """Acceptance of one pair on several prompts, under one setting."""

    draft_tokens: int
    params: SamplingParams
    verification: Verification
    prompts: tuple[PromptAcceptance, ...]
    pooled: Acceptance = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pooled", self._pool(self.prompts))

    def _pool(self, prompts: Iterable[PromptAcceptance]) -> Acceptance:
        return sum((p.acceptance for p in prompts), Acceptance((0,) * (self.draft_tokens + 1)))

    @property
    def tokens(self) -> int:
        return sum(prompt.tokens for prompt in self.prompts)

    @property
    def by_task(self) -> dict[str, Acceptance]:
        """Pooled by task, in the order in which tasks first appear."""
        tasks = dict.fromkeys(prompt.task for prompt in self.prompts)
        return {task: self._pool(p for p in self.prompts if p.task == task) for task in tasks}

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the setting, what is pooled, by task, and each prompt."""
        return {
            "temperature": self.params.temperature,
            "top_k": self.params.top_k,
            "top_p": self.params.top_p,
            "seed": self.params.seed,
            "max_tokens": self.params.max_tokens,
            "verification": self.verification,
            "tokens": self.tokens,
            **self.pooled.to_dict(),
            "by_task": {task: acceptance.to_dict() for task, acceptance in self.by_task.items()},
            "prompts": [
                {"name": p.name, "task": p.task, "prompt_tokens": p.prompt_tokens, "tokens": p.tokens,
                 **p.acceptance.to_dict()}
                for p in self.prompts
            ],
        }  # fmt: skip


def measure_acceptance(
    pair: Pair,
    prompts: Sequence[Prompt],
    draft_tokens: int = 4,
    params: SamplingParams = GREEDY,
    verification: Verification = "exact",
    on_prompt: OnPrompt = nobody,
) -> AcceptanceReport:
    """Complete each prompt with `draft_tokens` drafts a round and count what was accepted.

    Prompt i is sampled with seed `params.seed` + i, so that prompts do not share their noise. Raises SamplingError
    where no whole round could be played, PromptError as `Pair.generate`.
    """
    if draft_tokens < 1:
        raise SamplingError(f"draft_tokens is {draft_tokens}, but must be 1 or more to measure acceptance.")
    if params.max_tokens < draft_tokens + 2:
        raise SamplingError(
            f"max_tokens is {params.max_tokens}, but must be at least {draft_tokens + 2}: one token of the prefill and"
            f" a round of {draft_tokens} drafts."
        )
    measured = []
    for i, prompt in enumerate(prompts):
        seeded = replace(params, seed=(params.seed + i) % 2**63)
        result = pair.generate(prompt.content, seeded, draft_tokens=draft_tokens, verification=verification)
        acceptance = Acceptance.of([result], draft_tokens)
        measured.append(
            PromptAcceptance(prompt.name, prompt.task, len(result.prompt_token_ids), len(result.token_ids), acceptance)
        )
        on_prompt(i + 1, len(prompts))
    return AcceptanceReport(draft_tokens, params, verification, tuple(measured))


@dataclass(frozen=True)
class Comparison:
    """Mean acceptance lengths of two drafters on the same prompts, and the interval of their difference."""

    before: float
    after: float
    difference: float
    low: float
    high: float
    confidence: float
    prompts: int

    def __str__(self) -> str:
        return (
            f"mean acceptance length {self.before:.3f} before, {self.after:.3f} after: {self.difference:+.3f}"
            f" ({self.confidence:.0%} interval {self.low:+.3f} to {self.high:+.3f}, {self.prompts} prompts)"
        )


def compare(
    before: AcceptanceReport,
    after: AcceptanceReport,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Comparison:
    """The difference of two reports' mean acceptance lengths, on the same prompts under the same setting.

    The interval is the percentile bootstrap's over prompts (Efron and Tibshirani 1993, chapter 13): prompts are drawn
    with replacement, both sides' from the same draw, because rounds of one prompt are alike and prompts differ.
    Raises ValueError where the reports do not belong together.
    """
    same = [p.name for p in before.prompts] == [p.name for p in after.prompts]
    if not same or before.draft_tokens != after.draft_tokens or before.params != after.params:
        raise ValueError("compare needs two reports of the same prompts, drafts a round and sampling parameters")
    counts = np.array([[[p.acceptance.accepted, p.acceptance.rounds] for p in r.prompts] for r in (before, after)])
    n = counts.shape[1]
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)  # [resamples, prompts]
    sums = np.einsum("rp,spc->src", draws, counts)  # sides s, counts c
    lengths = sums[..., 0] / np.maximum(sums[..., 1], 1)
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(lengths[1] - lengths[0], [tail, 100 - tail])
    means = before.pooled.mean_length, after.pooled.mean_length
    return Comparison(*means, means[1] - means[0], float(low), float(high), confidence, n)


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
