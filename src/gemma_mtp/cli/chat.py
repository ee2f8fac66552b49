"""`gemma-mtp chat`: its options, and what can be wrong with them."""

from __future__ import annotations

from pathlib import Path

from gemma_mtp.cli import options
from gemma_mtp.cli.generate import DraftingOptions, SamplingOptions
from gemma_mtp.cli.option_groups import at_least, group, grouped, option, then
from gemma_mtp.errors import OptionError, PromptError
from gemma_mtp.text import check_text


@group("Conversation")
class TalkOptions:
    """How the conversation begins, and how it is shown."""

    system: str | None = option(None, "System message.")
    load: Path | None = option(None, "Go on with a conversation that /save wrote.", metavar="FILE")
    thinking: bool = option(False, "Let the model think first; thoughts are dimmed.")
    context: int | None = option(
        None, "Most tokens of the conversation. Default: the model's context.", check=at_least(2)
    )
    show_drafts: bool = option(False, "Colour accepted, corrected and bonus tokens.")
    quiet: bool = option(False, "No statistics after answers.", "-q")

    def check(self) -> None:
        if self.system is not None:
            check_text(self.system, "--system", PromptError)
        if self.system is not None and self.load is not None:
            raise OptionError("--system and --load exclude each other: the file has its own; use /system afterwards.")


@grouped
@then("chat_run")
def chat(talk: TalkOptions, models: options.PairOptions, drafting: DraftingOptions, sampling: SamplingOptions) -> None:
    """Talk with a model that has a chat template. Type /help for the commands.

    From a pipe, each line is a message. Answers go to standard output, the rest to standard error. The exit code is 2
    where a message got no answer.
    """
    models.check()
    options.parse_draft_tokens(drafting.draft_tokens)
    talk.check()
    options.use_threads(models.threads)
