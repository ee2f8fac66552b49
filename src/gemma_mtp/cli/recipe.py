"""`gemma-mtp recipe`: its options, and what can be wrong with them."""

from __future__ import annotations

from pathlib import Path

from gemma_mtp.cli import options
from gemma_mtp.cli.option_groups import REQUIRED, argument, group, grouped, option, then
from gemma_mtp.cli.options import DRAFTING, MODELS
from gemma_mtp.cli.plan import LOAD, MACHINE
from gemma_mtp.errors import OptionError

DEVICES = ("auto", "cpu", "cuda", "metal")


@group(MODELS)
class RecipeOptions:
    """The runtime, and the pair."""

    runtime: str = argument(
        REQUIRED,
        "vllm, sglang, tensorrt-llm, ray-serve-llm, transformers, mlx, llama.cpp, ollama, litert-lm or openvino.",
    )
    target: str = option(
        "bundled", "An official name such as gemma-4-31B-it, a directory, a GGUF file, a name on the hub, or bundled."
    )
    drafter: str | None = option(None, options.DRAFTER)


@group(DRAFTING)
class RecipeDrafts:
    """Drafts a round."""

    draft_tokens: int | None = option(
        None, "Drafts a round (K). Default: the report's, else one that the recipe names as a default.", "-k"
    )
    report: Path | None = option(None, "Take K from what `gemma-mtp acceptance --json` printed into this file.")

    def check(self) -> None:
        if self.draft_tokens is not None and self.report is not None:
            raise OptionError("--draft-tokens and --report both say how much to draft; give one of them.")


@group(LOAD)
class RecipeLoad:
    """How the pair is used."""

    sequences: int = option(4, "Sequences that decode together.", "-n")
    context: int | None = option(None, "Tokens of each, prompt and output. Default: 8192, or what fits.", "-c")


@group(MACHINE)
class RecipeMachine:
    """What it is to run on."""

    device: str = option("auto", "auto (this machine's), cpu, cuda or metal.")
    memory: str | None = option(None, "Such as 24GB or 24GiB. Default: this machine's, or its GPU's.")

    def check(self) -> None:
        if self.device not in DEVICES:
            raise OptionError(f"--device is {self.device!r}, but must be {', '.join(DEVICES)}.")


@grouped
@then("recipe_run")
def recipe(
    models: RecipeOptions, drafts: RecipeDrafts, used: RecipeLoad, machine: RecipeMachine, output: options.JsonOutput
) -> None:
    """Print how another runtime decodes this pair on this hardware: commands, configuration, and what is lost.

    Runs and downloads nothing. The recipe says with which versions it was tried, and what is not known.
    """
    drafts.check()
    machine.check()
