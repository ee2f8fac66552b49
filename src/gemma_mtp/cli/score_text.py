"""What `gemma-mtp score` scores."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gemma_mtp.cli import options
from gemma_mtp.cli.generate_options import INPUT, standard_input
from gemma_mtp.cli.option_groups import argument, group, option
from gemma_mtp.errors import PromptError
from gemma_mtp.text import check_text, read_text

if TYPE_CHECKING:
    from gemma_mtp.engine.pair import Pair


@group(INPUT)
class TextOptions:
    """Where the text comes from."""

    text: str | None = argument(None, "Text to score. Default: --file, or standard input.")
    file: Path | None = option(None, "Read the text from a file.", "-f")
    continuation: str | None = option(None, "Score this text alone, as it follows the other one.")

    def read(self) -> tuple[str, str | None]:
        """The text from the one place it was given, and its continuation. Raises PromptError."""
        if self.text is not None and self.file is not None:
            raise PromptError("the text was given twice (TEXT and --file); give it once.")
        continuation = self.continuation
        if continuation is not None:
            check_text(continuation, "--continuation", PromptError)
        if self.file is not None:
            return read_text(self.file, "text file", PromptError), continuation
        if self.text is not None:
            return check_text(self.text, "the text", PromptError), continuation
        return standard_input(), continuation


@group(options.MODELS)
class ScoredTarget:
    """The target that scores; no drafter is loaded beside it."""

    target: Path | None = option(None, options.TARGET)
    adapter: Path | None = option(None, options.ADAPTER)
    dtype: str = option("auto", options.DTYPE)
    quantize: str | None = option(None, options.QUANTIZE)
    strict: bool = option(False, options.STRICT)
    device: str = option("auto", options.DEVICE)
    threads: int | None = option(None, options.THREADS)

    def load(self) -> Pair:
        """Returns the target, as a pair without a drafter. Raises what `load_pair` does."""
        return options.load_shown(
            self.target, None, adapter=self.adapter, dtype=self.dtype, device=self.device, use_drafter=False,
            quantize=self.quantize, strict=self.strict,
        )  # fmt: skip
