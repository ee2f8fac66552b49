"""What `gemma-mtp acceptance` does: decode the prompts under every setting, and report."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

from gemma_mtp.backend.base import choice_of
from gemma_mtp.backend.processor import processor
from gemma_mtp.chat.prompt import THINKING_VARIABLES, thinking_variable
from gemma_mtp.cli import acceptance_report as shown
from gemma_mtp.cli import options
from gemma_mtp.cli.acceptance import (
    THINKING,
    ComparedPair,
    DraftingOptions,
    OutputOptions,
    PromptOptions,
    SamplingOptions,
)
from gemma_mtp.cli.console import console
from gemma_mtp.cli.progress import progress
from gemma_mtp.datasets import Example
from gemma_mtp.decoding.params import ChoiceKind, SamplingParams
from gemma_mtp.decoding.verify import Verification
from gemma_mtp.engine.loaded import sampling_params
from gemma_mtp.engine.pair import Pair
from gemma_mtp.errors import DataError, TokenizerError
from gemma_mtp.measure.acceptance import AcceptanceReport, compare, measure_acceptance, prompts_of
from gemma_mtp.measure.figure import measured_on
from gemma_mtp.measure.plot import plot_acceptance
from gemma_mtp.measure.speedup import SteadyCosts, measure_speedup, steady_costs

TEMPERATURES = (0.0, 1.0)


@dataclass(frozen=True)
class Setting:
    """One condition that acceptance is measured under."""

    params: SamplingParams
    thinking: bool | None

    @property
    def label(self) -> str:
        temperature = "greedy" if self.params.greedy else f"temperature {self.params.temperature:g}"
        return temperature if self.thinking is None else f"{temperature}, thinking {'on' if self.thinking else 'off'}"


def shared_params(sampling: SamplingOptions, pair: Pair, examples: Sequence[Example]) -> SamplingParams:
    """What all settings share; conversations are sampled, and end, as the checkpoint says."""
    conversations = any(example.kind != "text" for example in examples)
    if conversations and not all(example.kind != "text" for example in examples):
        text = next(example.origin for example in examples if example.kind == "text")
        raise DataError(f"{text} is text among prompts or messages, which are sampled differently; measure them apart.")
    ignore_eos = not conversations if sampling.ignore_eos is None else sampling.ignore_eos
    own = {**vars(sampling), "temperature": None, "ignore_eos": ignore_eos}
    return sampling_params(pair.generation.conversation() if conversations else {}, **own)


@dataclass(frozen=True)
class Measurement:
    """What is measured under every setting."""

    pair: Pair
    other: Pair | None
    examples: Sequence[Example]
    prompt_tokens: int
    drafting: DraftingOptions
    speed: bool
    costs: Callable[[ChoiceKind], SteadyCosts]
    say: Callable[..., object]

    def under(self, setting: Setting) -> shown.Measured:
        self.say(setting.label)
        variables = thinking_given(self.pair, setting.thinking)
        prompts = prompts_of(self.pair, self.examples, self.prompt_tokens, **variables)
        draft_tokens, verification = self.drafting.draft_tokens, cast(Verification, self.drafting.verification)

        def tell(name: str, done: int, of: int) -> None:
            self.say(f"{setting.label}{name}: {done} prompts of {of}", done / of)

        def report(side: Pair, name: str) -> AcceptanceReport:
            told = functools.partial(tell, name)
            return measure_acceptance(side, prompts, draft_tokens, setting.params, verification, told)

        own = report(self.pair, "")
        comparison = None if self.other is None else compare(report(self.other, ", the other drafter"), own)
        speedup = None
        if self.speed:
            speedup = measure_speedup(
                self.pair, prompts, draft_tokens, setting.params, verification,
                on_prompt=functools.partial(tell, ", speed"),
            )  # fmt: skip
        self.say(f"{setting.label}: costs of rounds")
        costs = self.costs(choice_of(self.pair.backend, setting.params))
        return shown.Measured(setting.label, setting.thinking, own, costs, speedup, comparison)


def thinking_given(pair: Pair, thinking: bool | None) -> dict[str, bool]:
    """The template variable that says whether to think. Raises TokenizerError where the template has none."""
    if thinking is None:
        return {}
    name = None if pair.tokenizer is None else thinking_variable(pair.tokenizer)
    if name is None:
        raise TokenizerError(
            f"--thinking needs a chat template that asks for {' or '.join(THINKING_VARIABLES)}, and the checkpoint's"
            " does not; leave it out."
        )
    return {name: thinking}


def acceptance(
    models: ComparedPair,
    chosen: PromptOptions,
    drafting: DraftingOptions,
    sampling: SamplingOptions,
    output: OutputOptions,
) -> None:
    """Measure, then print the report and draw the plot that was asked for."""
    sources = options.sources_of(chosen.data)
    with progress("reading"):
        examples = chosen.examples(sources)
    pair = models.pair(models.target, models.drafter)
    if pair.drafter is None:
        raise options.no_drafter("acceptance")
    other = None if models.against is None else models.pair(models.target, models.against)
    base = shared_params(sampling, pair, examples)
    settings = [
        Setting(replace(base, temperature=t), on)
        for on, t in itertools.product(THINKING[chosen.thinking], sampling.temperature or TEMPERATURES)
    ]
    with progress("measuring") as say:
        costs = functools.cache(functools.partial(steady_costs, pair))  # first asked for after prompts were decoded
        what = Measurement(pair, other, examples, chosen.prompt_tokens, drafting, output.speed, costs, say)
        measured = [what.under(setting) for setting in settings]
    if output.plot is not None:
        plot_acceptance(
            {m.label: m.report for m in measured}, output.plot, {m.label: m.predictions for m in measured},
            title=f"Acceptance of {drafting.draft_tokens} drafts a round, {drafting.verification} verification",
            subtitle=measured_on(models.name, processor(pair.backend.device)),
        )  # fmt: skip
    if output.as_json:
        print(json.dumps({"data": [str(path) for path in sources], **shown.to_json(measured)}))
    else:
        shown.print_report(console(), measured)
