"""What `gemma-mtp chat` does: read a message or a command, do it, show it."""

from __future__ import annotations

import sys
from contextlib import nullcontext

import typer

from gemma_mtp.cli import chat_files, options
from gemma_mtp.cli.chat import TalkOptions
from gemma_mtp.cli.chat_commands import Commands, QuitError
from gemma_mtp.cli.chat_input import Source, source
from gemma_mtp.cli.chat_screen import Screen
from gemma_mtp.cli.chat_session import Session
from gemma_mtp.cli.generate import DraftingOptions, SamplingOptions
from gemma_mtp.cli.progress import progress
from gemma_mtp.errors import GemmaMtpError, PromptError, TokenizerError
from gemma_mtp.interrupts import interrupts_noted
from gemma_mtp.locate import BUNDLED
from gemma_mtp.text import check_text

#: exit code where a message of a pipe got no answer
UNANSWERED = 2
UNTRAINED = (
    "The bundled pair completes Python and is not trained for conversations: give --target a model that is, such as"
    " google/gemma-4-E2B-it, or complete code with: gemma-mtp generate"
)


def chat(talk: TalkOptions, models: options.PairOptions, drafting: DraftingOptions, sampling: SamplingOptions) -> None:
    """Load the pair, and talk."""
    system, messages = (talk.system or None, []) if talk.load is None else chat_files.load(talk.load)
    sampling.params({})  # wrong values are told before minutes of loading
    with progress("loading"):
        pair = models.load()
    # an answer is as long as the model makes it, unless a length is asked for
    longest = {"max_tokens": pair.target.config.max_position_embeddings}
    params = sampling.params({**longest, **pair.generation.conversation()})
    session = Session(
        pair, params, options.parse_draft_tokens(drafting.draft_tokens), drafting.verification, talk.context
    )
    session.system, session.messages, session.thinking = system, messages, talk.thinking
    if talk.thinking and not session.can_think:
        raise TokenizerError("--thinking needs a chat template with a switch for it, and the target's has none.")
    screen = Screen(talk.show_drafts, talk.quiet)
    if models.target is None or str(models.target) == BUNDLED:
        screen.tell(UNTRAINED)
    if not _talk(session, screen, source()):
        raise typer.Exit(UNANSWERED)


def _talk(session: Session, screen: Screen, given: Source) -> bool:
    """Until the input ends. Returns whether all that came from a pipe was done."""
    commands = Commands(session, screen, given.read)
    well = True
    if given.interactive:
        screen.tell("/help lists the commands, Ctrl-D ends.")
    while True:
        try:
            line = given.read()
            if line is None:
                return well
            if _take(line, session, commands):
                with interrupts_noted() if given.interactive else nullcontext(lambda: False) as stopped:
                    screen.show(session.answer(), stopped)
        except QuitError:
            return well
        except GemmaMtpError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            well = given.interactive


def _take(line: str, session: Session, commands: Commands) -> bool:
    """Do what a line says. Returns whether the last message is to be answered."""
    text = check_text(line, "the message", PromptError)
    if not text.strip():
        return False
    if text.startswith("/") and not text.startswith("//"):
        return commands.run(text)
    session.say(text.removeprefix("/") if text.startswith("//") else text)
    return True
