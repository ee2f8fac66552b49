"""Options of `gemma-mtp plan`."""

from __future__ import annotations

from pathlib import Path

from gemma_mtp.cli import options
from gemma_mtp.cli.option_groups import argument, group, option
from gemma_mtp.cli.options import MODELS, OUTPUT
from gemma_mtp.measure.figure import check_plot

LOAD, MACHINE = "Load", "Machine"


@group(MODELS)
class PlannedPair:
    """What is to be loaded, and how."""

    model: str = argument(
        "gemma-4-E2B-it",
        "A known name such as gemma-4-31B-it, a directory, a config.json, bundled, or a name on the Hugging Face hub.",
    )
    drafter: str | None = option(None, "The drafter, likewise; default: the model's own, found by its name.")
    no_drafter: bool = option(False, "Plan without a drafter.")
    quantize: str | None = option(
        None,
        "int8, int4, q8_0, or parts, such as target=int4,drafter=int8; default: as stored, and int8 and int4 beside"
        " it.",
    )
    dtype: str = option("auto", "auto, bfloat16, float16 or float32: of weights that are not quantised.")
    kv_type: str = option("auto", "auto, float32, bfloat16 or float16: of keys and values; auto is what would run.")


@group(LOAD)
class LoadOptions:
    """How it is to be used."""

    sequences: int = option(1, "Sequences that decode together.", "-n")
    context: int | None = option(None, "Tokens of each, prompt and output; default: 8192, or the model's most.", "-c")
    draft_tokens: int = option(4, "Drafts a round (K).", "-k")
    acceptance: float = option(0.8, "Chance that a draft is accepted where those before it were; measure it with"
                               " `gemma-mtp acceptance`.", "-a")  # fmt: skip


@group(MACHINE)
class MachineOptions:
    """What it is to run on."""

    device: str = option("cpu", "cpu or cuda: what is counted, and whose memory is looked up.")
    memory: str | None = option(None, "Such as 24GB or 24GiB; default: this machine's, or its GPU's.")
    bandwidth: str | None = option(None, "Bytes of memory read a second, such as 300GB; default: measured, on a CPU.")


@group(OUTPUT)
class OutputOptions:
    """How it is shown."""

    plot: Path | None = option(None, "Draw memory against context to this file, .png, .svg or .pdf.")
    as_json: bool = option(False, options.JSON, "--json")

    def check(self) -> None:
        check_plot(self.plot)
