"""`gemma-mtp doctor`: its options, and what can be wrong with them."""

from __future__ import annotations

from pathlib import Path

from gemma_mtp.cli import options
from gemma_mtp.cli.option_groups import group, grouped, option, then


@group(options.MODELS)
class ExaminedPair(options.PairOptions):
    """The pair that is looked at, if one is."""

    target: Path | None = option(
        None, "Look at this pair too: its target's directory, a name on the Hugging Face hub (see pull), or bundled."
    )
    drafter: Path | None = option(None, options.DRAFTER, needs="--target")
    adapter: Path | None = option(None, options.ADAPTER, needs="--target")
    no_drafter: bool = option(False, options.NO_DRAFTER, needs="--target")
    dtype: str = option("auto", options.DTYPE, needs="--target")
    quantize: str | None = option(None, options.QUANTIZE, needs="--target")
    strict: bool = option(False, options.STRICT, needs="--target")
    device: str = option("auto", options.DEVICE, needs="--target")


@group(options.DATA)
class DoctorData:
    """What a pair is measured on."""

    data: list[Path] | None = option(
        None,
        "Prompts, as for acceptance. May be repeated. Default: some questions, or the bundled held-out Python.",
        needs="--target",
    )


@grouped
@then("doctor_run")
def doctor(models: ExaminedPair, given: DoctorData, output: options.JsonOutput) -> None:
    """Find what is slow or wrong: in the machine, the installation and, with --target, a pair.

    Measures each cause of refused drafts by itself, and says what to do. Exits with 1 where something is wrong.
    """
    models.check()
    options.use_threads(models.threads)
