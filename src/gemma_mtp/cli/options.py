"""Options and groups of options that several commands have, said once.

Modules of options import nothing that does work: the help and the completion of a command take no longer than to read
what it is called with. What does the work is imported where a command runs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemma_mtp.cli.option_groups import at_least, group, option
from gemma_mtp.errors import PromptError, SamplingError
from gemma_mtp.locate import bundled_directory, find_drafter, locate
from gemma_mtp.measure.figure import check_plot

if TYPE_CHECKING:
    from gemma_mtp.datasets import Example
    from gemma_mtp.decoding.draft_length import DraftTokens
    from gemma_mtp.engine.pair import Pair

DATA, MODELS, DRAFTING, SAMPLING = "Data", "Models", "Drafting", "Sampling and stopping"
GRAMMAR, OUTPUT = "Constrained output", "Output"


#: more than machines have; PyTorch crashes where threads can not be started
MOST_THREADS = 1024


def use_threads(threads: int | None) -> None:
    """Do what `--threads` says, if it was given. Raises SamplingError for what no machine can start."""
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise SamplingError(f"--threads is {threads}, but must be from 1 to {MOST_THREADS}.")
    if threads is not None:
        from gemma_mtp.backend.native import set_threads

        set_threads(threads)


def parse_draft_tokens(text: str) -> DraftTokens:
    """What --draft-tokens says. Raises SamplingError."""
    if text == "auto":
        return "auto"
    try:
        return int(text)
    except ValueError:
        raise SamplingError(f"--draft-tokens is {text!r}, but must be auto or a whole number, such as 4.") from None


# help of options that several groups have
TARGET = "A directory, a GGUF file, a name on the Hugging Face hub (see pull), or bundled. Default: the bundled pair."
DRAFTER = "The same for the drafter. Default: the target's own, found by its name."
NO_DRAFTER = "Decode without a drafter."
ADAPTER = "Directory of a LoRA adapter (PEFT), merged into the target while loading."
DTYPE = "auto, float32, bfloat16 or float16. auto: on a GPU bfloat16; on a CPU bfloat16 if stored so, else float32."
DEVICE = "auto, cpu, cuda or cuda:N."
THREADS = "CPU threads. Default: one for each core."
STRICT = "Refuse a checkpoint with anything that is unknown, not honoured or contradictory. Default: a warning."
QUANTIZE = (
    "Quantise while loading: int8, int4 or q8_0, or by part, such as target=int4,drafter=int8. Parts: target,"
    " embeddings, drafter, drafter-head."
)
VERIFICATION = (
    "exact gives the tokens of plain decoding. rejection and block give the same distribution, and accept more at a"
    " high temperature."
)
LIMIT = "Most prompts; they are spread evenly over the data."
JSON = "Print one JSON object."
#: of commands without groups
Strict = Annotated[bool, typer.Option("--strict", help=STRICT, rich_help_panel=MODELS)]


def plot(what: str) -> Any:
    """An option that draws it."""
    return option(None, f"Draw {what} to this file, .png, .svg or .pdf.", check=check_plot)


@group(MODELS)
class TargetOption:
    target: Path | None = option(None, TARGET)


@group(MODELS)
class TargetAndDrafter(TargetOption):
    drafter: Path | None = option(None, DRAFTER)


@group(MODELS)
class Loading:
    """How models are loaded, and what they take of the machine. These options come after a base class's beside it."""

    adapter: Path | None = option(None, ADAPTER)
    dtype: str = option("auto", DTYPE)
    quantize: str | None = option(None, QUANTIZE)
    strict: bool = option(False, STRICT)
    device: str = option("auto", DEVICE)
    threads: int | None = option(None, THREADS)

    def pair(self, target: Path | None, drafter: Path | None, use_drafter: bool = True) -> Pair:
        """Returns the pair of `load_pair`, and shows meanwhile how far it is. Standard error says which drafter was
        found for it."""
        from gemma_mtp.engine.pair import load_pair
        from gemma_mtp.progress import loading

        with loading() as told:
            pair = load_pair(
                target, drafter, adapter=self.adapter, dtype=self.dtype, device=self.device, use_drafter=use_drafter,
                quantize=self.quantize, strict=self.strict, on_bytes=told,
            )  # fmt: skip
        if pair.found_drafter is not None:
            print(f"drafter: {pair.found_drafter}, found by the target's name", file=sys.stderr)
        return pair


@group(MODELS)
class PairOptions(Loading, TargetAndDrafter):
    """The pair that a command decodes with."""

    no_drafter: bool = option(False, NO_DRAFTER)

    def check(self) -> None:
        check_exclusive(self.drafter, self.no_drafter)

    def load(self) -> Pair:
        return self.pair(self.target, self.drafter, not self.no_drafter)


def check_exclusive(drafter: Path | str | None, no_drafter: bool) -> None:
    """Raises PromptError where a drafter is given, and none wanted."""
    if no_drafter and drafter is not None:
        raise PromptError("--drafter and --no-drafter exclude each other; give one of them.")


def check_drafter(needed_by: str, target: Path | None, drafter: Path | None) -> None:
    """Before anything is loaded: PromptError where a drafter is neither given nor found by the target's name."""
    path = None if target is None else locate(target)
    if path is not None and path.exists() and drafter is None and find_drafter(path) is None:
        raise no_drafter(needed_by)


def no_drafter(needed_by: str) -> PromptError:
    return PromptError(f"{needed_by} needs a drafter; give --drafter, or no --target for the bundled pair.")


@group(OUTPUT)
class JsonOutput:
    """How it is shown."""

    as_json: bool = option(False, JSON, "--json")


@group(DATA)
class ExampleOptions:
    """Which examples of a data set are taken."""

    pattern: str = option("*", "Which files of a directory to read, such as '*.py'.")
    limit: int = option(100, LIMIT, check=at_least(1))

    def examples(self, sources: Sequence[Path]) -> list[Example]:
        return spread(sources, self.pattern, self.limit)


def sources_of(data: Sequence[Path] | None) -> Sequence[Path]:
    """What was given, or the bundled pair's held-out Python."""
    return data or [bundled_directory() / "heldout_prompts.jsonl"]


def spread(sources: Sequence[Path], pattern: str, limit: int) -> list[Example]:
    """At most `limit` examples, evenly spread. Reads twice instead of holding everything in memory."""
    from gemma_mtp.datasets import read_examples

    count = sum(1 for _ in read_examples(sources, pattern))
    chosen = {i * count // limit for i in range(limit)} if count > limit else range(count)
    return [example for i, example in enumerate(read_examples(sources, pattern)) if i in chosen]
