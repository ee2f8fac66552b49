"""`gemma-mtp generate`: its options, and what can be wrong with them."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_mtp.cli import options
from gemma_mtp.cli.option_groups import argument, at_least, group, grouped, option, then
from gemma_mtp.cli.options import DRAFTING, GRAMMAR, OUTPUT, SAMPLING
from gemma_mtp.errors import OptionError, PromptError, SamplingError
from gemma_mtp.text import check_text, read_text

if TYPE_CHECKING:
    from gemma_mtp.decoding.grammar import Grammar
    from gemma_mtp.decoding.params import SamplingParams

INPUT = "Prompt"


@group(INPUT)
class PromptOptions:
    """Where the prompt comes from."""

    prompt: str | None = argument(None, "Text to complete; - is standard input. Default: --file, or standard input.")
    file: Path | None = option(None, "Read the prompt from a file.", "-f")
    token_ids: str | None = option(None, 'Prompt as token ids, such as "2 5 7".')
    chat: bool = option(
        False,
        "Send the prompt as a user's message, by the checkpoint's chat template and with its sampling defaults.",
    )
    system: str | None = option(None, "System message.", needs="--chat")
    thinking: bool = option(False, "Let the model think first; thoughts are dimmed.", needs="--chat")

    @functools.cached_property
    def given(self) -> str | list[int]:
        """The prompt from the one place it was given. Raises PromptError."""
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
            return argument_text(self.prompt, "the prompt")
        return standard_input()


@group(DRAFTING)
class DraftingOptions:
    """How decoding drafts."""

    draft_tokens: str = option(
        "auto", "Drafts a round (K): a number, or auto for what pays most here. 0 is plain decoding.", "-k"
    )
    verification: str = option("exact", options.VERIFICATION)


@group(SAMPLING)
class SamplingOptions:
    """How tokens are chosen, and when they end; the fields have SamplingParams' names."""

    max_tokens: int | None = option(
        None, "Most tokens of the output. Default: 128; in a chat, what the context holds.", "-n"
    )
    temperature: float | None = option(None, "0 is greedy, the default.", "-t")
    top_k: int | None = option(None, "Draw from the k likeliest tokens; 0: from all.")
    top_p: float | None = option(None, "Draw from the likeliest tokens up to this probability in all; 1: from all.")
    min_p: float | None = option(None, "Leave out tokens below this share of the likeliest one's probability; 0: none.")
    repetition_penalty: float | None = option(None, "Above 1, tokens repeat less; 1: off.")
    presence_penalty: float = option(0.0, "Subtracted from the logit of every token in the output so far.")
    frequency_penalty: float = option(0.0, "Subtracted once for each time that a token is in the output so far.")
    logit_bias: list[str] | None = option(None, "Add a bias to a token's logit. May be repeated.", metavar="ID:BIAS")
    seed: int = option(0, "The same seed gives the same text.")
    stop: list[str] | None = option(None, "End the output before this text. May be repeated.")
    stop_token_ids: list[int] | None = option(
        None, "End the output after this token. May be repeated.", "--stop-token-id"
    )
    ignore_eos: bool = option(False, "Go on after end-of-sequence tokens.")

    def params(self, defaults: Mapping[str, Any], **others: Any) -> SamplingParams:
        """What was given, over the checkpoint's defaults. Raises SamplingError."""
        from gemma_mtp.engine.loaded import sampling_params

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
        from gemma_mtp.decoding.grammar import Grammar

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

    logprobs: int | None = option(None, "Log-probabilities of each token and of so many alternatives.", needs="--json")
    compare: bool = option(
        False, "Run with and without the drafter, in turn: both speeds, and whether the outputs are identical."
    )
    repeats: int = option(3, "Runs of each side.", needs="--compare", check=at_least(1))
    show_drafts: bool = option(False, "Colour accepted, corrected and bonus tokens.")
    as_json: bool = option(False, options.JSON, "--json")
    quiet: bool = option(False, "No summary on standard error.", "-q")

    def check(self) -> None:
        if self.as_json and self.show_drafts:
            raise OptionError("--json and --show-drafts exclude each other; give one of them.")


def argument_text(text: str, name: str) -> str:
    """A text given as an argument, where - is standard input; standard error says where it is the name of a file that
    was perhaps meant. Raises PromptError."""
    if text == "-":
        return standard_input()
    check_text(text, name, PromptError)
    with contextlib.suppress(OSError):  # too long for a name
        if Path(text).is_file():
            print(f"{name} is the text {text!r} itself; to read that file, give --file {text}", file=sys.stderr)
    return text


def standard_input() -> str:
    """All of it, without a byte order mark. Raises PromptError where nobody writes to it."""
    if sys.stdin.isatty():
        raise PromptError("there is no prompt; give it as an argument, with --file, or on standard input.")
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


@grouped
@then("generate_run")
def generate(
    source: PromptOptions,
    models: options.PairOptions,
    drafting: DraftingOptions,
    sampling: SamplingOptions,
    constrained: GrammarOptions,
    output: OutputOptions,
) -> None:
    """Complete a prompt. The bundled pair, which is the default, completes Python source.

    Exits with 1 where --compare finds outputs that differ, and with 4 where the length limit cuts JSON or a match of
    --regex.
    """
    output.check()
    models.check()
    if output.compare and models.no_drafter:
        raise PromptError("--compare needs a drafter; leave --no-drafter out.")
    if output.compare:
        options.check_drafter("--compare", models.target, models.drafter)
    options.parse_draft_tokens(drafting.draft_tokens)
    _ = source.given  # or refused
    options.use_threads(models.threads)
