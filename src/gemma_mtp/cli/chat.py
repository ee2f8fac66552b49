"""`gemma-mtp chat`."""

from __future__ import annotations

from gemma_mtp.cli import options
from gemma_mtp.cli.chat_options import TalkOptions
from gemma_mtp.cli.generate_options import DraftingOptions, SamplingOptions
from gemma_mtp.cli.option_groups import grouped


@grouped
def chat(talk: TalkOptions, models: options.PairOptions, drafting: DraftingOptions, sampling: SamplingOptions) -> None:
    """Talk with a model that has a chat template. Type /help for the commands.

    From a pipe, each line is a message. Answers go to standard output, the rest to standard error. The exit code is 2
    where a message got no answer.
    """
    models.check()
    options.parse_draft_tokens(drafting.draft_tokens)
    talk.check()
    options.use_threads(models.threads)

    from gemma_mtp.cli import chat_run

    chat_run.chat(talk, models, drafting, sampling)
