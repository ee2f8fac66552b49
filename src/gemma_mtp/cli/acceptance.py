"""`gemma-mtp acceptance`."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from gemma_mtp.cli import acceptance_report as shown
from gemma_mtp.cli import options
from gemma_mtp.cli.console import console
from gemma_mtp.cli.options import DATA, DRAFTING, OUTPUT, SAMPLING, option
from gemma_mtp.cli.progress import progress
from gemma_mtp.datasets import Example, read_examples
from gemma_mtp.decoding.round_costs import RoundCosts
from gemma_mtp.decoding.sampling import ChoiceKind, SamplingParams
from gemma_mtp.engine.loaded import sampling_params
from gemma_mtp.engine.pair import Pair, bundled_directory, load_pair
from gemma_mtp.errors import DataError, PromptError, SamplingError, TokenizerError
from gemma_mtp.measure.acceptance import PROMPT_TOKENS, compare, measure_acceptance, prompts_of
from gemma_mtp.measure.plot import check_plot, plot_acceptance
from gemma_mtp.measure.speedup import measure_speedup, steady_costs
from gemma_mtp.tokenizer import Tokenizer

#: names that chat templates give to the switch for thinking text, Gemma's first
THINKING_VARIABLES = ("enable_thinking", "thinking")
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


def acceptance(
    data: Annotated[
        list[Path] | None,
        typer.Argument(
            help="JSON lines with text, prompt or messages (and, optionally, task), plain text, source files, or"
            " directories of them; default: the bundled pair's held-out Python.",
        ),
    ] = None,
    target: options.Target = None,
    drafter: options.Drafter = None,
    against: Annotated[
        Path | None,
        option(
            "--against",
            help="Another drafter's directory, measured on the same prompts: the difference, with its 95% interval.",
            panel=options.MODELS,
        ),
    ] = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    quantize: options.Quantize = None,
    strict: options.Strict = False,
    threads: options.Threads = None,
    pattern: Annotated[
        str, option("--pattern", help="Which files of a directory to read, such as '*.py'.", panel=DATA)
    ] = "*",
    limit: Annotated[
        int, option("--limit", help="At most so many prompts, spread evenly over the data.", panel=DATA)
    ] = 100,
    prompt_tokens: Annotated[
        int,
        option(
            "--prompt-tokens",
            help="Texts and source files are cut to their first lines of so many tokens; prompts and messages are"
            " taken whole.",
            panel=DATA,
        ),
    ] = PROMPT_TOKENS,
    thinking: Annotated[
        str,
        option(
            "--thinking",
            help="on, off, or both one after the other, where the chat template has a switch for thinking text;"
            " default: as the template has it.",
            panel=DATA,
        ),
    ] = "default",
    draft_tokens: Annotated[int, option("--draft-tokens", "-k", help="Drafts a round (K).", panel=DRAFTING)] = 4,
    verification: options.Verify = "exact",
    temperature: Annotated[
        list[float] | None,
        option("--temperature", "-t", help="0 is greedy; may be repeated. Default: 0 and 1.", panel=SAMPLING),
    ] = None,
    top_k: Annotated[
        int | None,
        option(
            "--top-k",
            help="Keep the k likeliest tokens; 0: all. Default: the checkpoint's own for conversations, else all.",
            panel=SAMPLING,
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        option(
            "--top-p",
            help="Keep the likeliest tokens up to this mass; 1: all. Default: the checkpoint's own for conversations,"
            " else all.",
            panel=SAMPLING,
        ),
    ] = None,
    seed: Annotated[int, option("--seed", help="Prompt i is sampled with seed + i.", panel=SAMPLING)] = 0,
    max_tokens: Annotated[
        int, option("--max-tokens", "-n", help="At most so many tokens for each prompt.", panel=SAMPLING)
    ] = 128,
    ignore_eos: Annotated[
        bool | None,
        typer.Option(
            "--ignore-eos/--stop-at-eos",
            help="Whether to go on after the checkpoint's end-of-sequence tokens. Default: stop in conversations only.",
            rich_help_panel=SAMPLING,
            show_default=False,
        ),
    ] = None,
    speed: Annotated[
        bool,
        option("--speed", help="Measure the speed-up too: every prompt plainly and drafted, in turn.", panel=OUTPUT),
    ] = False,
    plot: Annotated[
        Path | None,
        option("--plot", help="Draw acceptance and histograms to this file, .png, .svg or .pdf.", panel=OUTPUT),
    ] = None,
    as_json: Annotated[bool, option("--json", help="Print one JSON object.", panel=OUTPUT)] = False,
) -> None:
    """Measure how many drafts a pair accepts on your data: by position, by task or file, by temperature.

    Decodes in the engine, and predicts from measured costs how many drafts a round pay on this machine.
    """
    _check(limit, prompt_tokens, thinking)
    options.use_threads(threads)
    check_plot(plot)
    if target is not None and drafter is None:
        raise PromptError("acceptance needs a drafter; give --drafter, or no --target for the bundled pair.")
    sources = data or [bundled_directory() / "heldout_prompts.jsonl"]
    with progress("reading") as say:
        examples = spread(sources, pattern, limit)
        say("loading")
        load = functools.partial(load_pair, target, dtype=dtype, device=device, quantize=quantize, strict=strict)
        pair, other = load(drafter), None if against is None else load(against)
        base = _params(pair, examples, top_k, top_p, seed, max_tokens, ignore_eos)
        settings = [
            Setting(replace(base, temperature=t), on)
            for on, t in itertools.product(THINKING[thinking], temperature or TEMPERATURES)
        ]
        costs = functools.cache(functools.partial(steady_costs, pair))  # first asked for after prompts were decoded
        measured = []
        for setting in settings:
            say(setting.label)
            measured.append(
                _measure(pair, other, examples, setting, draft_tokens, verification, prompt_tokens, costs, speed, say)
            )
    if plot is not None:
        plot_acceptance({m.label: m.report for m in measured}, plot, {m.label: m.predictions for m in measured})
    if as_json:
        print(json.dumps({"data": [str(path) for path in sources], **shown.to_json(measured)}))
    else:
        shown.print_report(console(), measured)


def spread(sources: Sequence[Path], pattern: str, limit: int) -> list[Example]:
    """At most `limit` examples, evenly spread. Reads twice instead of holding everything in memory."""
    count = sum(1 for _ in read_examples(sources, pattern))
    chosen = {i * count // limit for i in range(limit)} if count > limit else range(count)
    return [example for i, example in enumerate(read_examples(sources, pattern)) if i in chosen]


def _check(limit: int, prompt_tokens: int, thinking: str) -> None:
    for name, value, least in (("--limit", limit, 1), ("--prompt-tokens", prompt_tokens, 2)):
        if value < least:
            raise SamplingError(f"{name} is {value}, but must be {least} or more.")
    if thinking not in THINKING:
        raise SamplingError(f"--thinking is {thinking!r}, but must be on, off or both.")


def _params(
    pair: Pair,
    examples: Sequence[Example],
    top_k: int | None,
    top_p: float | None,
    seed: int,
    max_tokens: int,
    ignore_eos: bool | None,
) -> SamplingParams:
    """What all settings share; conversations are sampled as the checkpoint says, and end where the model ends them."""
    conversations = any(example.kind != "text" for example in examples)
    if conversations and not all(example.kind != "text" for example in examples):
        text = next(example.origin for example in examples if example.kind == "text")
        raise DataError(f"{text} is text among prompts or messages, which are sampled differently; measure them apart.")
    return sampling_params(
        pair.generation.conversation() if conversations else {},
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        max_tokens=max_tokens,
        ignore_eos=not conversations if ignore_eos is None else ignore_eos,
    )


def thinking_variable(tokenizer: Tokenizer | None) -> str:
    """The name of the chat template's switch for thinking text. Raises TokenizerError where it has none."""
    known = frozenset() if tokenizer is None else tokenizer.template_variables
    for name in THINKING_VARIABLES:
        if name in known:
            return name
    raise TokenizerError(
        f"--thinking needs a chat template that asks for {' or '.join(THINKING_VARIABLES)}, and the checkpoint's does"
        " not; leave it out."
    )


def _measure(
    pair: Pair,
    other: Pair | None,
    examples: Sequence[Example],
    setting: Setting,
    draft_tokens: int,
    verification: Any,
    prompt_tokens: int,
    costs: Callable[[ChoiceKind], RoundCosts],
    speed: bool,
    say: Any,
) -> shown.Measured:
    variables = {} if setting.thinking is None else {thinking_variable(pair.tokenizer): setting.thinking}
    prompts = prompts_of(pair, examples, prompt_tokens, **variables)
    done = itertools.count(1)

    def report(side: Pair, name: str) -> Any:
        return measure_acceptance(
            side, prompts, draft_tokens, setting.params, verification,
            lambda _: say(f"{setting.label}{name}: {next(done)} prompts of {len(prompts)}"),
        )  # fmt: skip

    own = report(pair, "")
    comparison = None
    if other is not None:
        done = itertools.count(1)
        comparison = compare(report(other, ", the other drafter"), own)
    say(f"{setting.label}: speed")
    measured = None
    if speed:
        measured = measure_speedup(pair, prompts, draft_tokens, setting.params, verification)
    return shown.Measured(setting.label, setting.thinking, own, costs(setting.params.choice), measured, comparison)
