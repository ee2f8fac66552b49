"""`gemma-mtp plan`: its options, and what can be wrong with them."""

from __future__ import annotations

from pathlib import Path

from gemma_mtp.cli import options
from gemma_mtp.cli.option_groups import argument, group, grouped, option, then
from gemma_mtp.cli.options import MODELS, OUTPUT

LOAD, MACHINE = "Load", "Machine"


@group(MODELS)
class PlannedPair:
    """What is to be loaded, and how."""

    model: str = argument(
        "gemma-4-E2B-it",
        "An official name such as gemma-4-31B-it, a directory, a config.json, a name on the hub, or bundled.",
    )
    drafter: str | None = option(None, "The same for the drafter. Default: the model's own, found by its name.")
    no_drafter: bool = option(False, "Plan without a drafter.")
    quantize: str | None = option(
        None,
        "int8, int4 or q8_0, or by part, such as target=int4,drafter=int8. Default: as stored. int8 and int4 are shown"
        " beside it.",
    )
    dtype: str = option("auto", "Of weights that are not quantised: auto, bfloat16, float16 or float32.")
    kv_type: str = option("auto", "Of keys and values: auto, float32, bfloat16 or float16. auto is what would run.")


@group(LOAD)
class LoadOptions:
    """How it is to be used."""

    sequences: int = option(1, "Sequences that decode together.", "-n")
    context: int | None = option(None, "Tokens of each, prompt and output. Default: 8192, or the model's most.", "-c")
    draft_tokens: int = option(4, "Drafts a round (K).", "-k")
    acceptance: float = option(0.8, "Share of drafts that are accepted, where those before them were. `gemma-mtp"
                               " acceptance` measures it.", "-a")  # fmt: skip


@group(MACHINE)
class MachineOptions:
    """What it is to run on."""

    device: str = option("cpu", "cpu or cuda: where it is to run.")
    memory: str | None = option(None, "Such as 24GB or 24GiB. Default: this machine's, or its GPU's.")
    bandwidth: str | None = option(None, "Bytes of memory read a second, such as 300GB. Default: measured, on a CPU.")


@group(OUTPUT)
class OutputOptions:
    """How it is shown."""

    plot: Path | None = options.plot("memory against context")
    as_json: bool = option(False, options.JSON, "--json")


@grouped
@then("plan_run")
def plan(models: PlannedPair, used: LoadOptions, machine: MachineOptions, output: OutputOptions) -> None:
    """Say how much memory a pair takes, what fits, and what drafting can gain. Downloads nothing.

    Counts what `serve` or `generate` takes once every sequence has all its tokens. The gain is what reading memory
    allows: the most that drafting can give.
    """
    options.check_exclusive(models.drafter, models.no_drafter)
