"""`gemma-mtp acceptance`."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from gemma_mtp.chat.prompt import THINKING_VARIABLES, thinking_variable
from gemma_mtp.cli import acceptance_report as shown
from gemma_mtp.cli import options
from gemma_mtp.cli.console import console
from gemma_mtp.cli.option_groups import argument, group, option
from gemma_mtp.cli.options import DATA, DRAFTING, MODELS, OUTPUT, SAMPLING
from gemma_mtp.cli.progress import progress
from gemma_mtp.datasets import Example
from gemma_mtp.decoding.sampling import ChoiceKind, SamplingParams
from gemma_mtp.decoding.verify import Verification
from gemma_mtp.engine.loaded import sampling_params
from gemma_mtp.engine.pair import Pair, load_pair
from gemma_mtp.errors import DataError, PromptError, SamplingError, TokenizerError
from gemma_mtp.measure.acceptance import PROMPT_TOKENS, AcceptanceReport, compare, measure_acceptance, prompts_of
from gemma_mtp.measure.plot import check_plot, plot_acceptance
from gemma_mtp.measure.speedup import SteadyCosts, measure_speedup, steady_costs

THINKING = {"default": (None,), "on": (True,), "off": (False,), "both": (False, True)}
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


@group(MODELS)
class ComparedPair:
    """The pair to measure, and another drafter for its target."""

    target: Path | None = option(None, options.TARGET)
    drafter: Path | None = option(None, options.DRAFTER)
    against: Path | None = option(
        None, "Another drafter's directory, measured on the same prompts: the difference, with its 95% interval."
    )
    dtype: str = option("auto", options.DTYPE)
    device: str = option("auto", options.DEVICE)
    quantize: str | None = option(None, options.QUANTIZE)
    strict: bool = option(False, options.STRICT)
    threads: int | None = option(None, options.THREADS)

    def load(self, drafter: Path | None) -> Pair:
        return load_pair(
            self.target, drafter, dtype=self.dtype, device=self.device, quantize=self.quantize, strict=self.strict
        )


@group(DATA)
class PromptOptions(options.ExampleOptions):
    """Which examples are taken, and how prompts are made of them."""

    data: list[Path] | None = argument(
        None,
        "JSON lines with text, prompt or messages (and, optionally, task), plain text, source files, or"
        " directories of them; default: the bundled pair's held-out Python.",
    )
    prompt_tokens: int = option(
        PROMPT_TOKENS,
        "Texts and source files are cut to their first lines of so many tokens; prompts and messages are taken whole.",
    )
    thinking: str = option(
        "default",
        "on, off, or both one after the other, where the chat template has a switch for thinking text;"
        " default: as the template has it.",
    )

    def check(self) -> None:
        for name, value, least in (("--limit", self.limit, 1), ("--prompt-tokens", self.prompt_tokens, 2)):
            if value < least:
                raise SamplingError(f"{name} is {value}, but must be {least} or more.")
        if self.thinking not in THINKING:
            raise SamplingError(f"--thinking is {self.thinking!r}, but must be on, off or both.")


@group(DRAFTING)
class DraftingOptions:
    """How rounds draft."""

    draft_tokens: int = option(4, "Drafts a round (K).", "-k")
    verification: str = option("exact", options.VERIFICATION)


@group(SAMPLING)
class SamplingOptions:
    """How tokens are chosen, and when they end."""

    temperature: list[float] | None = option(None, "0 is greedy; may be repeated. Default: 0 and 1.", "-t")
    top_k: int | None = option(
        None, "Keep the k likeliest tokens; 0: all. Default: the checkpoint's own for conversations, else all."
    )
    top_p: float | None = option(
        None,
        "Keep the likeliest tokens up to this mass; 1: all. Default: the checkpoint's own for conversations, else all.",
    )
    seed: int = option(0, "Prompt i is sampled with seed + i.")
    max_tokens: int = option(128, "At most so many tokens for each prompt.", "-n")
    ignore_eos: bool | None = option(
        None,
        "Whether to go on after the checkpoint's end-of-sequence tokens. Default: stop in conversations only.",
        "--ignore-eos/--stop-at-eos",
        show_default=False,
    )

    def params(self, pair: Pair, examples: Sequence[Example]) -> SamplingParams:
        """What all settings share; conversations are sampled, and end, as the checkpoint says."""
        conversations = any(example.kind != "text" for example in examples)
        if conversations and not all(example.kind != "text" for example in examples):
            text = next(example.origin for example in examples if example.kind == "text")
            raise DataError(
                f"{text} is text among prompts or messages, which are sampled differently; measure them apart."
            )
        ignore_eos = not conversations if self.ignore_eos is None else self.ignore_eos
        own = {**vars(self), "temperature": None, "ignore_eos": ignore_eos}
        return sampling_params(pair.generation.conversation() if conversations else {}, **own)


@group(OUTPUT)
class OutputOptions:
    """What is measured beside acceptance, and how all is shown."""

    speed: bool = option(False, "Measure the speed-up too: every prompt plainly and drafted, in turn.")
    plot: Path | None = option(None, "Draw acceptance and histograms to this file, .png, .svg or .pdf.")
    as_json: bool = option(False, options.JSON, "--json")


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
    say: Callable[[str], object]

    def under(self, setting: Setting) -> shown.Measured:
        self.say(setting.label)
        variables = thinking_given(self.pair, setting.thinking)
        prompts = prompts_of(self.pair, self.examples, self.prompt_tokens, **variables)
        draft_tokens, verification = self.drafting.draft_tokens, cast(Verification, self.drafting.verification)

        def report(side: Pair, name: str) -> AcceptanceReport:
            done = itertools.count(1)
            return measure_acceptance(
                side, prompts, draft_tokens, setting.params, verification,
                lambda _: self.say(f"{setting.label}{name}: {next(done)} prompts of {len(prompts)}"),
            )  # fmt: skip

        own = report(self.pair, "")
        comparison = None if self.other is None else compare(report(self.other, ", the other drafter"), own)
        speedup = None
        self.say(f"{setting.label}: speed")
        if self.speed:
            speedup = measure_speedup(self.pair, prompts, draft_tokens, setting.params, verification)
        return shown.Measured(
            setting.label, setting.thinking, own, self.costs(setting.params.choice), speedup, comparison
        )


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
    """Measure how many drafts a pair accepts on your data: by position, by task or file, by temperature.

    Decodes in the engine, and predicts from measured costs how many drafts a round pay on this machine.
    """
    chosen.check()
    options.use_threads(models.threads)
    check_plot(output.plot)
    sources = options.sources_of(chosen.data)
    with progress("reading") as say:
        examples = chosen.examples(sources)
        say("loading")
        pair = options.named(models.load(models.drafter))
        if pair.drafter is None:
            raise PromptError("acceptance needs a drafter; give --drafter, or no --target for the bundled pair.")
        other = None if models.against is None else models.load(models.against)
        base = sampling.params(pair, examples)
        settings = [
            Setting(replace(base, temperature=t), on)
            for on, t in itertools.product(THINKING[chosen.thinking], sampling.temperature or TEMPERATURES)
        ]
        costs = functools.cache(functools.partial(steady_costs, pair))  # first asked for after prompts were decoded
        what = Measurement(pair, other, examples, chosen.prompt_tokens, drafting, output.speed, costs, say)
        measured = [what.under(setting) for setting in settings]
    if output.plot is not None:
        plot_acceptance({m.label: m.report for m in measured}, output.plot, {m.label: m.predictions for m in measured})
    if output.as_json:
        print(json.dumps({"data": [str(path) for path in sources], **shown.to_json(measured)}))
    else:
        shown.print_report(console(), measured)
