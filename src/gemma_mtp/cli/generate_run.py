"""What `gemma-mtp generate` does: complete the prompt, and print it."""

from __future__ import annotations

import itertools
import json
import os
import sys
from dataclasses import dataclass, replace
from typing import cast

import typer
from rich.text import Text as Dimmed

from gemma_mtp.chat.marks import region_after
from gemma_mtp.chat.prompt import Conversation, chat_ids, thinking_variable
from gemma_mtp.chat.turn import Text, Thought
from gemma_mtp.cli import options, render
from gemma_mtp.cli.console import console
from gemma_mtp.cli.generate import (
    DraftingOptions,
    GrammarOptions,
    OutputOptions,
    PromptOptions,
    SamplingOptions,
)
from gemma_mtp.cli.progress import progress
from gemma_mtp.cpu_clock import CpuClock
from gemma_mtp.decoding.draft_length import DraftTokens
from gemma_mtp.decoding.grammar import Grammar
from gemma_mtp.decoding.params import SamplingParams
from gemma_mtp.decoding.turn_rules import TurnRules
from gemma_mtp.decoding.verify import Verification
from gemma_mtp.engine.costs import MOST_ELSEWHERE
from gemma_mtp.engine.pair import Pair
from gemma_mtp.engine.result import GenerationResult
from gemma_mtp.errors import PromptError, TokenizerError
from gemma_mtp.text import check_text
from gemma_mtp.tokenizer import Tokenizer

#: exit code where the limit cut an output that a grammar was to make whole
NOT_WHOLE = 4


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


def generate(
    source: PromptOptions,
    models: options.PairOptions,
    drafting: DraftingOptions,
    sampling: SamplingOptions,
    constrained: GrammarOptions,
    output: OutputOptions,
) -> None:
    """Load the pair, and complete the prompt that was given."""
    grammar = constrained.grammar()
    sampling.params({}, logprobs=output.logprobs, grammar=grammar)  # wrong values are told before minutes of loading
    with progress("loading"):
        pair = models.load()
    if output.compare and pair.drafter is None:
        raise options.no_drafter("--compare")
    defaults = pair.generation.conversation() if source.chat else {}
    params = sampling.params(defaults, logprobs=output.logprobs, grammar=grammar)
    prompt, draft_tokens = prompt_for(pair, source), options.parse_draft_tokens(drafting.draft_tokens)
    params = of_turn(pair, prompt, params, source)
    run = Run(pair, prompt, params, draft_tokens, cast(Verification, drafting.verification))  # checked by the engine
    if output.compare:
        result = _compare(run, output)
    elif output.as_json:
        with progress("generating"):
            result = run.once()
        print(json.dumps(render.to_json(result)))
    elif output.show_drafts or pair.tokenizer is None:
        result = _print_whole(run, output)
    elif params.apart:
        result = _print_turn(run, output.quiet)
    else:
        result = _print_stream(run, output.quiet)
    state = pair.grammar_state(params)
    if state is not None and result.finish_reason == "length" and not state.complete_after(result.token_ids):
        print(f"the output is not whole: {render.ENDS['length']} cut it; raise --max-tokens.", file=sys.stderr)
        raise typer.Exit(NOT_WHOLE)


def prompt_for(pair: Pair, source: PromptOptions) -> str | list[int]:
    """What the pair goes on from: the prompt given, through the chat template with --chat."""
    given = source.given
    if not source.chat:
        return given
    if pair.tokenizer is None:
        raise TokenizerError("--chat needs a tokenizer with a chat template, and the target's directory has none.")
    assert isinstance(given, str)
    system = check_text(source.system, "--system", PromptError) if source.system else None
    variables = _thinking(pair.tokenizer) if source.thinking else {}
    return chat_ids(Conversation.of_user(given, system, variables), pair.tokenizer)


def _thinking(tokenizer: Tokenizer) -> dict[str, bool]:
    """What the chat template is told, so that the model thinks."""
    switch = thinking_variable(tokenizer)
    if switch is None:
        raise TokenizerError("--thinking needs a chat template with a switch for it, and the target's has none.")
    return {switch: True}


