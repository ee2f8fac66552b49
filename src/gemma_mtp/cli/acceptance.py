"""`gemma-mtp acceptance`."""

from __future__ import annotations

from gemma_mtp.cli import options
from gemma_mtp.cli.acceptance_options import (
    ComparedPair,
    DraftingOptions,
    OutputOptions,
    PromptOptions,
    SamplingOptions,
)
from gemma_mtp.cli.option_groups import grouped


@grouped
def acceptance(
    models: ComparedPair,
    chosen: PromptOptions,
    drafting: DraftingOptions,
    sampling: SamplingOptions,
    output: OutputOptions,
) -> None:
    """Measure how many drafts a pair accepts on your data: by position, by task or file, by temperature.

    Says, by costs that are measured, how many drafts a round pay on this machine.
    """
    chosen.check()
    output.check()
    options.check_drafter("acceptance", models.target, models.drafter)
    options.use_threads(models.threads)

    from gemma_mtp.cli import acceptance_run

    acceptance_run.acceptance(models, chosen, drafting, sampling, output)
