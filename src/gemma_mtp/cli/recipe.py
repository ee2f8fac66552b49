"""`gemma-mtp recipe`."""

from __future__ import annotations

from gemma_mtp.cli.option_groups import grouped, then
from gemma_mtp.cli.recipe_options import RecipeDrafts, RecipeLoad, RecipeMachine, RecipeOptions, RecipeOutput


@grouped
@then("recipe_run")
def recipe(
    models: RecipeOptions, drafts: RecipeDrafts, used: RecipeLoad, machine: RecipeMachine, output: RecipeOutput
) -> None:
    """Print how another runtime decodes this pair on this hardware: commands, configuration, and what is lost.

    Runs and downloads nothing. The recipe says with which versions it was tried, and what is not known.
    """
    drafts.check()
    machine.check()
