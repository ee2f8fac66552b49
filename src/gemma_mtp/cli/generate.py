"""`gemma-mtp generate`."""

from __future__ import annotations

from gemma_mtp.cli import options
from gemma_mtp.cli.generate_options import (
    DraftingOptions,
    GrammarOptions,
    OutputOptions,
    PromptOptions,
    SamplingOptions,
)
from gemma_mtp.cli.option_groups import grouped
from gemma_mtp.errors import PromptError


@grouped
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
    prompt = source.read()
    options.use_threads(models.threads)

    from gemma_mtp.cli import generate_run

    generate_run.generate(prompt, source, models, drafting, sampling, constrained, output)
