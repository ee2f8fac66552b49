"""`gemma-mtp generate`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import typer

from gemma_mtp.chat.conversation import Conversation
from gemma_mtp.chat.prompt import chat_ids
from gemma_mtp.cli import options, render
from gemma_mtp.cli.console import console
from gemma_mtp.cli.option_groups import argument, group, option
from gemma_mtp.cli.options import DRAFTING, GRAMMAR, OUTPUT, SAMPLING
from gemma_mtp.cli.progress import progress
from gemma_mtp.decoding.draft_length import DraftTokens
from gemma_mtp.decoding.grammar import Grammar
from gemma_mtp.decoding.sampling import SamplingParams
from gemma_mtp.decoding.verify import Verification
from gemma_mtp.engine.loaded import sampling_params
from gemma_mtp.engine.pair import Pair
from gemma_mtp.engine.result import GenerationResult
from gemma_mtp.errors import PromptError, SamplingError, TokenizerError
from gemma_mtp.text import check_text, read_text

INPUT = "Prompt"


@dataclass(frozen=True)
class Run:
    """What to generate with which pair: everything but how to print it."""

    pair: Pair
    prompt: str | list[int]
    params: SamplingParams
    draft_tokens: DraftTokens
    verification: Verification

    def once(self, draft_tokens: DraftTokens | None = None, max_tokens: int | None = None) -> GenerationResult:
        params = self.params
        if max_tokens is not None:
            params = replace(params, max_tokens=min(max_tokens, params.max_tokens))
        k = self.draft_tokens if draft_tokens is None else draft_tokens
        return self.pair.generate(self.prompt, params, draft_tokens=k, verification=self.verification)


@group(INPUT)
class PromptOptions:
    """Where the prompt comes from."""

    prompt: str | None = argument(None, "Text to complete; without it, --file or standard input.")
    file: Path | None = option(None, "Read the prompt from a file.", "-f")
    token_ids: str | None = option(None, 'Prompt as token ids, such as "2 5 7".')
    chat: bool = option(
        False,
        "Send the prompt as a user's message through the checkpoint's chat template, with the"
        " checkpoint's own sampling defaults.",
    )
    system: str | None = option(None, "System message, with --chat.")

    def read(self) -> str | list[int]:
        """The prompt from the one place it was given."""
        places = {"PROMPT": self.prompt, "--file": self.file, "--token-ids": self.token_ids}
        given = [name for name, value in places.items() if value is not None]
        if len(given) > 1:
            raise PromptError(f"the prompt was given twice ({' and '.join(given)}); give it once.")
        if self.token_ids is not None:
            if self.chat:
                raise PromptError("--chat needs a text prompt, not --token-ids.")
            return _parse_token_ids(self.token_ids)
        if self.file is not None:
            return read_text(self.file, "prompt file", PromptError)
        if self.prompt is not None:
            return check_text(self.prompt, "the prompt", PromptError)
        if sys.stdin.isatty():
            raise PromptError("there is no prompt; give it as an argument, with --file, or on standard input.")
        return _standard_input()

    def for_pair(self, prompt: str | list[int], pair: Pair) -> str | list[int]:
        """What the pair goes on from: the prompt read, through the chat template with --chat."""
        if not self.chat:
            return prompt
        if pair.tokenizer is None:
            raise TokenizerError("--chat needs a tokenizer with a chat template, and the target's directory has none.")
        assert isinstance(prompt, str)
        system = check_text(self.system, "--system", PromptError) if self.system else None
        return chat_ids(Conversation.of_user(prompt, system), pair.tokenizer)


@group(DRAFTING)
class DraftingOptions:
    """How decoding drafts."""

    draft_tokens: str = option(
        "auto", "Drafts a round (K): auto is what pays most on this machine and text; 0 is plain decoding.", "-k"
    )
    verification: str = option("exact", options.VERIFICATION)


@group(SAMPLING)
class SamplingOptions:
    """How tokens are chosen, and when they end; the fields have SamplingParams' names."""

    max_tokens: int | None = option(None, "At most so many tokens; default: 128.", "-n")
    temperature: float | None = option(None, "0 is greedy, the default.", "-t")
    top_k: int | None = option(None, "Keep the k likeliest tokens; 0: all.")
    top_p: float | None = option(None, "Keep the likeliest tokens up to this mass; 1: all.")
    min_p: float | None = option(None, "Drop tokens below this share of the likeliest one's chance; 0: none.")
    repetition_penalty: float | None = option(None, "Above 1: repeat less; 1: off.")
    presence_penalty: float = option(0.0, "Taken off every token already in the output.")
    frequency_penalty: float = option(0.0, "Taken off once for each earlier occurrence.")
    logit_bias: list[str] | None = option(None, "Add a bias to a token's logit; may be repeated.", metavar="ID:BIAS")
    seed: int = option(0, "The same seed gives the same text.")
    stop: list[str] | None = option(None, "Stop before this text; may be repeated.")
    stop_token_ids: list[int] | None = option(None, "Stop after this token; may be repeated.", "--stop-token-id")
    ignore_eos: bool = option(False, "Go on after the checkpoint's end-of-sequence tokens.")

    def params(self, defaults: Mapping[str, Any], **others: Any) -> SamplingParams:
        """What was given, over the checkpoint's defaults. Raises SamplingError."""
        biases, stops = _logit_bias(self.logit_bias or []), tuple(self.stop_token_ids or ())
        own = {**vars(self), "logit_bias": biases, "stop_token_ids": stops}
        return sampling_params(defaults, **own, **others)


