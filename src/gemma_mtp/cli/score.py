"""`gemma-mtp score`: its options, and what can be wrong with them."""

from __future__ import annotations

import functools
from pathlib import Path

from gemma_mtp.cli import options
from gemma_mtp.cli.generate import INPUT, argument_text, standard_input
from gemma_mtp.cli.option_groups import argument, group, grouped, option, then
from gemma_mtp.errors import PromptError
from gemma_mtp.text import check_text, read_text


@group(INPUT)
class TextOptions:
    """Where the text comes from."""

    text: str | None = argument(None, "Text to score; - is standard input. Default: --file, or standard input.")
    file: Path | None = option(None, "Read the text from a file.", "-f")
    continuation: str | None = option(None, "Score this text alone, as it follows the other one.")

    @functools.cached_property
    def given(self) -> str:
        """The text from the one place it was given. Raises PromptError."""
        if self.text is not None and self.file is not None:
            raise PromptError("the text was given twice (TEXT and --file); give it once.")
        if self.continuation is not None:
            check_text(self.continuation, "--continuation", PromptError)
        if self.file is not None:
            return read_text(self.file, "text file", PromptError)
        return standard_input() if self.text is None else argument_text(self.text, "the text")


@group(options.MODELS)
class ScoredTarget(options.Loading, options.TargetOption):
    """The target that scores; no drafter is loaded beside it."""


@group(options.OUTPUT)
class ScoreOutput:
    """What is printed."""

    top: int = option(0, "Report so many of the likeliest tokens in each place.", needs="--json")
    as_json: bool = option(False, options.JSON, "--json")


@grouped
@then("score_run")
def score(source: TextOptions, models: ScoredTarget, output: ScoreOutput) -> None:
    """Print how likely the target finds a text: each token's log-probability and rank, and the perplexity.

    Nothing is generated, and no drafter is used.
    """
    _ = source.given  # or refused
    options.use_threads(models.threads)
