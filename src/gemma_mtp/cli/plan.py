"""`gemma-mtp plan`."""

from __future__ import annotations

from gemma_mtp.cli import options
from gemma_mtp.cli.option_groups import grouped, then
from gemma_mtp.cli.plan_options import LoadOptions, MachineOptions, OutputOptions, PlannedPair


@grouped
@then("plan_run")
def plan(models: PlannedPair, used: LoadOptions, machine: MachineOptions, output: OutputOptions) -> None:
    """Say how much memory a pair takes, what fits, and what drafting can gain. Downloads nothing.

    Counts what `serve` or `generate` takes once every sequence has all its tokens. The gain is what reading memory
    allows: the most that drafting can give.
    """
    options.check_exclusive(models.drafter, models.no_drafter)