@group(GRAMMAR)
class GrammarOptions:
    """What the output must be."""

    json_schema: Path | None = option(None, "Write JSON that the schema in this file accepts.", metavar="FILE")
    json_object: bool = option(False, "Write a JSON object.")
    regex: str | None = option(None, "Write text that this regular expression matches as a whole.")

    def grammar(self) -> Grammar | None:
        """The grammar from the one option that was given, if any."""
        given = {"--json-schema": self.json_schema, "--json-object": self.json_object or None, "--regex": self.regex}
        names = [name for name, value in given.items() if value is not None]
        if len(names) > 1:
            raise SamplingError(f"{' and '.join(names)} exclude each other; give one of them.")
        if self.json_schema is not None:
            return Grammar("json_schema", read_text(self.json_schema, "schema file", SamplingError))
        if self.regex is not None:
            return Grammar("regex", self.regex)
        return Grammar("json_object") if self.json_object else None


@group(OUTPUT)
class OutputOptions:
    """What is printed, and how."""

    logprobs: int | None = option(None, "With --json: log-probabilities, and of so many alternatives.")
    compare: bool = option(
        False, "Run with and without the drafter, interleaved: speeds, ratio, and whether the outputs are identical."
    )
    repeats: int = option(3, "Runs of each side with --compare.")
    show_drafts: bool = option(False, "Colour accepted, corrected and bonus tokens.")
    as_json: bool = option(False, options.JSON, "--json")
    quiet: bool = option(False, "No summary on standard error.", "-q")


def generate(
    source: PromptOptions,
    models: options.PairOptions,
    drafting: DraftingOptions,
    sampling: SamplingOptions,
    constrained: GrammarOptions,
    output: OutputOptions,
) -> None:
    """Complete a prompt. Without --target, with the bundled pair, which completes Python source."""
    if output.repeats < 1:
        raise SamplingError(f"--repeats is {output.repeats}, but must be 1 or more.")
    options.use_threads(models.threads)
    given = source.read()
    grammar = constrained.grammar()
    models.check()
    if output.compare and models.no_drafter:
        raise PromptError("--compare needs a drafter; leave --no-drafter out.")
    with progress("loading"):
        pair = models.load()
    if output.compare and pair.drafter is None:
        raise PromptError("--compare needs a drafter; give --drafter, or no --target for the bundled pair.")
    defaults = pair.generation.conversation() if source.chat else {}
    params = sampling.params(defaults, logprobs=output.logprobs, grammar=grammar)
    draft_tokens = options.parse_draft_tokens(drafting.draft_tokens)
    run = Run(pair, source.for_pair(given, pair), params, draft_tokens, drafting.verification)  # type: ignore[arg-type]  # checked by the engine
    if output.compare:
        _compare(run, output)
    elif output.as_json:
        with progress("generating"):
            print(json.dumps(render.to_json(run.once())))
    elif output.show_drafts or pair.tokenizer is None:
        _print_whole(run, output)
    else:
        _print_stream(run, output.quiet)


def _standard_input() -> str:
    """All of it, without a byte order mark."""
    try:
        text = sys.stdin.read()
    except UnicodeDecodeError as error:
        raise PromptError(f"standard input is not {error.encoding} text; convert it.") from None
    return check_text(text.removeprefix("\ufeff"), "standard input", PromptError)


def _parse_token_ids(text: str) -> list[int]:
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise PromptError(f'--token-ids is {text!r}, but must be whole numbers, such as "2 5 7".') from None


def _logit_bias(entries: list[str]) -> dict[int, float]:
    biases = {}
    for entry in entries:
        token_id, _, bias = entry.partition(":")
        try:
            biases[int(token_id)] = float(bias)
        except ValueError:
            raise SamplingError(
                f"--logit-bias is {entry!r}, but must be ID:BIAS, such as 42:-1.5 or 42:-inf."
            ) from None
    return biases


def _print_stream(run: Run, quiet: bool) -> None:
    stream = run.pair.stream(run.prompt, run.params, draft_tokens=run.draft_tokens, verification=run.verification)
    with progress("prefill"):
        piece = next(stream, "")
    print(piece, end="", flush=True)
    for piece in stream:
        print(piece, end="", flush=True)
    print()
    _print_summary(stream.result, quiet)


def _print_whole(run: Run, output: OutputOptions) -> None:
    with progress("generating"):
        result = run.once()
    if output.show_drafts:
        render.print_drafts(console(), result, run.pair.tokenizer)
    else:
        print(" ".join(map(str, result.token_ids)))
    _print_summary(result, output.quiet)


def _print_summary(result: GenerationResult, quiet: bool) -> None:
    if not quiet:
        print(render.summary(result), file=sys.stderr)


def _compare(run: Run, output: OutputOptions) -> None:
    """Both sides once to warm up, then in turn. Exits with 1 if `exact` verification changed the output."""
    plain: list[GenerationResult] = []
    drafted: list[GenerationResult] = []
    with progress("comparing") as say:
        for k in (0, None):
            run.once(draft_tokens=k, max_tokens=16)
        for i in range(output.repeats):
            say(f"comparing: run {i + 1} of {output.repeats}")
            plain.append(run.once(draft_tokens=0))
            drafted.append(run.once())
    compared = render.comparison(plain, drafted)
    if output.as_json:
        sides = {"plain": render.to_json(plain[-1]), "drafted": render.to_json(drafted[-1])}
        print(json.dumps({**compared, **sides}))
    else:
        shown = console()
        if output.show_drafts:
            render.print_drafts(shown, drafted[-1], run.pair.tokenizer)
        else:
            text = drafted[-1].text
            print(" ".join(map(str, drafted[-1].token_ids)) if text is None else text)
        print()
        render.print_comparison(shown, plain, drafted)
    if run.verification == "exact" and not compared["identical"]:
        raise typer.Exit(1)