def of_turn(pair: Pair, prompt: str | list[int], params: SamplingParams, source: PromptOptions) -> SamplingParams:
    """Parameters for a model's turn, of which thoughts are no text, and a grammar is of what follows them."""
    if not source.chat or pair.tokenizer is None or not pair.tokenizer.marks.ids:
        return params
    begin = region_after(pair.encode(prompt), pair.tokenizer.marks)
    grammar = params.grammar
    if isinstance(grammar, Grammar) and (source.thinking or begin != "text"):
        grammar = TurnRules(begin=begin, thinking=True, answer=grammar)
    return replace(params, grammar=grammar, apart=True)


def _print_turn(run: Run, quiet: bool) -> GenerationResult:
    """The text; thoughts dimmed where there are colours, else on standard error."""
    shown = console()
    coloured = shown.color_system is not None
    turn = run.pair.turn(run.prompt, run.params, draft_tokens=run.draft_tokens, verification=run.verification)
    with progress("prefill"):
        first = next(turn, None)
    thinking = False
    for event in turn if first is None else itertools.chain([first], turn):
        if thinking and not isinstance(event, Thought) and (coloured or not quiet):
            print(file=None if coloured else sys.stderr)
        thinking = isinstance(event, Thought)
        if isinstance(event, Thought) and coloured:
            shown.print(Dimmed(event.text, style="dim italic"), end="", soft_wrap=True)
        elif isinstance(event, Thought) and not quiet:
            print(event.text, end="", file=sys.stderr, flush=True)
        elif isinstance(event, Text):
            print(event.text, end="", flush=True)
    print()
    _print_summary(turn.result, quiet)
    return turn.result


def _print_stream(run: Run, quiet: bool) -> GenerationResult:
    stream = run.pair.stream(run.prompt, run.params, draft_tokens=run.draft_tokens, verification=run.verification)
    with progress("prefill"):
        piece = next(stream, "")
    if not quiet:
        render.print_prompt(console(), run.prompt)
    print(piece, end="", flush=True)
    for piece in stream:
        print(piece, end="", flush=True)
    print()
    _print_summary(stream.result, quiet)
    return stream.result


def _print_whole(run: Run, output: OutputOptions) -> GenerationResult:
    with progress("generating"):
        result = run.once()
    if output.show_drafts:
        render.print_prompt(console(), run.prompt)
        render.print_drafts(console(), result, run.pair.tokenizer)
    else:
        print(" ".join(map(str, result.token_ids)))
    _print_summary(result, output.quiet)
    return result


def _print_summary(result: GenerationResult, quiet: bool) -> None:
    if not quiet:
        print(render.summary(result), file=sys.stderr)


def _compare(run: Run, output: OutputOptions) -> GenerationResult:
    """Both sides once to warm up, then in turn. Exits with 1 if `exact` verification changed the output."""
    plain: list[GenerationResult] = []
    drafted: list[GenerationResult] = []
    with progress("comparing") as say:
        for k in (0, None):
            run.once(draft_tokens=k, max_tokens=16)
        clock = CpuClock([os.getpid()])
        for i in range(output.repeats):
            say(f"comparing: run {i + 1} of {output.repeats}")
            plain.append(run.once(draft_tokens=0))
            drafted.append(run.once())
    busy = clock.share_elsewhere()
    compared = {**render.comparison(plain, drafted), "share_elsewhere": busy}
    if output.as_json:
        sides = {"plain": render.to_json(plain[-1]), "drafted": render.to_json(drafted[-1])}
        print(json.dumps({**compared, **sides}))
    else:
        shown = console()
        render.print_prompt(shown, run.prompt)
        if output.show_drafts:
            render.print_drafts(shown, drafted[-1], run.pair.tokenizer)
        else:
            text = drafted[-1].text
            print(" ".join(map(str, drafted[-1].token_ids)) if text is None else text)
        print()
        render.print_comparison(shown, plain, drafted)
        if busy is not None and busy > MOST_ELSEWHERE:
            shown.print(
                f"other work took {busy:.0%} of the processor meanwhile: these speeds say little; compare on a quiet"
                " machine",
                soft_wrap=True,
            )
    if run.verification == "exact" and not compared["identical"]:
        raise typer.Exit(1)
    return drafted[-1]
