"""`gemma-mtp generate`."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from gemma_mtp.cli import options, render
from gemma_mtp.cli.console import console
from gemma_mtp.cli.options import DRAFTING, GRAMMAR, OUTPUT, SAMPLING, option
from gemma_mtp.cli.progress import progress
from gemma_mtp.decoding.draft_length import DraftTokens
from gemma_mtp.decoding.grammar import Grammar
from gemma_mtp.decoding.sampling import SamplingParams
from gemma_mtp.decoding.verify import Verification
from gemma_mtp.engine.loaded import sampling_params
from gemma_mtp.engine.pair import Pair, load_pair
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


def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="Text to complete; without it, --file or standard input.")
    ] = None,
    file: Annotated[Path | None, option("--file", "-f", help="Read the prompt from a file.", panel=INPUT)] = None,
    token_ids: Annotated[
        str | None, option("--token-ids", help='Prompt as token ids, such as "2 5 7".', panel=INPUT)
    ] = None,
    chat: Annotated[
        bool,
        option(
            "--chat",
            help="Send the prompt as a user's message through the checkpoint's chat template, with the"
            " checkpoint's own sampling defaults.",
            panel=INPUT,
        ),
    ] = False,
    system: Annotated[str | None, option("--system", help="System message, with --chat.", panel=INPUT)] = None,
    target: options.Target = None,
    drafter: options.Drafter = None,
    no_drafter: options.NoDrafter = False,
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    strict: options.Strict = False,
    device: options.Device = "auto",
    threads: options.Threads = None,
    draft_tokens: Annotated[
        str,
        option(
            "--draft-tokens",
            "-k",
            help="Drafts a round (K): auto is what pays most on this machine and text; 0 is plain decoding.",
            panel=DRAFTING,
        ),
    ] = "auto",
    verification: options.Verify = "exact",
    max_tokens: Annotated[
        int | None, option("--max-tokens", "-n", help="At most so many tokens; default: 128.", panel=SAMPLING)
    ] = None,
    temperature: Annotated[
        float | None, option("--temperature", "-t", help="0 is greedy, the default.", panel=SAMPLING)
    ] = None,
    top_k: Annotated[int | None, option("--top-k", help="Keep the k likeliest tokens; 0: all.", panel=SAMPLING)] = None,
    top_p: Annotated[
        float | None, option("--top-p", help="Keep the likeliest tokens up to this mass; 1: all.", panel=SAMPLING)
    ] = None,
    min_p: Annotated[
        float | None,
        option("--min-p", help="Drop tokens below this share of the likeliest one's chance; 0: none.", panel=SAMPLING),
    ] = None,
    repetition_penalty: Annotated[
        float | None, option("--repetition-penalty", help="Above 1: repeat less; 1: off.", panel=SAMPLING)
    ] = None,
    presence_penalty: Annotated[
        float, option("--presence-penalty", help="Taken off every token already in the output.", panel=SAMPLING)
    ] = 0.0,
    frequency_penalty: Annotated[
        float, option("--frequency-penalty", help="Taken off once for each earlier occurrence.", panel=SAMPLING)
    ] = 0.0,
    logit_bias: Annotated[
        list[str] | None,
        option(
            "--logit-bias", help="Add a bias to a token's logit; may be repeated.", metavar="ID:BIAS", panel=SAMPLING
        ),
    ] = None,
    seed: Annotated[int, option("--seed", help="The same seed gives the same text.", panel=SAMPLING)] = 0,
    stop: Annotated[
        list[str] | None, option("--stop", help="Stop before this text; may be repeated.", panel=SAMPLING)
    ] = None,
    stop_token_id: Annotated[
        list[int] | None, option("--stop-token-id", help="Stop after this token; may be repeated.", panel=SAMPLING)
    ] = None,
    ignore_eos: Annotated[
        bool, option("--ignore-eos", help="Go on after the checkpoint's end-of-sequence tokens.", panel=SAMPLING)
    ] = False,
    json_schema: Annotated[
        Path | None,
        option("--json-schema", help="Write JSON that the schema in this file accepts.", metavar="FILE", panel=GRAMMAR),
    ] = None,
    json_object: Annotated[bool, option("--json-object", help="Write a JSON object.", panel=GRAMMAR)] = False,
    regex: Annotated[
        str | None,
        option("--regex", help="Write text that this regular expression matches as a whole.", panel=GRAMMAR),
    ] = None,
    logprobs: Annotated[
        int | None,
        option("--logprobs", help="With --json: log-probabilities, and of so many alternatives.", panel=OUTPUT),
    ] = None,
    compare: Annotated[
        bool,
        option(
            "--compare",
            help="Run with and without the drafter, interleaved: speeds, ratio, and whether the outputs are identical.",
            panel=OUTPUT,
        ),
    ] = False,
    repeats: Annotated[int, option("--repeats", help="Runs of each side with --compare.", panel=OUTPUT)] = 3,
    show_drafts: Annotated[
        bool, option("--show-drafts", help="Colour accepted, corrected and bonus tokens.", panel=OUTPUT)
    ] = False,
    as_json: Annotated[bool, option("--json", help="Print one JSON object.", panel=OUTPUT)] = False,
    quiet: Annotated[bool, option("--quiet", "-q", help="No summary on standard error.", panel=OUTPUT)] = False,
) -> None:
    """Complete a prompt. Without --target, with the bundled pair, which completes Python source."""
    if repeats < 1:
        raise SamplingError(f"--repeats is {repeats}, but must be 1 or more.")
    options.use_threads(threads)
    given = _prompt(prompt, file, token_ids, chat)
    grammar = _grammar(json_schema, json_object, regex)
    if no_drafter and drafter is not None:
        raise PromptError("--drafter and --no-drafter exclude each other; give one of them.")
    if compare and (no_drafter or (target is not None and drafter is None)):
        raise PromptError("--compare needs a drafter; give --drafter, or no --target for the bundled pair.")
    with progress("loading"):
        pair = load_pair(
            target, drafter, dtype=dtype, device=device, use_drafter=not no_drafter, quantize=quantize, strict=strict
        )
    params = sampling_params(
        pair.generation.conversation() if chat else {},
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        logit_bias=_logit_bias(logit_bias or []),
        seed=seed,
        max_tokens=max_tokens,
        stop=stop,
        stop_token_ids=tuple(stop_token_id or ()),
        ignore_eos=ignore_eos,
        logprobs=logprobs,
        grammar=grammar,
    )
    prompt_ids = _chat_ids(pair, given, system) if chat else given
    run = Run(pair, prompt_ids, params, parse_draft_tokens(draft_tokens), verification)  # type: ignore[arg-type]  # checked by the engine
    if compare:
        _compare(run, repeats, as_json, show_drafts)
    elif as_json:
        with progress("generating"):
            print(json.dumps(render.to_json(run.once())))
    elif show_drafts or pair.tokenizer is None:
        _print_whole(run, show_drafts, quiet)
    else:
        _print_stream(run, quiet)


def _prompt(prompt: str | None, file: Path | None, token_ids: str | None, chat: bool) -> str | list[int]:
    """The prompt from the one place it was given."""
    given = [
        name for name, value in (("PROMPT", prompt), ("--file", file), ("--token-ids", token_ids)) if value is not None
    ]
    if len(given) > 1:
        raise PromptError(f"the prompt was given twice ({' and '.join(given)}); give it once.")
    if token_ids is not None:
        if chat:
            raise PromptError("--chat needs a text prompt, not --token-ids.")
        return _parse_token_ids(token_ids)
    if file is not None:
        return read_text(file, "prompt file", PromptError)
    if prompt is not None:
        return check_text(prompt, "the prompt", PromptError)
    if sys.stdin.isatty():
        raise PromptError("there is no prompt; give it as an argument, with --file, or on standard input.")
    return _standard_input()


def _standard_input() -> str:
    """All of it, without a byte order mark."""
    try:
        text = sys.stdin.read()
    except UnicodeDecodeError as error:
        raise PromptError(f"standard input is not {error.encoding} text; convert it.") from None
    return check_text(text.removeprefix("\ufeff"), "standard input", PromptError)


def _grammar(json_schema: Path | None, json_object: bool, regex: str | None) -> Grammar | None:
    """The grammar from the one option that was given, if any."""
    given = {"--json-schema": json_schema is not None, "--json-object": json_object, "--regex": regex is not None}
    names = [name for name, value in given.items() if value]
    if len(names) > 1:
        raise SamplingError(f"{' and '.join(names)} exclude each other; give one of them.")
    if json_schema is not None:
        return Grammar("json_schema", read_text(json_schema, "schema file", SamplingError))
    if regex is not None:
        return Grammar("regex", regex)
    return Grammar("json_object") if json_object else None


def parse_draft_tokens(text: str) -> DraftTokens:
    """What --draft-tokens says. Raises SamplingError."""
    if text == "auto":
        return "auto"
    try:
        return int(text)
    except ValueError:
        raise SamplingError(f"--draft-tokens is {text!r}, but must be auto or a whole number, such as 4.") from None


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


def _chat_ids(pair: Pair, prompt: str | list[int], system: str | None) -> list[int]:
    if pair.tokenizer is None:
        raise TokenizerError("--chat needs a tokenizer with a chat template, and the target's directory has none.")
    assert isinstance(prompt, str)
    messages = [{"role": "system", "content": check_text(system, "--system", PromptError)}] if system else []
    return pair.tokenizer.encode_chat([*messages, {"role": "user", "content": prompt}])


def _print_stream(run: Run, quiet: bool) -> None:
    stream = run.pair.stream(run.prompt, run.params, draft_tokens=run.draft_tokens, verification=run.verification)
    with progress("prefill"):
        piece = next(stream, "")
    print(piece, end="", flush=True)
    for piece in stream:
        print(piece, end="", flush=True)
    print()
    _print_summary(stream.result, quiet)


def _print_whole(run: Run, show_drafts: bool, quiet: bool) -> None:
    with progress("generating"):
        result = run.once()
    if show_drafts:
        render.print_drafts(console(), result, run.pair.tokenizer)
    else:
        print(" ".join(map(str, result.token_ids)))
    _print_summary(result, quiet)


def _print_summary(result: GenerationResult, quiet: bool) -> None:
    if not quiet:
        print(render.summary(result), file=sys.stderr)


def _compare(run: Run, repeats: int, as_json: bool, show_drafts: bool) -> None:
    """Both sides once to warm up, then in turn. Exits with 1 if `exact` verification changed the output."""
    plain: list[GenerationResult] = []
    drafted: list[GenerationResult] = []
    with progress("comparing") as say:
        for k in (0, None):
            run.once(draft_tokens=k, max_tokens=16)
        for i in range(repeats):
            say(f"comparing: run {i + 1} of {repeats}")
            plain.append(run.once(draft_tokens=0))
            drafted.append(run.once())
    compared = render.comparison(plain, drafted)
    if as_json:
        sides = {"plain": render.to_json(plain[-1]), "drafted": render.to_json(drafted[-1])}
        print(json.dumps({**compared, **sides}))
    else:
        shown = console()
        if show_drafts:
            render.print_drafts(shown, drafted[-1], run.pair.tokenizer)
        else:
            text = drafted[-1].text
            print(" ".join(map(str, drafted[-1].token_ids)) if text is None else text)
        print()
        render.print_comparison(shown, plain, drafted)
    if run.verification == "exact" and not compared["identical"]:
        raise typer.Exit(1)
