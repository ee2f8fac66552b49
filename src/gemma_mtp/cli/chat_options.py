"""Options of `gemma-mtp chat`."""

from __future__ import annotations

from pathlib import Path

from gemma_mtp.cli.option_groups import group, option
from gemma_mtp.errors import OptionError, PromptError
from gemma_mtp.text import check_text


@group("Conversation")
class TalkOptions:
    """How the conversation begins, and how it is shown."""

    system: str | None = option(None, "System message.")
    load: Path | None = option(None, "Go on with a conversation that /save wrote.", metavar="FILE")
    thinking: bool = option(False, "Let the model think first; thoughts are dimmed.")
    context: int | None = option(None, "Most tokens of the conversation. Default: the model's context.")
    show_drafts: bool = option(False, "Colour accepted, corrected and bonus tokens.")
    quiet: bool = option(False, "No statistics after answers.", "-q")

    def check(self) -> None:
        if self.system is not None:
            check_text(self.system, "--system", PromptError)
        if self.system is not None and self.load is not None:
            raise OptionError("--system and --load exclude each other: the file has its own; use /system afterwards.")
        if self.context is not None and self.context < 2:
            raise OptionError(f"--context is {self.context}, but must be 2 or more.")
