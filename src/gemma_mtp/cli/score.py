"""`gemma-mtp score`."""

from __future__ import annotations

from gemma_mtp.cli import options
from gemma_mtp.cli.option_groups import group, grouped, option
from gemma_mtp.cli.options import OUTPUT
from gemma_mtp.cli.score_text import ScoredTarget, TextOptions


@group(OUTPUT)
class ScoreOutput:
    """What is printed."""

    top: int = option(0, "Report so many of the likeliest tokens in each place.", needs="--json")
    as_json: bool = option(False, options.JSON, "--json")


@grouped
def score(source: TextOptions, models: ScoredTarget, output: ScoreOutput) -> None:
    """Print how likely the target finds a text: each token's log-probability and rank, and the perplexity.

    Nothing is generated, and no drafter is used.
    """
    text, continuation = source.read()
    options.use_threads(models.threads)

    from gemma_mtp.cli import score_run

    score_run.score(text, continuation, models, output.top, output.as_json)
