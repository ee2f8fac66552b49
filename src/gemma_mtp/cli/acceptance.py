"""`gemma-mtp acceptance`: its options, and what can be wrong with them."""

from __future__ import annotations

from pathlib import Path

from gemma_mtp.cli import options
from gemma_mtp.cli.option_groups import argument, at_least, group, grouped, option, then
from gemma_mtp.cli.options import DATA, DRAFTING, MODELS, OUTPUT, SAMPLING
from gemma_mtp.errors import SamplingError
from gemma_mtp.measure.defaults import PROMPT_TOKENS

THINKING = {"default": (None,), "on": (True,), "off": (False,), "both": (False, True)}


@group(MODELS)
class ComparedPair(options.Loading, options.TargetAndDrafter):
    """The pair to measure, and another drafter for its target."""

    against: Path | None = option(
        None, "Another drafter to compare with, on the same prompts: the difference, with its 95% interval."
    )

    @property
    def name(self) -> str:
        """What the pair is called in pictures."""
        if self.target is None:
            return "bundled pair" if self.drafter is None else f"bundled target + {self.drafter.resolve().name}"
        return " + ".join(path.resolve().name for path in (self.target, self.drafter) if path is not None)


@group(DATA)
class PromptOptions(options.ExampleOptions):
    """Which examples are taken, and how prompts are made of them."""

    data: list[Path] | None = argument(
        None,
        "JSON lines with text, prompt or messages (and, optionally, task), plain text, source files, or"
        " directories of them. Default: the bundled pair's held-out Python.",
    )
    prompt_tokens: int = option(
        PROMPT_TOKENS,
        "Texts and source files are cut to their first lines, of so many tokens. Prompts and messages are taken whole.",
        check=at_least(2),
    )
    thinking: str = option(
        "default",
        "on, off, or both, one after the other, where the chat template has a switch for it. Default: as the template"
        " has it.",
    )

    def check(self) -> None:
        if self.thinking not in THINKING:
            raise SamplingError(f"--thinking is {self.thinking!r}, but must be on, off or both.")


@group(DRAFTING)
class DraftingOptions:
    """How rounds draft."""

    draft_tokens: int = option(4, "Drafts a round (K).", "-k")
    verification: str = option("exact", options.VERIFICATION)


@group(SAMPLING)
class SamplingOptions:
    """How tokens are chosen, and when they end."""

    temperature: list[float] | None = option(None, "0 is greedy. May be repeated. Default: 0 and 1.", "-t")
    top_k: int | None = option(
        None, "Draw from the k likeliest tokens; 0: from all. Default: for conversations the checkpoint's, else all."
    )
    top_p: float | None = option(
        None,
        "Draw from the likeliest tokens up to this probability in all; 1: from all. Default: as for --top-k.",
    )
    seed: int = option(0, "Prompt i is sampled with seed + i.")
    max_tokens: int = option(128, "Most tokens of each output.", "-n")
    ignore_eos: bool | None = option(
        None,
        "Whether to go on after end-of-sequence tokens. Default: stop in conversations only.",
        "--ignore-eos/--stop-at-eos",
        show_default=False,
    )


@group(OUTPUT)
class OutputOptions:
    """What is measured beside acceptance, and how all is shown."""

    speed: bool = option(False, "Measure the speed-up too: each prompt with and without drafts, in turn.")
    plot: Path | None = options.plot("acceptance and histograms")
    as_json: bool = option(False, options.JSON, "--json")


@grouped
@then("acceptance_run")
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
    options.check_drafter("acceptance", models.target, models.drafter)
    options.use_threads(models.threads)
